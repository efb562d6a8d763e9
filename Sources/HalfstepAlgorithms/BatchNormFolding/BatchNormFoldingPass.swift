// SPDX-License-Identifier: Apache-2.0
// The state of one batch-norm folding: a copy of the graph on its way.

import HalfstepGraph
import HalfstepNumerics

/// One run of batch-norm folding over a copy of a graph.
///
/// Nodes are removed at the end only, so that positions, and with them the index, stay good.
struct BatchNormFoldingPass {
  private(set) var folds: [BatchNormFolding.Fold] = []
  private var graph: Graph
  private let index: GraphIndex
  private var names: NameAllocator
  /// Identifiers of batch norms that are folded.
  private var removed: Set<Int> = []
  private var scalings: WeightScalings = WeightScalings()

  init(_ graph: Graph) {
    self.graph = graph
    index = GraphIndex(graph)
    names = NameAllocator(graph)
  }

  /// Replaces the graph by the one without the folded batch norms; the pass is empty afterwards.
  mutating func finish(_ original: inout Graph) throws(HalfstepError) {
    graph.removeNodes { removed.contains($0.id) }
    graph.removeUnusedConstants()
    try scalings.finish(&original, with: &graph)
  }

  // MARK: Layer, then batch norm

  mutating func foldBackward() throws(HalfstepError) {
    for position in graph.nodes.indices {
      guard let layer = LinearLayer(graph, at: position, index), takesBatchNormBehind(layer) else {
        continue
      }
      // Several batch norms in a row fold one after another.
      var output = layer.output
      var scale = [Double](repeating: 1, count: layer.outputChannels)
      var shift = [Double](repeating: 0, count: layer.outputChannels)
      var last: BatchNormParameters?
      while let use = index.soleUse(of: output), use.input == 0,
        let norm = try BatchNormParameters(graph, at: use.node, index)
      {
        let node = graph.nodes[use.node]
        guard norm.scale.count == layer.outputChannels else {
          throw HalfstepError(
            .shapeMismatch,
            "node '\(node.label)' scale [\(norm.scale.count)]: expected [\(layer.outputChannels)], "
              + "the channels of '\(graph.nodes[position].label)'", node: node.label)
        }
        for channel in scale.indices {
          scale[channel] *= norm.scale[channel]
          shift[channel] = shift[channel] * norm.scale[channel] + norm.shift[channel]
        }
        folds.append(
          .init(layer: graph.nodes[position].label, batchNorm: node.label, isForward: false))
        removed.insert(node.id)
        output = node.outputs[0]
        last = norm
      }
      guard let last else { continue }

      let bias = try layer.bias(in: graph, index)
      var newBias: [Double] = []
      for channel in bias.indices {
        newBias.append(bias[channel] * scale[channel] + shift[channel])
      }
      try store(layer, outputFactors: scale, inputFactors: nil, bias: newBias)
      let writer = layer.biasNode?.position ?? position
      graph.valueInfos[layer.output] = nil
      graph.update(at: writer) { $0.outputs[0] = output }
      graph.foldedBatchNorms[layer.output] = nil
      graph.foldedBatchNorms[output] = FoldedBatchNorm(gamma: last.gamma, beta: last.beta)
    }
  }

  /// Whether the layer's output channels are the batch norm's and AIMET's rules allow the fold.
  private func takesBatchNormBehind(_ layer: LinearLayer) -> Bool {
    switch layer.kind {
    case .conv, .gemm: true
    case .convTranspose: layer.layout.groups == 1 || layer.layout.groups == layer.inputChannels
    // Batch norm works on axis 1, MatMul's channels are on the last one.
    case .matMul: graph.rank(of: layer.input, index) == 2
    }
  }

  // MARK: Batch norm, then layer

  mutating func foldForward() throws(HalfstepError) {
    for position in graph.nodes.indices {
      guard let layer = LinearLayer(graph, at: position, index), takesBatchNormBefore(layer) else {
        continue
      }
      var reader = position
      var repeats = 1
      if layer.kind == .gemm || layer.kind == .matMul,
        let source = index.producers[layer.input], index.soleUse(of: layer.input)?.input == 0,
        let before = graph.nodes[source].input(0), graph.nodes[source].domain.isEmpty
      {
        let norm = index.producers[before].flatMap {
          try? BatchNormParameters(graph, at: $0, index)
        }
        if let norm, let count = flattening(at: source, channels: norm.scale.count, layer) {
          reader = source
          repeats = count
        }
      }
      while let tensor = graph.nodes[reader].input(0), let source = index.producers[tensor],
        !removed.contains(graph.nodes[source].id), index.soleUse(of: tensor)?.input == 0,
        let norm = try BatchNormParameters(graph, at: source, index)
      {
        let node = graph.nodes[source]
        guard norm.scale.count * repeats == layer.inputChannels, let before = node.input(0) else {
          throw HalfstepError(
            .shapeMismatch,
            "node '\(node.label)' scale [\(norm.scale.count)]: expected "
              + "[\(layer.inputChannels / repeats)], the input channels of "
              + "'\(graph.nodes[position].label)'", node: node.label)
        }
        let scale = norm.scale.flatMap { [Double](repeating: $0, count: repeats) }
        let shift = norm.shift.flatMap { [Double](repeating: $0, count: repeats) }
        let alpha = Double(graph.nodes[position].floatAttribute("alpha") ?? 1)
        let weight = try scalings.weight(of: layer, in: graph, index)
        let added = try layer.layout.response(weight, to: shift)
        let bias = try layer.bias(in: graph, index)
        var newBias: [Double] = []
        for channel in bias.indices { newBias.append(bias[channel] + alpha * added[channel]) }
        try store(layer, outputFactors: nil, inputFactors: scale, bias: newBias)
        graph.update(at: reader) { $0.inputs[0] = before }
        folds.append(
          .init(layer: graph.nodes[position].label, batchNorm: node.label, isForward: true))
        removed.insert(node.id)
      }
    }
  }

  /// Whether AIMET's rules allow the layer to take in the batch norm before it.
  private func takesBatchNormBefore(_ layer: LinearLayer) -> Bool {
    let node = graph.nodes[layer.node]
    switch layer.kind {
    case .convTranspose: return false
    case .conv:
      let padding = node.stringAttribute("auto_pad") ?? "NOTSET"
      return layer.layout.groups == 1 && (padding == "NOTSET" || padding == "VALID")
        && (node.intsAttribute("pads") ?? []).allSatisfy { $0 == 0 }
    case .gemm: return (node.intAttribute("transA") ?? 0) == 0
    case .matMul: return graph.rank(of: layer.input, index) == 2
    }
  }

  /// How many of the layer's inputs each channel before a Flatten-like node becomes; nil if the node is
  /// none, or is not known to keep rows apart.
  private func flattening(at position: Int, channels: Int, _ layer: LinearLayer) -> Int? {
    let node = graph.nodes[position]
    guard channels > 0, layer.inputChannels % channels == 0 else { return nil }
    let repeats = layer.inputChannels / channels
    switch node.opType {
    case "Flatten":
      return (node.intAttribute("axis") ?? 1) == 1 ? repeats : nil
    case "Reshape":
      guard let shape = node.input(1).flatMap({ graph.constant($0, index) }),
        let target = try? shape.integers(), target.count == 2,
        target[1] == -1 || target[1] == layer.inputChannels
      else { return nil }
      // 0 keeps the first extent, so that what is left belongs to one row.
      let keepsRows = target[0] == 0 && (node.intAttribute("allowzero") ?? 0) == 0
      return keepsRows || spatialExtent(of: node.inputs[0]) == repeats ? repeats : nil
    case "Squeeze":
      var axes = node.intsAttribute("axes")
      if let name = node.input(1) {
        axes = graph.constant(name, index).flatMap { try? $0.integers() }
      }
      // Which axes negative numbers mean depends on the rank; the last two are never 0 or 1 here,
      // because the layer behind has rank 2 and the batch norm before has rank 3 or 4.
      guard let axes, !axes.isEmpty, axes.allSatisfy({ $0 >= 2 || ($0 < 0 && -$0 <= axes.count) })
      else { return nil }
      return repeats == 1 ? 1 : nil
    default: return nil
    }
  }

  /// Product of a tensor's declared extents behind the channels, or nil.
  private func spatialExtent(of tensor: String) -> Int? {
    guard let dimensions = graph.valueInfos[tensor]?.dimensions, dimensions.count >= 2 else {
      return nil
    }
    var product = 1
    for dimension in dimensions.dropFirst(2) {
      guard case .fixed(let extent) = dimension else { return nil }
      let (next, overflow) = product.multipliedReportingOverflow(by: extent)
      if overflow { return nil }
      product = next
    }
    return product
  }

  // MARK: Both

  /// Scales the layer's weight and sets its bias.
  private mutating func store(
    _ layer: LinearLayer, outputFactors: [Double]?, inputFactors: [Double]?, bias: [Double]
  ) throws(HalfstepError) {
    let label = graph.nodes[layer.node].label
    let floats = bias.map { Float($0) }
    if let channel = floats.firstIndex(where: { !$0.isFinite }) {
      throw HalfstepError(
        .nonFiniteValue, "node '\(label)' bias: channel \(channel) becomes \(floats[channel])",
        node: label)
    }
    do {
      let waits = try scalings.add(
        layer, in: graph, index, outputFactors: outputFactors, inputFactors: inputFactors)
      if !waits {
        let weight = try layer.layout.scaled(
          scalings.weight(of: layer, in: graph, index), outputFactors: outputFactors,
          inputFactors: inputFactors)
        scalings.remove(layer, in: graph)
        layer.setWeight(weight, in: &graph, index, names: &names)
      }
    } catch {
      throw HalfstepError(error.code, "node '\(label)' \(error.message)", node: label)
    }
    try layer.setBias(floats, in: &graph, index, names: &names)
  }

  // MARK: The rest

  /// Gives batch norms that stay mean 0 and variance 1, with epsilon canceled.
  mutating func rewriteRemaining() throws(HalfstepError) {
    for position in graph.nodes.indices where !removed.contains(graph.nodes[position].id) {
      guard let norm = try BatchNormParameters(graph, at: position, index) else { continue }
      let node = graph.nodes[position]
      let correction = (1 + norm.epsilon).squareRoot()
      let count = norm.scale.count
      let values: [[Float]] = [
        norm.scale.map { Float($0 * correction) }, norm.shift.map { Float($0) },
        [Float](repeating: 0, count: count), [Float](repeating: 1, count: count),
      ]
      guard (values[0] + values[1]).allSatisfy(\.isFinite) else {
        throw HalfstepError(
          .nonFiniteValue, "node '\(node.label)': scale and shift overflow", node: node.label)
      }
      for (slot, value) in values.enumerated() {
        let stem = "\(node.name.isEmpty ? node.outputs[0] : node.name).\(Self.parts[slot])"
        graph.replaceConstant(
          at: position, input: slot + 1, with: try Tensor(value, shape: [count]), index, stem: stem,
          names: &names)
      }
    }
  }

  private static let parts = ["scale", "bias", "mean", "variance"]
}
