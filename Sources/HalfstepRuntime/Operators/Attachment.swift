// SPDX-License-Identifier: Apache-2.0
// Operations on a primitive's result, attached to the primitive.

import CDNNL
import HalfstepNumerics

/// Operations on a primitive's result in the form of oneDNN's post-operations.
struct Attachment {
  let attributes: PrimitiveAttributes
  /// Tensors that the post-operations read.
  let reads: [Lowering.Binding]
  /// A tensor that is added through the destination's memory.
  let accumulated: Value?

  /// Most post-operations that oneDNN takes.
  private static let limit = 32

  /// - Parameter result: Layout of the primitive's result.
  /// - Returns: Nil if the operations cannot be attached.
  init?(
    _ operations: [PostOperation], result: MemoryDescriptor, _ lowering: Lowering
  ) throws(HalfstepError) {
    let attributes = try PrimitiveAttributes()
    var reads: [Lowering.Binding] = []
    var accumulated: Value?
    for operation in operations {
      switch operation {
      case .eltwise(let function):
        try attributes.append(function)
      case .fakeQuantize(let encoding):
        for function in encoding.asEltwise { try attributes.append(function) }
      case .sum(let value):
        guard accumulated == nil else { return nil }
        accumulated = try lowering.arranged(value, result)
        try attributes.appendSum()
      case .perChannel(let algorithm, let value):
        let layout = try MemoryDescriptor(value.dimensions)
        let argument = Int32(
          DNNL_ARG_ATTR_MULTIPLE_POST_OP_BASE * (Int32(attributes.count) + 1))
        reads.append((argument | DNNL_ARG_SRC_1, layout, value.buffer))
        try attributes.append(algorithm, with: layout)
      }
    }
    guard attributes.count <= Self.limit else { return nil }
    try attributes.seal()
    self.attributes = attributes
    self.reads = reads
    self.accumulated = accumulated
  }
}

extension Lowering {
  /// Appends a primitive that makes one tensor, with its attachment.
  func emit(
    _ descriptor: PrimitiveDescriptor, label: String, _ reads: [Binding], result shape: Shape,
    _ layout: MemoryDescriptor, _ attachment: Attachment?
  ) throws(HalfstepError) -> Value {
    let value = try makeValue(shape, layout: layout)
    let accumulated = attachment?.accumulated
    try emit(
      descriptor, label: label, reads + (attachment?.reads ?? []),
      [(DNNL_ARG_DST, layout, value.buffer)],
      inPlace: accumulated.map { ($0.buffer, value.buffer) }, copiesFirst: accumulated != nil)
    return value
  }

  /// Weights in the layout that a primitive asks for: prepared once if they are constant.
  ///
  /// - Parameter from: How the row-major weights are to be read.
  func prepared(
    _ weights: Value, as from: MemoryDescriptor, to layout: MemoryDescriptor
  ) throws(HalfstepError) -> Buffer {
    let source = try plain(weights)
    if from == layout { return source.buffer }
    if let tensor = source.constant {
      let storage = try constants.arranged(
        tensor, name: source.staticName, from: from, to: layout)
      return Buffer(constant: storage, byteCount: layout.byteCount)
    }
    let target = Buffer(arena: layout.byteCount)
    let reorder = try PrimitiveDescriptor.reorder(from: from, to: layout)
    try emit(
      reorder, label: "reorder of weights", [(DNNL_ARG_FROM, from, source.buffer)],
      [(DNNL_ARG_TO, layout, target)])
    return target
  }
}
