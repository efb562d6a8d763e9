// SPDX-License-Identifier: Apache-2.0
// Which channels of a network have to go together, and what has to change when they go.

import HalfstepGraph
import HalfstepNumerics

/// Which channels of a network have to go together, and what has to change in its nodes when they go.
///
/// Every output channel of a linear layer gets an identifier. Each tensor has one axis along which its
/// channels lie; operators hand the identifiers on, string them together (Concat), repeat them
/// (Flatten), or make those of several operands one (Add). What cannot do without a channel pins it,
/// with the reason. After `init` all identifiers are representatives.
package struct ChannelDependencies: Sendable {
  /// The channels of a tensor.
  package struct Channels: Sendable {
    /// Axis along which they lie.
    package var axis: Int
    /// The channel of each index along the axis; a channel may occur several times.
    package var ids: [Int]
  }

  /// A linear layer with the channels that it reads and writes.
  package struct Layer: Sendable {
    package let layer: LinearLayer
    /// What messages call the node.
    package let name: String
    /// The channel of each input; nil if they are unknown, and stay.
    package var inputs: [Int]?
    /// The channel of each output.
    package var outputs: [Int]
    /// Whether a group goes as a whole, with its inputs and outputs (depthwise); other groups lose the
    /// same inputs and outputs each.
    package let losesGroups: Bool
  }

  /// What has to change in a node other than a layer's weight and bias.
  enum Edit: Sendable {
    /// A constant operand loses indices along an axis.
    case constant(node: Int, input: Int, axis: Int, ids: [Int])
    /// An entry of a constant shape becomes the number of channels that stay.
    case extent(node: Int, input: Int, entry: Int, ids: [Int])
    /// The parts of a Split become as long as the channels that stay in them.
    case split(node: Int, parts: [[Int]])
    /// Bounds of a Slice move: those of an entry, over the channels of its input.
    case slice(node: Int, entry: Int, ids: [Int], range: Range<Int>)
    /// Indices of a Gather move.
    case gather(node: Int, ids: [Int], indices: [Int])
  }

  package private(set) var layers: [Layer] = []
  var edits: [Edit] = []
  package internal(set) var tensors: [String: Channels] = [:]
  var sets = ChannelSets()
  /// Nodes whose shape operand was seen to follow the channels.
  var checkedExtents: Set<Int> = []
  /// Reasons why channels stay; the empty one belongs to layers that the user ignores.
  private(set) var reasons: [String] = []

  let graph: Graph
  let index: GraphIndex
  /// Shapes of the tensors that some layer depends on.
  let shapes: [String: Shape]
  /// Whether channels stay that are picked by position.
  let keepsPositions: Bool

  /// Follows the channels of a graph.
  ///
  /// - Parameters:
  ///   - graph: Valid and sorted.
  ///   - inputShapes: Shapes of inputs whose extents are open.
  ///   - ignored: Positions of layers that stay as they are.
  ///   - inputKeepers: Positions of layers that keep what they read.
  ///   - keepsPositions: Whether channels stay that Split, Slice and Gather pick by position.
  /// - Throws: What `TensorShapes` throws.
  init(
    _ graph: Graph, inputShapes: [String: Shape], ignored: Set<Int>, inputKeepers: Set<Int> = [],
    keepsPositions: Bool = false
  ) throws(HalfstepError) {
    self.graph = graph
    self.keepsPositions = keepsPositions
    index = GraphIndex(graph)
    shapes = try Self.shapes(graph, index, inputShapes)
    for position in graph.nodes.indices {
      let node = graph.nodes[position]
      for name in node.capturedInputs {
        pin(name, "a subgraph of \(Self.describe(node)) reads them")
      }
      if let layer = LinearLayer(graph, at: position, index) {
        track(layer, node, isIgnored: ignored.contains(position))
        if inputKeepers.contains(position) { pin(layer.input, "") }
      } else if node.inputs.contains(where: { tensors[$0] != nil }), !follow(position, node) {
        for name in node.inputs { pin(name, "\(Self.describe(node)) needs them all") }
      }
    }
    for output in graph.outputs {
      pin(output.name, "they reach the network's output '\(output.name)'")
    }
    checkExtents()
    settle()
  }

  /// Whether a channel, a representative, may go.
  mutating func isFree(_ id: Int) -> Bool { sets.reason(id) == nil }

  /// Why a layer's output channels stay: the reason of the first that does; nil if it is the user's.
  mutating func reason(_ layer: Layer) -> String? { reason(layer.outputs) }

  /// Why channels stay: the reason of the first that does; nil if it is the user's.
  mutating func reason(_ ids: [Int]) -> String? {
    for id in ids {
      if let number = sets.reason(id), !reasons[number].isEmpty { return reasons[number] }
    }
    return nil
  }

  // MARK: Preparation

  /// Shapes of what layers depend on and of what they write. Nothing else can be pruned, and the rest
  /// of the network need not be such that it can run.
  private static func shapes(
    _ graph: Graph, _ index: GraphIndex, _ inputShapes: [String: Shape]
  ) throws(HalfstepError) -> [String: Shape] {
    var isNeeded = [Bool](repeating: false, count: graph.nodes.count)
    for position in graph.nodes.indices where LinearLayer(graph, at: position, index) != nil {
      isNeeded[position] = true
    }
    for position in graph.nodes.indices.reversed() where isNeeded[position] {
      let node = graph.nodes[position]
      for name in node.inputs + node.capturedInputs {
        if let producer = index.producers[name] { isNeeded[producer] = true }
      }
    }
    var wanted: [String] = []
    for position in graph.nodes.indices where isNeeded[position] {
      let node = graph.nodes[position]
      if node.isOperator("Constant") { continue }
      // Optional outputs, such as a mask, are not what shapes are needed for.
      let count = node.opType == "Split" ? node.outputs.count : 1
      wanted += node.outputs.prefix(count).filter { !$0.isEmpty }
    }
    return try TensorShapes.infer(graph, wanted, inputShapes: inputShapes)
  }

  /// Keeps channels whose number is asked for by a node that does not follow them.
  private mutating func checkExtents() {
    for (position, node) in graph.nodes.enumerated() where !checkedExtents.contains(position) {
      let operand = ["Reshape": 1, "Expand": 1, "Resize": 3][node.opType]
      guard node.domain.isEmpty, let operand, let name = node.input(operand) else { continue }
      for entry in shapeEntries(name) ?? [] {
        guard let tensor = followedExtent(entry) else { continue }
        pin(tensor, "\(Self.describe(node)) asks for their number")
      }
    }
  }

  /// Replaces identifiers by representatives.
  private mutating func settle() {
    var sets = self.sets
    func roots(_ ids: [Int]) -> [Int] { ids.map { sets.find($0) } }
    let tracked = layers.map { old in
      var layer = old
      layer.inputs = layer.inputs.map(roots)
      layer.outputs = roots(layer.outputs)
      return layer
    }
    let named = tensors.mapValues { Channels(axis: $0.axis, ids: roots($0.ids)) }
    let changed = edits.map { edit in
      switch edit {
      case .constant(let node, let input, let axis, let ids):
        Edit.constant(node: node, input: input, axis: axis, ids: roots(ids))
      case .extent(let node, let input, let entry, let ids):
        Edit.extent(node: node, input: input, entry: entry, ids: roots(ids))
      case .split(let node, let parts): Edit.split(node: node, parts: parts.map(roots))
      case .slice(let node, let entry, let ids, let range):
        Edit.slice(node: node, entry: entry, ids: roots(ids), range: range)
      case .gather(let node, let ids, let indices):
        Edit.gather(node: node, ids: roots(ids), indices: indices)
      }
    }
    (self.sets, layers, tensors, edits) = (sets, tracked, named, changed)
  }

  // MARK: Pins

  static func describe(_ node: Node) -> String { "node '\(node.label)' (\(node.opType))" }

  private mutating func number(_ reason: String) -> Int {
    if let known = reasons.lastIndex(of: reason) { return known }
    reasons.append(reason)
    return reasons.count - 1
  }

  /// Keeps all channels of a tensor.
  mutating func pin(_ tensor: String, _ reason: String) {
    guard let ids = tensors[tensor]?.ids else { return }
    let number = number(reason)
    for id in ids { sets.pin(id, reason: number) }
  }

  /// New channels that stay.
  mutating func pinned(_ count: Int, _ reason: String) -> [Int] {
    let number = number(reason)
    let ids = Array(sets.add(count))
    for id in ids { sets.pin(id, reason: number) }
    return ids
  }

  // MARK: Layers

  private mutating func track(_ layer: LinearLayer, _ node: Node, isIgnored: Bool) {
    let output = node.outputs[0]
    let layout = layer.layout
    let description = Self.describe(node)
    var inputs: [Int]?
    if let channels = tensors[layer.input], let shape = shapes[layer.input],
      channels.axis == (layer.kind == .matMul ? shape.rank - 1 : 1),
      channels.ids.count == layer.inputChannels, (node.intAttribute("transA") ?? 0) == 0
    {
      inputs = channels.ids
    } else {
      pin(layer.input, "\(description) does not read them one by one")
    }
    let losesGroups =
      layout.groups > 1 && (layout.inputsPerGroup == 1 || layout.outputsPerGroup == 1)
    var outputs: [Int]
    if losesGroups {
      var groups: [Int] = []
      for group in 0..<layout.groups {
        guard let ids = inputs else { break }
        let own = ids[group * layout.inputsPerGroup..<(group + 1) * layout.inputsPerGroup]
        for id in own.dropFirst() { sets.join(own[own.startIndex], id) }
        groups.append(own[own.startIndex])
      }
      if inputs == nil {
        groups = pinned(layout.groups, "each group of \(description) reads inputs that stay")
      }
      outputs = groups.flatMap { [Int](repeating: $0, count: layout.outputsPerGroup) }
    } else {
      let fresh = Array(sets.add(layout.outputsPerGroup))
      outputs = (0..<layout.groups).flatMap { _ in fresh }
      if layout.groups > 1, let ids = inputs {
        for place in layout.inputsPerGroup..<ids.count {
          sets.join(ids[place % layout.inputsPerGroup], ids[place])
        }
      }
    }
    let axis =
      switch layer.kind {
      case .conv, .convTranspose, .gemm: 1
      case .matMul: (shapes[output]?.rank ?? 1) - 1
      }
    tensors[output] = Channels(axis: axis, ids: outputs)
    layers.append(
      Layer(
        layer: layer, name: node.label, inputs: inputs, outputs: outputs, losesGroups: losesGroups))
    if isIgnored {
      pin(output, "")
      pin(layer.input, "")
    } else if sharesWeight(node) {
      pin(output, "\(description) shares its weight with another node")
      pin(layer.input, "\(description) shares its weight with another node")
    } else if shapes[output]?.dimensions.indices.contains(axis) != true {
      pin(output, "the shape that \(description) writes is not known")
    }
  }

  /// Whether another node reads the same weight or bias, or the network hands it out.
  private func sharesWeight(_ node: Node) -> Bool {
    node.inputs.dropFirst().contains { name in
      !name.isEmpty && (index.outputs.contains(name) || (index.uses[name]?.count ?? 0) > 1)
    }
  }
}
