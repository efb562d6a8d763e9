// SPDX-License-Identifier: Apache-2.0
// One unit of work of a plan.

import CDNNL
import HalfstepNumerics

/// One unit of work of a plan.
struct Step {
  /// What the step does, for messages and profiles.
  let label: String
  let reads: [Buffer]
  let writes: [Buffer]
  /// A read buffer that the written one may share memory with, if nothing reads it later.
  var inPlace: (input: Buffer, output: Buffer)? = nil
  let body: () throws(HalfstepError) -> Void
}

/// A oneDNN primitive with its arguments.
final class PrimitiveCall {
  private let primitive: Primitive
  private var arguments: [dnnl_exec_arg_t]
  private let memories: [Memory]
  private let stream: OpaquePointer
  private let label: String

  /// - Parameter bindings: Argument number, layout and buffer of each tensor.
  init(
    _ primitive: Primitive, label: String,
    _ bindings: [(argument: Int32, descriptor: MemoryDescriptor, buffer: Buffer)]
  ) throws(HalfstepError) {
    self.primitive = primitive
    self.label = label
    self.stream = try Engine.shared().stream
    var arguments: [dnnl_exec_arg_t] = []
    var memories: [Memory] = []
    for binding in bindings {
      let memory = try Memory(binding.descriptor)
      try binding.buffer.follow(memory)
      memories.append(memory)
      arguments.append(dnnl_exec_arg_t(arg: binding.argument, memory: memory.handle))
    }
    self.arguments = arguments
    self.memories = memories
  }

  func run() throws(HalfstepError) {
    let status = dnnl_primitive_execute(
      primitive.handle, stream, Int32(arguments.count), arguments)
    try Engine.check(status, "running \(label)")
    try Engine.check(dnnl_stream_wait(stream), "waiting for \(label)")
  }
}
