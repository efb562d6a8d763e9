// SPDX-License-Identifier: Apache-2.0
// Follows channels through a graph and finds which may be scaled.

import HalfstepGraph
import HalfstepNumerics

/// Follows channels through a graph and finds those that may be multiplied by a positive factor when
/// they are written and divided by it when they are read.
///
/// Every output channel of a linear layer gets an identifier. Operators that commute with positive
/// scaling hand identifiers on; Concat strings them together, Flatten repeats them, and additions, if
/// wanted, make those of both operands one. Whatever else reads a channel pins it to factor 1.
struct ChannelTracker {
  /// Where a tensor's channels lie.
  enum Axis {
    case second
    case last
    /// The tensor has rank 2.
    case both
  }

  /// The channels of a tensor.
  struct Channels {
    var ids: [Int]
    var axis: Axis
    /// Whether each channel stands for as many neighboring features as the reader has to say.
    var isFlattened = false
    /// Whether every picture is known to be one pixel.
    var isPixel = false
  }

  /// A layer with the channels that it reads and writes; none if they are unknown.
  struct TrackedLayer {
    let layer: LinearLayer
    let inputs: [Int]?
    let outputs: [Int]
  }

  /// A node that bounds a tensor from above: Clip from 0, or Min with a constant per channel.
  struct Bound {
    let position: Int
    let channels: [Int]
    /// Upper bound of each channel.
    let limits: [Float]
    /// Shape of a constant with one value for each channel.
    let shape: [Int]
    /// Which input of a Min is the constant; nil for Clip.
    let minimumInput: Int?
  }

  private(set) var layers: [TrackedLayer] = []
  private(set) var bounds: [Bound] = []
  private var sets = ChannelSets()
  private var tensors: [String: Channels] = [:]
  private let graph: Graph
  private let index: GraphIndex
  private let acrossAdditions: Bool

  /// Follows the channels of a graph whose nodes are in topological order.
  init(_ graph: Graph, _ index: GraphIndex, acrossAdditions: Bool) {
    self.graph = graph
    self.index = index
    self.acrossAdditions = acrossAdditions
    var biasNodes: Set<Int> = []
    for position in graph.nodes.indices where !biasNodes.contains(position) {
      let node = graph.nodes[position]
      for name in node.capturedInputs { pin(name) }
      if let layer = LinearLayer(graph, at: position, index), !sharesWeight(node) {
        if let add = layer.biasNode { biasNodes.insert(add.position) }
        track(layer, node)
      } else if !pass(position, node) {
        for name in node.inputs { pin(name) }
      }
    }
    for output in graph.outputs { pin(output.name) }
  }

  /// The representative of a channel, or nil if its factor must be 1.
  mutating func variable(_ id: Int) -> Int? {
    sets.reason(id) == nil ? sets.find(id) : nil
  }

  private mutating func pin(_ tensor: String) {
    for id in tensors[tensor]?.ids ?? [] { sets.pin(id) }
  }

  // MARK: Layers

  /// Whether another node reads the same weight, which then must keep its values.
  private func sharesWeight(_ node: Node) -> Bool {
    guard let name = node.input(1) else { return false }
    return index.outputs.contains(name) || (index.uses[name]?.count ?? 0) > 1
  }

  private mutating func track(_ layer: LinearLayer, _ node: Node) {
    var inputs: [Int]?
    if let channels = tensors[layer.input], let ids = expand(channels, layer),
      (node.intAttribute("transA") ?? 0) == 0
    {
      inputs = ids
    } else {
      pin(layer.input)
    }
    let outputs = Array(sets.add(layer.outputChannels))
    let axis: Axis =
      switch layer.kind {
      case .conv, .convTranspose: .second
      case .gemm: .both
      case .matMul: graph.rank(of: layer.input, index) == 2 ? .both : .last
      }
    tensors[layer.output] = Channels(ids: outputs, axis: axis)
    layers.append(TrackedLayer(layer: layer, inputs: inputs, outputs: outputs))
  }

  /// The channel of each of the layer's inputs, or nil if they do not match.
  private func expand(_ channels: Channels, _ layer: LinearLayer) -> [Int]? {
    let count = channels.ids.count
    switch (layer.kind, channels.axis) {
    case (.conv, .second), (.convTranspose, .second), (.gemm, .both), (.matMul, .both),
      (.matMul, .last):
      break
    default: return nil
    }
    if channels.isFlattened {
      guard layer.inputChannels % count == 0 else { return nil }
      let repeats = layer.inputChannels / count
      return channels.ids.flatMap { [Int](repeating: $0, count: repeats) }
    }
    return count == layer.inputChannels ? channels.ids : nil
  }

  // MARK: Other operators

  /// Hands channels on through a node that commutes with positive scaling; false if it does not.
  private mutating func pass(_ position: Int, _ node: Node) -> Bool {
    guard node.domain.isEmpty, let output = node.outputs.first, !output.isEmpty,
      node.outputs.dropFirst().allSatisfy(\.isEmpty), let source = node.input(0)
    else { return false }
    switch node.opType {
    case "Relu", "LeakyRelu", "Identity", "Dropout":
      guard let channels = tensors[source] else { return false }
      tensors[output] = channels
      return true
    case "PRelu":
      guard let channels = tensors[source], !channels.isFlattened,
        let slope = node.input(1), graph.constant(slope, index) != nil
      else { return false }
      tensors[output] = channels
      return true
    case "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool":
      guard var channels = tensors[source], channels.axis == .second else { return false }
      channels.isPixel = node.opType.hasPrefix("Global")
      tensors[output] = channels
      return true
    case "Reshape": return passReshape(node, source, output)
    case "Flatten":
      guard var channels = tensors[source], channels.axis == .second, !channels.isFlattened,
        (node.intAttribute("axis") ?? 1) == 1
      else { return false }
      channels.axis = .both
      channels.isFlattened = true
      tensors[output] = channels
      return true
    case "ReduceMean", "Squeeze": return passSpatialReduction(node, source, output)
    case "Clip", "Min": return passBound(position, node, output)
    case "Concat": return passConcat(node, output)
    case "Add": return passAddition(node, output)
    case "Mul": return passGate(node, output)
    default: return false
    }
  }

  private mutating func passSpatialReduction(
    _ node: Node, _ source: String, _ output: String
  ) -> Bool {
    var axes = node.intsAttribute("axes")
    if let name = node.input(1) {
      axes = graph.constant(name, index).flatMap { try? $0.integers() }
    }
    guard var channels = tensors[source], channels.axis == .second, let axes,
      let rank = graph.rank(of: source, index),
      Set(axes.map { $0 < 0 ? $0 + rank : $0 }) == Set(2..<rank)
    else { return false }
    let keeps = node.opType == "ReduceMean" && (node.intAttribute("keepdims") ?? 1) != 0
    channels.axis = keeps ? .second : .both
    channels.isPixel = keeps
    tensors[output] = channels
    return true
  }

  /// A Reshape that makes rows of pixels, as newer exporters flatten: with one value for each channel,
  /// rows stay apart whatever number of rows the shape asks for.
  private mutating func passReshape(_ node: Node, _ source: String, _ output: String) -> Bool {
    guard var channels = tensors[source], channels.axis == .second, channels.isPixel,
      let name = node.input(1)
    else { return false }
    let count = channels.ids.count
    if let shape = graph.constant(name, index) {
      guard let target = try? shape.integers(), target.count == 2,
        target[1] == count || (target[1] == -1 && target[0] == 0)
      else { return false }
    } else if let declared = graph.valueInfos[output]?.dimensions {
      guard declared.count == 2, declared[1] == .fixed(count) else { return false }
    } else {
      // The reader tells: its weight has as many rows as there are channels, or it is no neighbor.
      let uses = index.uses[output] ?? []
      guard !index.outputs.contains(output),
        uses.allSatisfy({ $0.input == 0 && graph.nodes[$0.node].isOperator("Gemm") })
      else { return false }
    }
    channels.axis = .both
    channels.isPixel = false
    tensors[output] = channels
    return true
  }

  private mutating func passBound(_ position: Int, _ node: Node, _ output: String) -> Bool {
    var slot = 0
    var limit: Float = .infinity
    if node.opType == "Clip" {
      var low: Float?
      if graph.opset < 11 {
        low = node.floatAttribute("min")
        limit = node.floatAttribute("max") ?? .infinity
      } else {
        low = node.input(1).flatMap { graph.constantScalar($0, index) }
        if let name = node.input(2) {
          limit = graph.constantScalar(name, index) ?? .nan
        }
      }
      guard low == 0, limit > 0 else { return false }
    } else {
      guard node.inputs.count == 2 else { return false }
      if tensors[node.inputs[0]] == nil { slot = 1 }
    }
    guard let channels = tensors[node.inputs[slot]], !channels.isFlattened else { return false }
    if node.opType == "Clip", limit == .infinity {
      tensors[output] = channels
      return true
    }
    // Min broadcasts since version 8 of the operator set; the constant needs the tensor's rank.
    guard graph.opset >= 8, channels.axis != .last,
      let rank = graph.rank(of: node.inputs[slot], index), rank >= 2
    else { return false }
    let count = channels.ids.count
    let shape = [1, count] + [Int](repeating: 1, count: rank - 2)
    var limits = [Float](repeating: limit, count: count)
    if node.opType == "Min" {
      guard let constant = graph.constant(node.inputs[1 - slot], index),
        constant.shape.dimensions == shape, let values = try? constant.floats()
      else { return false }
      limits = values
    }
    bounds.append(
      Bound(
        position: position, channels: channels.ids, limits: limits, shape: shape,
        minimumInput: node.opType == "Min" ? 1 - slot : nil))
    tensors[output] = channels
    return true
  }

  private mutating func passConcat(_ node: Node, _ output: String) -> Bool {
    var ids: [Int] = []
    for name in node.inputs {
      guard let channels = tensors[name], channels.axis == .second else { return false }
      ids += channels.ids
    }
    guard node.intAttribute("axis") == 1 else { return false }
    tensors[output] = Channels(ids: ids, axis: .second)
    return true
  }

  private mutating func passAddition(_ node: Node, _ output: String) -> Bool {
    guard acrossAdditions, node.inputs.count == 2, let a = tensors[node.inputs[0]],
      let b = tensors[node.inputs[1]], a.ids.count == b.ids.count, a.axis == b.axis,
      !a.isFlattened, !b.isFlattened
    else { return false }
    for (x, y) in zip(a.ids, b.ids) { sets.join(x, y) }
    tensors[output] = a
    return true
  }

  /// A product with a gate (what a Sigmoid or the like computes): the other operand's factors go on.
  private mutating func passGate(_ node: Node, _ output: String) -> Bool {
    guard node.inputs.count == 2,
      let slot = [0, 1].first(where: { tensors[node.inputs[$0]] != nil }),
      tensors[node.inputs[1 - slot]] == nil, let channels = tensors[node.inputs[slot]],
      channels.axis == .second, channels.ids.count > 1,
      let rank = graph.rank(of: node.inputs[slot], index),
      rank == graph.rank(of: node.inputs[1 - slot], index)
    else { return false }
    tensors[output] = channels
    return true
  }
}
