// SPDX-License-Identifier: Apache-2.0
// Functions inside recurrent operators.

import HalfstepGraph
import HalfstepNumerics

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// A function inside a recurrent operator.
enum RecurrentFunction: Sendable {
  case relu, tanh, sigmoid, softsign, softplus
  case affine(Float, Float)
  case leakyRelu(Float)
  case thresholdedRelu(Float)
  case scaledTanh(Float, Float)
  case hardSigmoid(Float, Float)
  case elu(Float)

  /// The value at a point.
  @inline(__always) func callAsFunction(_ x: Float) -> Float {
    switch self {
    case .relu: max(x, 0)
    case .tanh: tanhf(x)
    case .sigmoid: 1 / (1 + expf(-x))
    case .softsign: x / (1 + abs(x))
    case .softplus: max(x, 0) + log1pf(expf(-abs(x)))
    case .affine(let alpha, let beta): alpha * x + beta
    case .leakyRelu(let alpha): x < 0 ? alpha * x : x
    case .thresholdedRelu(let alpha): x > alpha ? x : 0
    case .scaledTanh(let alpha, let beta): alpha * tanhf(beta * x)
    case .hardSigmoid(let alpha, let beta): min(max(alpha * x + beta, 0), 1)
    case .elu(let alpha): x < 0 ? alpha * expm1f(x) : x
    }
  }

  /// The functions of a node, direction by direction.
  ///
  /// Constants in `activation_alpha` and `activation_beta` belong to the functions that take one, in
  /// order.
  ///
  /// - Throws: `HalfstepError.unsupportedOperator` for an unknown name; `.invalidGraph` for too few.
  static func list(
    of node: Node, _ defaults: [String], directions: Int
  ) throws(HalfstepError) -> [[RecurrentFunction]] {
    var names = (0..<directions).flatMap { _ in defaults }
    if case .strings(let given)? = node.attributes["activations"] {
      names = given.map { String(decoding: $0, as: UTF8.self) }
    }
    guard names.count == directions * defaults.count else {
      throw HalfstepError(
        .invalidGraph,
        "activations: expected \(directions * defaults.count) functions, got \(names.count)")
    }
    var alphas = floats(node, "activation_alpha")[...]
    var betas = floats(node, "activation_beta")[...]
    var functions: [RecurrentFunction] = []
    for name in names {
      func alpha(_ value: Float) -> Float { alphas.popFirst() ?? value }
      func beta(_ value: Float) -> Float { betas.popFirst() ?? value }
      switch name.lowercased() {
      case "relu": functions.append(.relu)
      case "tanh": functions.append(.tanh)
      case "sigmoid": functions.append(.sigmoid)
      case "softsign": functions.append(.softsign)
      case "softplus": functions.append(.softplus)
      case "affine": functions.append(.affine(alpha(1), beta(0)))
      case "leakyrelu": functions.append(.leakyRelu(alpha(0.01)))
      case "thresholdedrelu": functions.append(.thresholdedRelu(alpha(1)))
      case "scaledtanh": functions.append(.scaledTanh(alpha(1), beta(1)))
      case "hardsigmoid": functions.append(.hardSigmoid(alpha(0.2), beta(0.5)))
      case "elu": functions.append(.elu(alpha(1)))
      default:
        throw HalfstepError(.unsupportedOperator, "\(node.opType) with function '\(name)'")
      }
    }
    return stride(from: 0, to: functions.count, by: defaults.count).map {
      Array(functions[$0..<$0 + defaults.count])
    }
  }

  private static func floats(_ node: Node, _ key: String) -> [Float] {
    if case .floats(let values)? = node.attributes[key] { return values.map { Float($0) } }
    return []
  }
}
