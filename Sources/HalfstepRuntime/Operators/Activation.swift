// SPDX-License-Identifier: Apache-2.0
// Elementwise functions of one tensor.

import CDNNL
import HalfstepGraph
import HalfstepNumerics

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

let activationOperators: [String: OperatorBuilder] = {
  var table: [String: OperatorBuilder] = [:]
  for name in [
    "Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Exp", "Abs",
    "Sqrt", "Neg", "Gelu", "Mish",
  ] {
    table[name] = OperatorBuilder { (lowering, node) throws(HalfstepError) in
      [try lowering.activation(node)]
    }
  }
  for name in Activation.scalarFunctions.keys {
    table[name] = OperatorBuilder { (lowering, node) throws(HalfstepError) in
      [try lowering.scalarFunction(node)]
    }
  }
  table["PRelu"] = OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.parametricRelu(node)]
  }
  return table
}()

/// Functions of one tensor.
enum Activation {
  /// A node as a sequence of oneDNN's functions; nil if it is none.
  static func functions(
    of node: Node, _ lowering: Lowering
  ) throws(HalfstepError) -> [Eltwise]? {
    switch node.opType {
    case "Relu": return [Eltwise(dnnl_eltwise_relu)]
    case "LeakyRelu":
      return [Eltwise(dnnl_eltwise_relu, node.floatAttribute("alpha") ?? 0.01)]
    case "Sigmoid": return [Eltwise(dnnl_eltwise_logistic)]
    case "HardSigmoid":
      let alpha = node.floatAttribute("alpha") ?? 0.2
      let beta = node.floatAttribute("beta") ?? 0.5
      return [Eltwise(dnnl_eltwise_linear, alpha, beta), Eltwise(dnnl_eltwise_clip, 0, 1)]
    case "HardSwish": return [Eltwise(dnnl_eltwise_hardswish)]
    case "Tanh": return [Eltwise(dnnl_eltwise_tanh)]
    case "Elu": return [Eltwise(dnnl_eltwise_elu, node.floatAttribute("alpha") ?? 1)]
    case "Exp": return [Eltwise(dnnl_eltwise_exp)]
    case "Abs": return [Eltwise(dnnl_eltwise_abs)]
    case "Sqrt": return [Eltwise(dnnl_eltwise_sqrt)]
    case "Neg": return [Eltwise(dnnl_eltwise_linear, -1, 0)]
    case "Mish": return [Eltwise(dnnl_eltwise_mish)]
    case "Gelu":
      let isTanh = node.stringAttribute("approximate") == "tanh"
      return [Eltwise(isTanh ? dnnl_eltwise_gelu_tanh : dnnl_eltwise_gelu_erf)]
    case "Clip":
      guard let (low, high) = try clipBounds(node, lowering), low <= high else { return nil }
      return [Eltwise(dnnl_eltwise_clip, low, high)]
    default: return nil
    }
  }

  /// Bounds of a Clip node, from attributes before opset 11; nil if they are not known yet.
  static func clipBounds(
    _ node: Node, _ lowering: Lowering
  ) throws(HalfstepError) -> (low: Float, high: Float)? {
    var bounds = (low: -Float.greatestFiniteMagnitude, high: Float.greatestFiniteMagnitude)
    if lowering.opset < 11 {
      bounds.low = node.floatAttribute("min") ?? bounds.low
      bounds.high = node.floatAttribute("max") ?? bounds.high
      return bounds
    }
    for index in 1...2 {
      guard let value = try lowering.optionalInput(node, index) else { continue }
      guard value.count == 1 else {
        throw HalfstepError(.shapeMismatch, "input \(index) \(value.shape): expected a scalar")
      }
      guard let tensor = value.constant, tensor.dataType == .float32 else { return nil }
      let bound = try tensor.floats()[0]
      if index == 1 { bounds.low = bound } else { bounds.high = bound }
    }
    return bounds
  }

  typealias ScalarFunction = (Float) -> Float

  /// Functions that oneDNN lacks, computed one element at a time.
  static let scalarFunctions: [String: @Sendable (Node) -> ScalarFunction] =
    [
      "Erf": { _ in { erff($0) } },
      // oneDNN's own logarithm and softplus miss up to 1.4e-6 near zero results.
      "Log": { _ in { logf($0) } },
      "Softplus": { _ in { max($0, 0) + log1pf(expf(-abs($0))) } },
      "Reciprocal": { _ in { 1 / $0 } },
      "Floor": { _ in { floorf($0) } },
      "Ceil": { _ in { ceilf($0) } },
      "Round": { _ in { rintf($0) } },
      "Sign": { _ in { $0 > 0 ? 1 : $0 < 0 ? -1 : $0 } },
      "Sin": { _ in { sinf($0) } },
      "Cos": { _ in { cosf($0) } },
      "Tan": { _ in { tanf($0) } },
      "Atan": { _ in { atanf($0) } },
      "Asin": { _ in { asinf($0) } },
      "Acos": { _ in { acosf($0) } },
      "Sinh": { _ in { sinhf($0) } },
      "Cosh": { _ in { coshf($0) } },
      "Asinh": { _ in { asinhf($0) } },
      "Acosh": { _ in { acoshf($0) } },
      "Atanh": { _ in { atanhf($0) } },
      "Softsign": { _ in { $0 / (1 + abs($0)) } },
      "Selu": { node in
        let alpha = node.floatAttribute("alpha") ?? 1.67326319217681884765625
        let gamma = node.floatAttribute("gamma") ?? 1.05070102214813232421875
        return { $0 > 0 ? gamma * $0 : gamma * (alpha * expf($0) - alpha) }
      },
      "Celu": { node in
        let alpha = node.floatAttribute("alpha") ?? 1
        return { max(0, $0) + min(0, alpha * (expf($0 / alpha) - 1)) }
      },
      "ThresholdedRelu": { node in
        let alpha = node.floatAttribute("alpha") ?? 1
        return { $0 > alpha ? $0 : 0 }
      },
      "Shrink": { node in
        let bias = node.floatAttribute("bias") ?? 0
        let lambda = node.floatAttribute("lambd") ?? 0.5
        return { $0 < -lambda ? $0 + bias : $0 > lambda ? $0 - bias : 0 }
      },
    ]
}

extension Lowering {
  fileprivate func activation(_ node: Node) throws(HalfstepError) -> Value {
    let value = try input(node, 0)
    if !value.isFloat { return try integerFunction(node, value) }
    guard let functions = try Activation.functions(of: node, self) else {
      return try clip(node, value)
    }
    var result = value
    for function in functions { result = try eltwise(function, result) }
    return result
  }

  fileprivate func scalarFunction(_ node: Node) throws(HalfstepError) -> Value {
    guard let function = Activation.scalarFunctions[node.opType] else {
      throw HalfstepError(.unsupportedOperator, "operator \(node.opType) is not supported")
    }
    return try map(node.opType, floatInput(node, 0), function(node))
  }

  fileprivate func parametricRelu(_ node: Node) throws(HalfstepError) -> Value {
    let value = try floatInput(node, 0)
    let slope = try floatInput(node, 1)
    // The slope broadcasts to the input, never the other way.
    guard try ShapeRules.broadcast([value.shape, slope.shape]) == value.shape else {
      throw HalfstepError(
        .shapeMismatch, "slope \(slope.shape) does not broadcast to \(value.shape)")
    }
    return try arithmetic(.parametricRelu, value, slope)
  }

  /// Appends one of oneDNN's functions, in whatever layout the data has.
  func eltwise(_ function: Eltwise, _ given: Value) throws(HalfstepError) -> Value {
    var value = given
    if value.count == 0 { return value }
    // With padding, oneDNN has only slow code for functions that move 0.
    if value.paddingZeros > 0, !function.preservesZero { value = try plain(value) }
    // Row-major data is a vector: any rank will do.
    let layout: MemoryDescriptor
    if let own = value.layout { layout = own } else { layout = try MemoryDescriptor([value.count]) }
    var operation = dnnl_eltwise_desc_t()
    let status = withUnsafePointer(to: layout.raw) {
      dnnl_eltwise_forward_desc_init(
        &operation, dnnl_forward_inference, function.algorithm, $0, function.alpha, function.beta)
    }
    try Engine.check(status, "describing an elementwise function")
    guard
      let descriptor = try PrimitiveDescriptor(
        operation: &operation, attributes: PrimitiveAttributes())
    else { throw HalfstepError(.internalError, "oneDNN has no such elementwise function") }
    let result = try makeValue(value.shape, layout: value.layout)
    try emit(
      descriptor, label: "eltwise", [(DNNL_ARG_SRC, layout, value.buffer)],
      [(DNNL_ARG_DST, layout, result.buffer)], inPlace: (value.buffer, result.buffer))
    return result
  }

  /// Appends a function that is computed one element at a time.
  func map(
    _ label: String, _ given: Value, _ function: @escaping Activation.ScalarFunction
  ) throws(HalfstepError) -> Value {
    let value = given.paddingZeros > 0 && function(0) != 0 ? try plain(given) : given
    let result = try makeValue(value.shape, layout: value.layout)
    let source = value.buffer
    let target = result.buffer
    let count = value.storedCount
    emit(label, reads: [value], writes: [result], inPlace: (value, result)) {
      () throws(HalfstepError) in
      let from = try source.floats
      let to = try target.floats
      Parallel.forEachRange(count, grain: 1 << 13) { _, range in
        for index in range { to[index] = function(from[index]) }
      }
    }
    return result
  }

  /// Clip with bounds that oneDNN does not take: computed ones, or a minimum above the maximum.
  func clip(_ node: Node, _ value: Value) throws(HalfstepError) -> Value {
    var value = value
    if let bounds = try Activation.clipBounds(node, self) {
      return try map("Clip", value) { min(max($0, bounds.low), bounds.high) }
    }
    if let low = try optionalFloatInput(node, 1) { value = try arithmetic(.maximum, value, low) }
    if let high = try optionalFloatInput(node, 2) { value = try arithmetic(.minimum, value, high) }
    return value
  }

  /// The few functions of integers that shape arithmetic and node tests use.
  func integerFunction(_ node: Node, _ value: Value) throws(HalfstepError) -> Value {
    switch node.opType {
    case "Neg":
      let zero = try Conversion.convert(
        Tensor(elements: [Int64(0)], .int64, shape: []), to: value.dataType)
      return try arithmetic(.subtract, Value(constant: zero, staticName: nil), value)
    case "Clip":
      var value = value
      if let low = try optionalInput(node, 1) { value = try arithmetic(.maximum, value, low) }
      if let high = try optionalInput(node, 2) { value = try arithmetic(.minimum, value, high) }
      return value
    case "Abs", "Relu":
      let zero = try Conversion.convert(
        Tensor(elements: [Int64(0)], .int64, shape: []), to: value.dataType)
      let constant = Value(constant: zero, staticName: nil)
      if node.opType == "Relu" { return try arithmetic(.maximum, value, constant) }
      return try arithmetic(.maximum, value, arithmetic(.subtract, constant, value))
    default:
      throw HalfstepError(
        .typeMismatch, "input 0: expected float32, got \(value.dataType)")
    }
  }
}
