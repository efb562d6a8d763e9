// SPDX-License-Identifier: Apache-2.0
// Gemm and MatMul.

import CDNNL
import HalfstepGraph
import HalfstepNumerics

let matrixOperators: [String: OperatorBuilder] = [
  "Gemm": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try GeneralMatrixProduct(node, lowering).build([])]
  },
  "MatMul": OperatorBuilder { (lowering, node) throws(HalfstepError) in [try lowering.matmul(node)]
  },
]

/// A Gemm node: `alpha · A' · B' + beta · C`.
struct GeneralMatrixProduct {
  let outputShape: Shape
  private let lowering: Lowering
  private let a: Value
  private let b: Value
  private let c: Value?
  private let alpha: Float
  private let beta: Float
  private let isATransposed: Bool
  private let isBTransposed: Bool
  private let inner: Int

  init(_ node: Node, _ lowering: Lowering) throws(HalfstepError) {
    var a = try lowering.floatInput(node, 0)
    let b = try lowering.floatInput(node, 1)
    let c = try lowering.optionalFloatInput(node, 2)
    isATransposed = (node.intAttribute("transA") ?? 0) != 0
    isBTransposed = (node.intAttribute("transB") ?? 0) != 0
    alpha = node.floatAttribute("alpha") ?? 1
    beta = node.floatAttribute("beta") ?? 1
    if a.rank > 2, lowering.opset < 9 || a.rank == 4 {
      // Old exporters feed pictures of one pixel.
      let rest = a.dimensions[1...].reduce(1, *)
      a = try lowering.view(a, as: Shape([a.shape[0], rest]))
    }
    guard a.rank == 2, b.rank == 2, a.count > 0, b.count > 0 else {
      throw HalfstepError(
        .shapeMismatch,
        "node '\(node.label)': inputs \(a.shape) and \(b.shape), expected two matrices",
        node: node.label)
    }
    let (rows, inner) = isATransposed ? (a.shape[1], a.shape[0]) : (a.shape[0], a.shape[1])
    let (depth, columns) = isBTransposed ? (b.shape[1], b.shape[0]) : (b.shape[0], b.shape[1])
    guard inner == depth else {
      throw HalfstepError(
        .shapeMismatch,
        "node '\(node.label)': matrices \(a.shape) and \(b.shape) do not fit each other",
        node: node.label)
    }
    outputShape = try Shape([rows, columns])
    if let c, try ShapeRules.broadcast([c.shape, outputShape]) != outputShape {
      throw HalfstepError(
        .shapeMismatch,
        "node '\(node.label)': C \(c.shape) does not broadcast to \(outputShape)", node: node.label)
    }
    self.inner = inner
    self.lowering = lowering
    self.a = a
    self.b = b
    self.c = c
  }

  func build(_ operations: [PostOperation]) throws(HalfstepError) -> Value {
    let isVector = c.map { $0.count == outputShape[1] && $0.dimensions.last == $0.count } ?? true
    guard alpha == 1, beta == 1 || c == nil, !isATransposed, isVector else {
      var value = try product([], nil)
      if alpha != 1 { value = try lowering.eltwise(Eltwise(dnnl_eltwise_linear, alpha, 0), value) }
      if let c, beta != 0 {
        let term =
          beta == 1 ? c : try lowering.eltwise(Eltwise(dnnl_eltwise_linear, beta, 0), c)
        value = try lowering.arithmetic(.add, value, term)
      }
      return try lowering.apply(operations, to: value)
    }
    return try product(operations, c)
  }

  private func product(
    _ operations: [PostOperation], _ bias: Value?
  ) throws(HalfstepError) -> Value {
    if isATransposed || b.constant == nil {
      let value = try lowering.matmul(
        a, b, isATransposed: isATransposed, isBTransposed: isBTransposed)
      return try lowering.apply(
        operations,
        to: bias.map { (c) throws(HalfstepError) in
          try lowering.arithmetic(.add, value, c)
        } ?? value)
    }
    // Constant weights: oneDNN's inner product, which takes them as [N, K].
    let (rows, columns) = (outputShape[0], outputShape[1])
    let source = try MemoryDescriptor([rows, inner])
    let kernel = try MemoryDescriptor.any([columns, inner])
    let target = try MemoryDescriptor([rows, columns])
    let shift = try bias.map { (_) throws(HalfstepError) in try MemoryDescriptor([columns]) }
    let from = try MemoryDescriptor(
      [columns, inner], strides: isBTransposed ? [inner, 1] : [1, columns])
    let input = try lowering.plain(a)
    return try lowering.emitFused(
      operations,
      describe: { (attributes) throws(HalfstepError) in
        var operation = dnnl_inner_product_desc_t()
        let status = withDescriptors(source, kernel, shift, target) { a, b, c, d in
          dnnl_inner_product_forward_desc_init(&operation, dnnl_forward_inference, a, b, c, d)
        }
        try Engine.check(status, "describing the product of \(a.shape) and \(b.shape)")
        return try PrimitiveDescriptor(operation: &operation, attributes: attributes)
      },
      emit: { (descriptor, attachment) throws(HalfstepError) in
        guard let layout = descriptor.descriptor(dnnl_query_weights_md) else {
          throw HalfstepError(.internalError, "oneDNN: a product without layouts")
        }
        var reads: [Lowering.Binding] = [
          (DNNL_ARG_SRC, source, input.buffer),
          (DNNL_ARG_WEIGHTS, layout, try lowering.prepared(b, as: from, to: layout)),
        ]
        if let bias, let shift {
          reads.append((DNNL_ARG_BIAS, shift, try lowering.plain(bias).buffer))
        }
        return try lowering.emit(
          descriptor, label: "gemm", reads, result: outputShape, target, attachment)
      })
  }
}

extension Lowering {
  fileprivate func matmul(_ node: Node) throws(HalfstepError) -> Value {
    let a = try floatInput(node, 0)
    let b = try floatInput(node, 1)
    guard a.rank >= 1, b.rank >= 1 else {
      throw HalfstepError(.shapeMismatch, "inputs \(a.shape) and \(b.shape): expected matrices")
    }
    // A vector is a row on the left and a column on the right; its axis leaves the result.
    let left = a.rank == 1 ? try view(a, as: Shape([1] + a.dimensions)) : a
    let right = b.rank == 1 ? try view(b, as: Shape(b.dimensions + [1])) : b
    let result = try matmul(left, right)
    var dimensions = result.dimensions
    if b.rank == 1 { dimensions.removeLast() }
    if a.rank == 1 { dimensions.remove(at: dimensions.count - (b.rank == 1 ? 1 : 2)) }
    return dimensions == result.dimensions ? result : try view(result, as: Shape(dimensions))
  }

  /// The product of the last two axes; the others broadcast.
  func matmul(
    _ first: Value, _ second: Value, isATransposed: Bool = false, isBTransposed: Bool = false
  ) throws(HalfstepError) -> Value {
    let a = try plain(first)
    let b = try plain(second)
    func matrix(_ value: Value, _ isTransposed: Bool) -> (rows: Int, columns: Int) {
      let last = value.dimensions.suffix(2)
      return isTransposed ? (last.last!, last.first!) : (last.first!, last.last!)
    }
    guard a.rank >= 2, b.rank >= 2, a.count > 0, b.count > 0 else {
      throw HalfstepError(.shapeMismatch, "cannot multiply \(a.shape) and \(b.shape)")
    }
    let (rows, inner) = matrix(a, isATransposed)
    let (depth, columns) = matrix(b, isBTransposed)
    guard inner == depth else {
      throw HalfstepError(
        .shapeMismatch, "matrices \(a.shape) and \(b.shape) do not fit each other")
    }
    let batch = try ShapeRules.broadcast([
      Shape(Array(a.dimensions.dropLast(2))), Shape(Array(b.dimensions.dropLast(2))),
    ])
    let shape = try Shape(batch.dimensions + [rows, columns])
    // One matrix on the right: all rows of the left make one product.
    if !isATransposed, b.dimensions.dropLast(2).allSatisfy({ $0 == 1 }), a.rank > 2,
      b.rank <= a.rank
    {
      let tall = try view(a, as: Shape([a.count / inner, inner]))
      let flat = b.rank > 2 ? try view(b, as: Shape(Array(b.dimensions.suffix(2)))) : b
      let result = try matmul(tall, flat, isBTransposed: isBTransposed)
      return try view(result, as: shape)
    }
    func descriptor(_ value: Value, _ isTransposed: Bool) throws(HalfstepError) -> MemoryDescriptor
    {
      let lead = [Int](repeating: 1, count: shape.rank - value.rank)
      var dimensions = lead + value.dimensions
      var strides = try Shape(dimensions).strides
      if isTransposed {
        let last = dimensions.count - 1
        dimensions.swapAt(last, last - 1)
        strides.swapAt(last, last - 1)
      }
      return try MemoryDescriptor(dimensions, strides: strides)
    }
    let left = try descriptor(a, isATransposed)
    let right = try descriptor(b, isBTransposed)
    let target = try MemoryDescriptor(shape.dimensions)
    var operation = dnnl_matmul_desc_t()
    let status = withDescriptors(left, right, nil, target) { a, b, _, d in
      dnnl_matmul_desc_init(&operation, a, b, nil, d)
    }
    try Engine.check(status, "describing the product of \(a.shape) and \(b.shape)")
    guard
      let primitive = try PrimitiveDescriptor(
        operation: &operation, attributes: PrimitiveAttributes())
    else { throw HalfstepError(.internalError, "oneDNN cannot multiply \(a.shape) and \(b.shape)") }
    return try emit(
      primitive, label: "matmul",
      [(DNNL_ARG_SRC, left, a.buffer), (DNNL_ARG_WEIGHTS, right, b.buffer)], result: shape, target,
      nil)
  }
}
