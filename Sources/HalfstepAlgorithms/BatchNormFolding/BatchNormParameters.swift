// SPDX-License-Identifier: Apache-2.0
// The constants of a batch norm, as the scale and shift that they amount to.

import HalfstepGraph
import HalfstepNumerics

/// The constants of a batch norm in inference, `[C]` each.
struct BatchNormParameters {
  let gamma: [Float]
  let beta: [Float]
  let epsilon: Double
  /// gamma / √(variance + epsilon).
  let scale: [Double]
  /// beta − mean · scale: the batch norm computes `scale · x + shift`.
  let shift: [Double]

  /// Reads a batch norm, or nil if it is another operator, in training mode, has parameters that are
  /// computed or not float32, or normalizes every activation on its own (`spatial = 0`).
  ///
  /// - Throws: `HalfstepError.shapeMismatch` for parameters of unequal length; `.nonFiniteValue` for
  ///   NaN, infinity or a negative variance.
  init?(_ graph: Graph, at position: Int, _ index: GraphIndex) throws(HalfstepError) {
    let node = graph.nodes[position]
    guard node.isOperator("BatchNormalization"), node.inputs.count == 5,
      (node.intAttribute("training_mode") ?? 0) == 0, (node.intAttribute("spatial") ?? 1) != 0,
      node.outputs.dropFirst().allSatisfy(\.isEmpty)
    else { return nil }
    var values: [[Float]] = []
    for slot in 1...4 {
      guard let name = node.input(slot), let tensor = graph.constant(name, index),
        tensor.dataType == .float32
      else { return nil }
      values.append(try tensor.floats())
      let what = ["scale", "bias", "mean", "variance"][slot - 1]
      guard tensor.shape.rank == 1, tensor.count == values[0].count else {
        throw HalfstepError(
          .shapeMismatch,
          "node '\(node.label)' \(what) \(tensor.shape): expected [\(values[0].count)]",
          node: node.label)
      }
      if let channel = values[slot - 1].firstIndex(where: { !$0.isFinite }) {
        throw HalfstepError(
          .nonFiniteValue,
          "node '\(node.label)' \(what): channel \(channel) is \(values[slot - 1][channel])",
          node: node.label)
      }
    }
    let epsilon = Double(node.floatAttribute("epsilon") ?? 1e-5)
    if let channel = values[3].firstIndex(where: { $0 < 0 || !(Double($0) + epsilon > 0) }) {
      throw HalfstepError(
        .nonFiniteValue,
        "node '\(node.label)' variance: channel \(channel) is \(values[3][channel]), "
          + "expected a positive value with epsilon \(epsilon)", node: node.label)
    }
    gamma = values[0]
    beta = values[1]
    self.epsilon = epsilon
    var scale: [Double] = []
    var shift: [Double] = []
    for channel in values[0].indices {
      scale.append(Double(values[0][channel]) / (Double(values[3][channel]) + epsilon).squareRoot())
      shift.append(Double(values[1][channel]) - Double(values[2][channel]) * scale[channel])
    }
    self.scale = scale
    self.shift = shift
  }
}
