// SPDX-License-Identifier: Apache-2.0
// A compiled graph: steps over placed buffers.

import CDNNL
import HalfstepNumerics
import OrderedCollections

/// A graph compiled for one combination of input shapes.
final class Plan {
  /// A tensor that the caller receives.
  struct Output {
    let name: String
    let value: Value
    /// Type that the caller expects; the value is converted if it differs.
    let dataType: DataType
    /// Copies a value that is not row-major to `target`.
    let reorder: (call: PrimitiveCall, target: Buffer)?
    let scratchpad: Buffer?
  }

  /// Memory for the caller's tensors, bound for each run.
  let inputs: [(name: String, buffer: Buffer)]
  let steps: [Step]
  let outputs: [Output]
  /// Bytes of arena that the plan needs.
  let arenaBytes: Int
  private let buffers: [Buffer]

  /// Places the buffers of the steps.
  init(
    inputs: [(name: String, buffer: Buffer)], steps: [Step],
    outputs: [(name: String, value: Value, dataType: DataType)], limit: Int
  ) throws(HalfstepError) {
    self.inputs = inputs
    self.steps = steps
    var results: [Output] = []
    var kept: [Buffer] = []
    for output in outputs {
      kept.append(output.value.buffer)
      guard let layout = output.value.layout else {
        results.append(
          Output(
            name: output.name, value: output.value, dataType: output.dataType, reorder: nil,
            scratchpad: nil))
        continue
      }
      let plain = try MemoryDescriptor(output.value.dimensions)
      let descriptor = try PrimitiveDescriptor.reorder(from: layout, to: plain)
      let target = Buffer(external: plain.byteCount)
      var bindings: [Lowering.Binding] = [
        (DNNL_ARG_FROM, layout, output.value.buffer), (DNNL_ARG_TO, plain, target),
      ]
      var scratchpad: Buffer?
      if let needed = descriptor.descriptor(dnnl_query_scratchpad_md), needed.byteCount > 0 {
        let buffer = Buffer(arena: needed.byteCount)
        bindings.append((DNNL_ARG_SCRATCHPAD, needed, buffer))
        kept.append(buffer)
        scratchpad = buffer
      }
      let call = try PrimitiveCall(
        Primitive(descriptor), label: "reorder of output '\(output.name)'", bindings)
      results.append(
        Output(
          name: output.name, value: output.value, dataType: output.dataType,
          reorder: (call, target), scratchpad: scratchpad))
    }
    self.outputs = results
    self.arenaBytes = try MemoryPlanner.place(steps, kept: kept, limit: limit)
    var seen = Set<ObjectIdentifier>()
    var buffers: [Buffer] = []
    for buffer in kept + steps.flatMap({ $0.reads + $0.writes })
    where buffer.isArena && seen.insert(ObjectIdentifier(buffer)).inserted {
      buffers.append(buffer)
    }
    self.buffers = buffers
  }

  /// Tells every buffer where it is.
  ///
  /// - Parameter arena: First of `arenaBytes` bytes.
  func bind(_ arena: UnsafeMutableRawPointer) throws(HalfstepError) {
    for buffer in buffers { try buffer.bind(arena + buffer.offset) }
  }

  /// Runs the steps; the inputs are bound.
  func run() throws(HalfstepError) {
    for step in steps { try step.body() }
  }

  /// Copies the results to tensors of the caller's.
  func collect() throws(HalfstepError) -> OrderedDictionary<String, Tensor> {
    var results: OrderedDictionary<String, Tensor> = [:]
    for output in outputs {
      let value = output.value
      let tensor = try Tensor(uninitialized: value.dataType, shape: value.shape)
      if let (call, target) = output.reorder {
        try target.bind(tensor.storage.baseAddress)
        try call.run()
      } else if tensor.byteCount > 0 {
        tensor.storage.baseAddress.copyMemory(
          from: try value.buffer.bytes, byteCount: tensor.byteCount)
      }
      results[output.name] = try Conversion.convert(tensor, to: output.dataType)
    }
    return results
  }
}
