// SPDX-License-Identifier: Apache-2.0
// Finds the activation function behind a layer.

import HalfstepGraph
import HalfstepNumerics

extension FollowingActivation {
  /// The activation function that alone reads a layer's output; none if there is no such or another.
  package init(behind layer: LinearLayer, _ graph: Graph, _ index: GraphIndex) {
    self = .identity
    guard let use = index.soleUse(of: layer.output), use.input == 0 else { return }
    let node = graph.nodes[use.node]
    func bound(_ input: Int, _ key: String, _ open: Float) -> Float? {
      if let name = node.input(input) { return graph.constantScalar(name, index) }
      return node.floatAttribute(key) ?? open
    }
    guard node.domain.isEmpty else { return }
    switch node.opType {
    case "Relu": self = .relu
    case "Clip":
      if let low = bound(1, "min", -.infinity), let high = bound(2, "max", .infinity),
        low <= high
      {
        self = .clip(low: low, high: high)
      }
    case "LeakyRelu":
      let slope = node.floatAttribute("alpha") ?? 0.01
      self = .slopes([Float](repeating: slope, count: layer.outputChannels))
    case "PRelu":
      guard let name = node.input(1), let values = graph.constant(name, index),
        let slopes = try? values.floats(),
        slopes.count == 1 || Self.isPerChannel(values.shape, layer)
      else { return }
      self = .slopes(
        slopes.count == layer.outputChannels
          ? slopes : [Float](repeating: slopes[0], count: layer.outputChannels))
    case "Sigmoid": self = .sigmoid
    case "Tanh": self = .tanh
    case "HardSwish": self = .hardSwish
    case "HardSigmoid":
      self = .hardSigmoid(
        slope: node.floatAttribute("alpha") ?? 0.2, shift: node.floatAttribute("beta") ?? 0.5)
    default: break
    }
  }

  /// Whether slopes of a shape belong to output channels: the last axis of matrix products, the one
  /// in front of the spatial axes of convolutions.
  private static func isPerChannel(_ shape: Shape, _ layer: LinearLayer) -> Bool {
    guard shape.elementCount == layer.outputChannels else { return false }
    switch layer.kind {
    case .gemm, .matMul: return shape.dimensions.last == layer.outputChannels
    case .conv, .convTranspose:
      // [C, 1, 1] or [1, C, 1, 1].
      return (3...4).contains(shape.rank) && shape[shape.rank - 3] == layer.outputChannels
    }
  }
}
