// SPDX-License-Identifier: Apache-2.0
// Operations on a primitive's result, attached to the primitive.

import CDNNL
import HalfstepNumerics

/// Operations on a primitive's result in the form of oneDNN's post-operations.
///
/// oneDNN 2.6 runs the second elementwise function of an algorithm with the parameters of the first
/// one, so that every algorithm is used once and the list ends where one would repeat.
struct Attachment {
  let attributes: PrimitiveAttributes
  /// Tensors that the post-operations read.
  private(set) var reads: [Lowering.Binding] = []
  /// A tensor that is added through the destination's memory.
  private(set) var accumulated: Value?
  /// How many of the operations are attached.
  private(set) var consumed = 0

  /// Most post-operations that oneDNN takes.
  private static let limit = 32

  private enum Item {
    case eltwise(Eltwise)
    case sum(Value)
    case binary(dnnl_alg_kind_t, Value)
  }

  /// - Parameter plain: The primitive without operations.
  /// - Returns: Nil if no operation can be attached.
  init?(
    _ operations: [PostOperation], to plain: PrimitiveDescriptor, _ lowering: Lowering
  ) throws(HalfstepError) {
    let implementation = plain.implementation
    // These apply post-operations one element at a time.
    if implementation.contains("gemm:") || implementation.contains("ref") { return nil }
    guard let result = plain.descriptor(dnnl_query_dst_md) else { return nil }
    var items: [Item] = []
    for operation in operations {
      guard Self.append(operation, to: &items, implementation) else { break }
      consumed += 1
    }
    guard consumed > 0, items.count <= Self.limit else { return nil }
    self.attributes = try PrimitiveAttributes()
    for item in items {
      switch item {
      case .eltwise(let function):
        try attributes.append(function)
      case .sum(let value):
        accumulated = try lowering.arranged(value, result)
        try attributes.appendSum()
      case .binary(let algorithm, let value):
        let isWhole = value.dimensions == result.dimensions
        let layout = isWhole ? result : try MemoryDescriptor(value.dimensions)
        let source = isWhole ? try lowering.arranged(value, result) : try lowering.plain(value)
        let argument = DNNL_ARG_ATTR_MULTIPLE_POST_OP_BASE * (Int32(attributes.count) + 1)
        reads.append((argument | DNNL_ARG_SRC_1, layout, source.buffer))
        try attributes.append(algorithm, with: layout)
      }
    }
    try attributes.seal()
  }

  private static func append(
    _ operation: PostOperation, to items: inout [Item], _ implementation: String
  ) -> Bool {
    func isUsed(_ algorithm: dnnl_alg_kind_t) -> Bool {
      items.contains { if case .eltwise(let f) = $0 { f.algorithm == algorithm } else { false } }
    }
    switch operation {
    case .eltwise(var function):
      // Leaves the plain clip to the quantizer.
      if function.algorithm == dnnl_eltwise_clip {
        function = Eltwise(dnnl_eltwise_clip_v2, function.alpha, function.beta)
      }
      if isUsed(function.algorithm) { return false }
      items.append(.eltwise(function))
    case .sum(let value):
      // Other implementations start the accumulator with what they add to, which rounds in another
      // order than adding afterwards.
      let accumulates =
        implementation.hasPrefix("brg")
        && !items.contains { if case .sum = $0 { true } else { false } }
      items.append(accumulates ? .sum(value) : .binary(dnnl_binary_add, value))
    case .perChannel(let algorithm, let value):
      items.append(.binary(algorithm, value))
    case .fakeQuantize(let encoding):
      let reciprocal = 1 / encoding.scales[0]
      guard reciprocal.isFinite, !isUsed(dnnl_eltwise_round), !isUsed(dnnl_eltwise_clip),
        !isUsed(dnnl_eltwise_linear)
      else { return false }
      // The product with the reciprocal rides on the function before, or on one that does nothing;
      // the last function adds +0, which makes zeros positive as HalfstepNumerics' kernel does.
      if case .eltwise(var function)? = items.last {
        function.scale = reciprocal
        items[items.count - 1] = .eltwise(function)
      } else {
        guard !isUsed(dnnl_eltwise_clip_v2) else { return false }
        let bound = Float.greatestFiniteMagnitude
        var function = Eltwise(dnnl_eltwise_clip_v2, -bound, bound)
        function.scale = reciprocal
        items.append(.eltwise(function))
      }
      let zero = Int(encoding.zeroPoints[0])
      let low = Float(encoding.minimumCode - zero)
      let high = Float(encoding.maximumCode - zero)
      items.append(.eltwise(Eltwise(dnnl_eltwise_round)))
      items.append(.eltwise(Eltwise(dnnl_eltwise_clip, low, high)))
      items.append(.eltwise(Eltwise(dnnl_eltwise_linear, encoding.scales[0], 0)))
    }
    return true
  }
}

extension Lowering {
  /// Emits a layer with as many operations attached as possible, and the others after it.
  ///
  /// Attaching must not change a bit, so that the primitive has to keep its implementation.
  ///
  /// - Parameters:
  ///   - describe: Makes the primitive's descriptor for some attributes.
  ///   - emit: Appends the primitive.
  func emitFused(
    _ operations: [PostOperation],
    describe: (PrimitiveAttributes) throws(HalfstepError) -> PrimitiveDescriptor?,
    emit: (PrimitiveDescriptor, Attachment?) throws(HalfstepError) -> Value
  ) throws(HalfstepError) -> Value {
    guard let plain = try describe(PrimitiveAttributes()) else {
      throw HalfstepError(.internalError, "oneDNN has no implementation for these shapes")
    }
    guard !operations.isEmpty,
      let attachment = try Attachment(operations, to: plain, self),
      let fused = try describe(attachment.attributes),
      fused.implementation == plain.implementation,
      fused.descriptor(dnnl_query_dst_md) == plain.descriptor(dnnl_query_dst_md)
    else {
      return try apply(operations, to: try emit(plain, nil))
    }
    let value = try emit(fused, attachment)
    return try apply(Array(operations.dropFirst(attachment.consumed)), to: value)
  }

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
      let storage =
        isForRuns
        ? try constants.arranged(tensor, name: source.staticName, from: from, to: layout)
        : try TensorStorage(byteCount: layout.byteCount)
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
