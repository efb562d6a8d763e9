// SPDX-License-Identifier: Apache-2.0
// Batch, layer, instance normalization, LRN, and softmax.

import CDNNL
import HalfstepGraph
import HalfstepNumerics

let normalizationOperators: [String: OperatorBuilder] = [
  "BatchNormalization": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    let value = try lowering.floatInput(node, 0)
    guard let affine = try BatchNormalization(node, lowering, channels: value.shape) else {
      throw HalfstepError(
        .unsupportedOperator, "batch normalization with computed parameters is not supported")
    }
    let scaled = try lowering.arithmetic(.multiply, value, affine.scale)
    return [try lowering.arithmetic(.add, scaled, affine.shift)]
  },
  "Softmax": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.softmax(node, isLogarithmic: false)]
  },
  "LogSoftmax": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.softmax(node, isLogarithmic: true)]
  },
  "LayerNormalization": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.layerNormalization(node)]
  },
  "InstanceNormalization": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.instanceNormalization(node)]
  },
  "LRN": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.localResponseNormalization(node)]
  },
]

/// A batch norm in inference as one product and one sum for each channel.
struct BatchNormalization {
  /// `gamma / √(variance + ε)`, shaped `[1, C, 1, …]`.
  let scale: Value
  /// `beta − mean · scale`, shaped `[1, C, 1, …]`.
  let shift: Value

  /// - Returns: Nil if the parameters are not constant.
  init?(_ node: Node, _ lowering: Lowering, channels shape: Shape) throws(HalfstepError) {
    if (node.intAttribute("training_mode") ?? 0) != 0 {
      throw HalfstepError(
        .unsupportedOperator, "node '\(node.label)': training mode is not supported",
        node: node.label)
    }
    guard shape.rank >= 2 || shape.rank == 1 else {
      throw HalfstepError(.shapeMismatch, "node '\(node.label)': input \(shape)", node: node.label)
    }
    let axis = shape.rank == 1 ? 0 : 1
    let count = shape[axis]
    var parameters: [[Float]] = []
    for index in 1...4 {
      let value = try lowering.floatInput(node, index)
      guard value.dimensions == [count] else {
        throw HalfstepError(
          .shapeMismatch, "node '\(node.label)' input \(index) \(value.shape): expected [\(count)]",
          node: node.label)
      }
      guard let tensor = value.constant else { return nil }
      parameters.append(try tensor.floats())
    }
    let epsilon = Double(node.floatAttribute("epsilon") ?? 1e-5)
    var scale: [Float] = []
    var shift: [Float] = []
    for channel in 0..<count {
      let factor =
        Double(parameters[0][channel]) / (Double(parameters[3][channel]) + epsilon).squareRoot()
      scale.append(Float(factor))
      shift.append(
        Float(Double(parameters[1][channel]) - Double(parameters[2][channel]) * factor))
    }
    var dimensions = [Int](repeating: 1, count: shape.rank)
    dimensions[axis] = count
    self.scale = Value(constant: try Tensor(scale, shape: dimensions), staticName: nil)
    self.shift = Value(constant: try Tensor(shift, shape: dimensions), staticName: nil)
  }
}

extension Lowering {
  fileprivate func softmax(_ node: Node, isLogarithmic: Bool) throws(HalfstepError) -> Value {
    let value = try plain(floatInput(node, 0))
    if value.count == 0 || value.rank == 0 {
      throw HalfstepError(.shapeMismatch, "input \(value.shape): expected at least one axis")
    }
    let axis = try ShapeRules.axis(
      node.intAttribute("axis") ?? (opset < 13 ? 1 : -1), rank: value.rank)
    // Before opset 13 all axes from `axis` on count as one.
    let end = opset < 13 ? value.rank : axis + 1
    let outer = value.dimensions[..<axis].reduce(1, *)
    let count = value.dimensions[axis..<end].reduce(1, *)
    let inner = value.dimensions[end...].reduce(1, *)
    let layout = try MemoryDescriptor(inner == 1 ? [outer, count] : [outer, count, inner])
    var operation = dnnl_softmax_v2_desc_t()
    let algorithm = isLogarithmic ? dnnl_softmax_log : dnnl_softmax_accurate
    let status = withUnsafePointer(to: layout.raw) {
      dnnl_softmax_v2_forward_desc_init(&operation, dnnl_forward_inference, algorithm, $0, $0, 1)
    }
    try Engine.check(status, "describing the softmax of \(value.shape)")
    guard
      let descriptor = try PrimitiveDescriptor(
        operation: &operation, attributes: PrimitiveAttributes())
    else { throw HalfstepError(.internalError, "oneDNN has no softmax for \(value.shape)") }
    let result = try makeValue(value.shape)
    try emit(
      descriptor, label: "softmax", [(DNNL_ARG_SRC, layout, value.buffer)],
      [(DNNL_ARG_DST, layout, result.buffer)], inPlace: (value.buffer, result.buffer))
    return result
  }

  /// Normalizes rows of `count` elements; the first step of several operators.
  private func normalizedRows(
    _ value: Value, count: Int, epsilon: Double
  ) throws(HalfstepError) -> Value {
    let result = try makeValue(value.shape)
    let (source, target) = (value.buffer, result.buffer)
    let rows = count == 0 ? 0 : value.count / count
    emit("normalize", reads: [value], writes: [result], inPlace: (value, result)) {
      () throws(HalfstepError) in
      let from = try source.floats
      let to = try target.floats
      Parallel.forEachRange(rows, grain: max(1, (1 << 13) / max(count, 1))) { _, range in
        for row in range {
          let x = from + row * count
          var sum = 0.0
          for i in 0..<count { sum += Double(x[i]) }
          let mean = sum / Double(count)
          var squares = 0.0
          for i in 0..<count {
            let d = Double(x[i]) - mean
            squares += d * d
          }
          let factor = Float(1 / (squares / Double(count) + epsilon).squareRoot())
          let center = Float(mean)
          let y = to + row * count
          for i in 0..<count { y[i] = (x[i] - center) * factor }
        }
      }
    }
    return result
  }

  fileprivate func layerNormalization(_ node: Node) throws(HalfstepError) -> Value {
    let value = try plain(floatInput(node, 0))
    let axis = try ShapeRules.axis(node.intAttribute("axis") ?? -1, rank: value.rank)
    let count = value.dimensions[axis...].reduce(1, *)
    let epsilon = Double(node.floatAttribute("epsilon") ?? 1e-5)
    var result = try normalizedRows(value, count: count, epsilon: epsilon)
    let parameters: [(Arithmetic, Value)] =
      [
        (.multiply, try floatInput(node, 1))
      ] + (try optionalFloatInput(node, 2).map { [(.add, $0)] } ?? [])
    for (operation, parameter) in parameters {
      guard try ShapeRules.broadcast([parameter.shape, value.shape]) == value.shape else {
        throw HalfstepError(
          .shapeMismatch, "parameter \(parameter.shape) does not fit \(value.shape)")
      }
      result = try arithmetic(operation, result, parameter)
    }
    return result
  }

  fileprivate func instanceNormalization(_ node: Node) throws(HalfstepError) -> Value {
    let value = try plain(floatInput(node, 0))
    guard value.rank >= 3 else {
      throw HalfstepError(.shapeMismatch, "input \(value.shape): expected rank 3 or more")
    }
    let count = value.dimensions[2...].reduce(1, *)
    let epsilon = Double(node.floatAttribute("epsilon") ?? 1e-5)
    var result = try normalizedRows(value, count: count, epsilon: epsilon)
    let shape = try Shape(
      [value.shape[1]] + [Int](repeating: 1, count: value.rank - 2))
    for (index, operation) in [(1, Arithmetic.multiply), (2, Arithmetic.add)] {
      let parameter = try floatInput(node, index)
      guard parameter.dimensions == [value.shape[1]] else {
        throw HalfstepError(
          .shapeMismatch,
          "input \(index) \(parameter.shape): expected [\(value.shape[1])]")
      }
      result = try arithmetic(operation, result, view(parameter, as: shape))
    }
    return result
  }

  fileprivate func localResponseNormalization(_ node: Node) throws(HalfstepError) -> Value {
    let value = try plain(floatInput(node, 0))
    guard value.rank >= 2, value.count > 0 else {
      throw HalfstepError(.shapeMismatch, "input \(value.shape): expected rank 2 or more")
    }
    guard let size = node.intAttribute("size"), size > 0, size <= WindowGeometry.attributeLimit
    else { throw HalfstepError(.invalidGraph, "size: expected a positive number") }
    let alpha = (node.floatAttribute("alpha") ?? 1e-4) / Float(size)
    let beta = node.floatAttribute("beta") ?? 0.75
    let bias = node.floatAttribute("bias") ?? 1
    let result = try makeValue(value.shape)
    let (source, target) = (value.buffer, result.buffer)
    let (batch, channels) = (value.shape[0], value.shape[1])
    let inner = value.count / (batch * channels)
    emit("LRN", reads: [value], writes: [result]) { () throws(HalfstepError) in
      let from = try source.floats
      let to = try target.floats
      Parallel.forEachRange(batch * channels, grain: 1) { _, range in
        for plane in range {
          let (n, c) = plane.quotientAndRemainder(dividingBy: channels)
          let first = max(0, c - (size - 1) / 2)
          let last = min(channels - 1, c + size / 2)
          for i in 0..<inner {
            var sum: Float = 0
            for other in first...last {
              let x = from[(n * channels + other) * inner + i]
              sum += x * x
            }
            let index = plane * inner + i
            to[index] = from[index] / powerOf(bias + alpha * sum, beta)
          }
        }
      }
    }
    return result
  }
}
