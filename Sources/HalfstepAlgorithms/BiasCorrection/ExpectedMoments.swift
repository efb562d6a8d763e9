// SPDX-License-Identifier: Apache-2.0
// Means and variances that channels are expected to have, from batch norms alone.

import HalfstepGraph
import HalfstepNumerics

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// Values of a tensor's channels taken for normal ones that were cut off at two ends.
package struct ChannelMoments: Sendable {
  /// Mean before the cut.
  var center: [Double]
  /// Standard deviation before the cut, 0 or more.
  var deviation: [Double]
  var low: [Double]
  var high: [Double]
  /// Whether each channel stands for as many neighboring features as the reader has to say.
  var isFlattened = false

  var count: Int { center.count }

  init(center: [Double], deviation: [Double]) {
    self.center = center
    self.deviation = deviation
    low = [Double](repeating: -.infinity, count: center.count)
    high = [Double](repeating: .infinity, count: center.count)
  }

  /// Mean and variance of a channel.
  ///
  /// - Reference: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
  ///   Correction", 2019, appendix C. arXiv:1906.04721
  package func moments(_ channel: Int) -> (mean: Double, variance: Double) {
    let (m, s) = (center[channel], deviation[channel])
    let (a, b) = (low[channel], high[channel])
    guard s > 0 else { return (min(max(m, a), b), 0) }
    func density(_ x: Double) -> Double {
      x.isInfinite ? 0 : exp(-x * x / 2) / (2 * Double.pi).squareRoot()
    }
    func below(_ x: Double) -> Double { 0.5 * erfc(-x / 2.0.squareRoot()) }
    let (from, to) = ((a - m) / s, (b - m) / s)
    let (left, right) = (below(from), below(-to))
    let inside = max(1 - left - right, 0)
    let slope = density(from) - density(to)
    var mean = m * inside + s * slope
    var square = (m * m + s * s) * inside + 2 * m * s * slope
    // E(z²) = P + from·φ(from) − to·φ(to), where from and to are finite.
    if a.isFinite {
      mean += a * left
      square += a * a * left + s * s * from * density(from)
    }
    if b.isFinite {
      mean += b * right
      square += b * b * right - s * s * to * density(to)
    }
    return (mean, max(square - mean * mean, 0))
  }

  /// The same, cut off further.
  func clipped(_ bounds: (Int) -> (low: Double, high: Double)) -> ChannelMoments {
    var result = self
    for channel in 0..<count {
      let (a, b) = bounds(channel)
      result.low[channel] = min(max(low[channel], a), b)
      result.high[channel] = max(min(high[channel], b), a)
    }
    return result
  }

  /// A function of the values, taken for normal; by the midpoint rule over ±8 deviations.
  func mapped(_ function: (Double) -> Double) -> ChannelMoments {
    var result = ChannelMoments(center: center, deviation: deviation)
    result.isFlattened = isFlattened
    let steps = 400
    for channel in 0..<count {
      var (weight, sum, squares) = (0.0, 0.0, 0.0)
      for step in 0..<steps {
        let z = (Double(step) + 0.5) * 16 / Double(steps) - 8
        let density = exp(-z * z / 2)
        let x = min(max(center[channel] + z * deviation[channel], low[channel]), high[channel])
        let value = function(x)
        weight += density
        sum += density * value
        squares += density * value * value
      }
      let mean = sum / weight
      result.center[channel] = mean
      result.deviation[channel] = max(squares / weight - mean * mean, 0).squareRoot()
    }
    return result
  }

  /// Means and variances of the features that a layer reads, if their number fits.
  package func inputs(_ features: Int) -> [(mean: Double, variance: Double)]? {
    let own = (0..<count).map(moments)
    if count == features { return own }
    guard isFlattened, count > 0, features % count == 0 else { return nil }
    let repeats = features / count
    return (0..<features).map { own[$0 / repeats] }
  }
}

/// What channels of a network's tensors are expected to hold, without data.
///
/// Behind a folded batch norm channels are taken for normal with its shift and scale; rectifiers and
/// bounds cut them off exactly, other functions are integrated, sums and linear layers add means, and
/// variances as if their parts were independent. Where nothing is known - network inputs, behind
/// operators that are not followed - a tensor has no entry.
package struct ExpectedMoments: Sendable {
  private(set) var tensors: [String: ChannelMoments] = [:]

  /// What a tensor's channels are expected to hold; nil if that is not known.
  package subscript(_ tensor: String) -> ChannelMoments? { tensors[tensor] }

  /// Follows a graph whose nodes are in topological order.
  package init(_ graph: Graph, _ index: GraphIndex) throws(HalfstepError) {
    var biasNodes: Set<Int> = []
    for (position, node) in graph.nodes.enumerated() where !biasNodes.contains(position) {
      guard let output = node.outputs.first, !output.isEmpty else { continue }
      if let layer = LinearLayer(graph, at: position, index) {
        if let bias = layer.biasNode { biasNodes.insert(bias.position) }
        tensors[layer.output] = try Self.output(
          of: layer, graph, index, input: tensors[layer.input])
      } else {
        tensors[output] = follow(node, graph, index)
      }
    }
  }

  // MARK: Layers

  private static func output(
    of layer: LinearLayer, _ graph: Graph, _ index: GraphIndex, input: ChannelMoments?
  ) throws(HalfstepError) -> ChannelMoments? {
    if let norm = graph.foldedBatchNorms[layer.output],
      norm.gamma.count == layer.outputChannels, norm.beta.count == layer.outputChannels
    {
      return ChannelMoments(
        center: norm.beta.map(Double.init), deviation: norm.gamma.map { abs(Double($0)) })
    }
    let layout = layer.layout
    guard let inputs = input?.inputs(layer.inputChannels) else { return nil }
    let weight = try layer.weight(in: graph, index)
    var center = try layer.bias(in: graph, index)
    var variance = [Double](repeating: 0, count: layer.outputChannels)
    let alpha =
      layer.kind == .gemm ? Double(graph.nodes[layer.node].floatAttribute("alpha") ?? 1) : 1
    for group in 0..<layout.groups {
      let matrix = try weight.withFloats { (values) throws(HalfstepError) in
        layout.matrix(of: values, group: group)
      }
      for row in 0..<layout.outputsPerGroup {
        let channel = group * layout.outputsPerGroup + row
        for column in 0..<layout.columns {
          let value = alpha * Double(matrix[row * layout.columns + column])
          let from = inputs[group * layout.inputsPerGroup + column / layout.spatial]
          center[channel] += value * from.mean
          variance[channel] += value * value * from.variance
        }
      }
    }
    guard (center + variance).allSatisfy(\.isFinite) else { return nil }
    return ChannelMoments(center: center, deviation: variance.map { $0.squareRoot() })
  }

  // MARK: Other nodes

  private func follow(_ node: Node, _ graph: Graph, _ index: GraphIndex) -> ChannelMoments? {
    guard node.domain.isEmpty else { return nil }
    let input = node.input(0).flatMap { tensors[$0] }
    func constant(_ slot: Int, _ count: Int) -> [Double]? {
      guard let name = node.input(slot), let tensor = graph.constant(name, index),
        tensor.dataType == .float32, let values = try? tensor.floats(),
        values.count == 1 || values.count == count
      else { return nil }
      return values.count == count
        ? values.map(Double.init) : [Double](repeating: Double(values[0]), count: count)
    }
    func bound(_ slot: Int, _ key: String, _ open: Double) -> Double? {
      if let name = node.input(slot) { return graph.constantScalar(name, index).map(Double.init) }
      return node.floatAttribute(key).map(Double.init) ?? open
    }
    switch node.opType {
    case "Relu": return input?.clipped { _ in (0, .infinity) }
    case "Clip":
      guard let low = bound(1, "min", -.infinity), let high = bound(2, "max", .infinity),
        low <= high
      else { return nil }
      return input?.clipped { _ in (low, high) }
    case "Min", "Max":
      guard node.inputs.count == 2 else { return nil }
      for slot in 0..<2 {
        guard let known = node.input(slot).flatMap({ tensors[$0] }),
          let limits = constant(1 - slot, known.count)
        else { continue }
        let isMinimum = node.opType == "Min"
        return known.clipped { isMinimum ? (-.infinity, limits[$0]) : (limits[$0], .infinity) }
      }
      return nil
    case "LeakyRelu":
      let slope = Double(node.floatAttribute("alpha") ?? 0.01)
      return input?.mapped { $0 < 0 ? slope * $0 : $0 }
    case "Sigmoid": return input?.mapped(Self.sigmoid)
    case "Tanh": return input?.mapped { tanh($0) }
    case "HardSwish": return input?.mapped { $0 * min(max($0 / 6 + 0.5, 0), 1) }
    case "HardSigmoid":
      let slope = Double(node.floatAttribute("alpha") ?? 0.2)
      let shift = Double(node.floatAttribute("beta") ?? 0.5)
      return input?.mapped { min(max(slope * $0 + shift, 0), 1) }
    case "Add": return sum(node, constant)
    case "Mul": return gated(node, graph, index)
    case "BatchNormalization":
      guard let input, let gamma = constant(1, input.count), let beta = constant(2, input.count)
      else { return nil }
      return ChannelMoments(center: beta, deviation: gamma.map { abs($0) })
    case "Identity", "Dropout", "GlobalAveragePool", "AveragePool", "Squeeze": return input
    case "ReduceMean":
      // Over the two axes behind the channels; they are an attribute or an input.
      let given =
        node.intsAttribute("axes")
        ?? node.input(1).flatMap { graph.constant($0, index) }.flatMap { try? $0.integers() }
      guard let axes = given, let rank = node.input(0).flatMap({ graph.rank(of: $0, index) }),
        rank == 4, Set(axes.map { $0 < 0 ? $0 + rank : $0 }) == [2, 3]
      else { return nil }
      return input
    case "Flatten":
      guard var input, (node.intAttribute("axis") ?? 1) == 1 else { return nil }
      input.isFlattened = true
      return input
    case "Concat":
      guard node.intAttribute("axis") == 1 else { return nil }
      var joined = ChannelMoments(center: [], deviation: [])
      for name in node.inputs {
        guard let part = tensors[name], !part.isFlattened else { return nil }
        joined.center += part.center
        joined.deviation += part.deviation
        joined.low += part.low
        joined.high += part.high
      }
      return joined
    default: return nil
    }
  }

  private static func sigmoid(_ x: Double) -> Double { 1 / (1 + exp(-x)) }

  /// Means and variances of a sum add up, as if its parts were independent.
  private func sum(
    _ node: Node, _ constant: (Int, Int) -> [Double]?
  ) -> ChannelMoments? {
    guard node.inputs.count == 2 else { return nil }
    let parts = node.inputs.map { tensors[$0] }
    guard let one = parts[0] ?? parts[1] else { return nil }
    var center = [Double](repeating: 0, count: one.count)
    var variance = center
    for (slot, part) in parts.enumerated() {
      if let part {
        guard part.count == one.count, part.isFlattened == one.isFlattened else { return nil }
        for channel in center.indices {
          let moments = part.moments(channel)
          center[channel] += moments.mean
          variance[channel] += moments.variance
        }
      } else {
        guard let values = constant(slot, one.count) else { return nil }
        for channel in center.indices { center[channel] += values[channel] }
      }
    }
    var result = ChannelMoments(center: center, deviation: variance.map { $0.squareRoot() })
    result.isFlattened = one.isFlattened
    return result
  }

  /// `x · sigmoid(x)` and `x · hardSigmoid(x)`.
  private func gated(_ node: Node, _ graph: Graph, _ index: GraphIndex) -> ChannelMoments? {
    guard node.inputs.count == 2 else { return nil }
    for slot in 0..<2 {
      guard let producer = index.producers[node.inputs[1 - slot]] else { continue }
      let gate = graph.nodes[producer]
      guard gate.inputs.first == node.inputs[slot], let input = tensors[node.inputs[slot]] else {
        continue
      }
      if gate.isOperator("Sigmoid") { return input.mapped { $0 * Self.sigmoid($0) } }
      if gate.isOperator("HardSigmoid") {
        let slope = Double(gate.floatAttribute("alpha") ?? 0.2)
        let shift = Double(gate.floatAttribute("beta") ?? 0.5)
        return input.mapped { $0 * min(max(slope * $0 + shift, 0), 1) }
      }
    }
    return nil
  }
}
