// SPDX-License-Identifier: Apache-2.0
// The state of one cross-layer equalization: a copy of the graph and the layers' new parameters.

import HalfstepGraph
import HalfstepNumerics

/// One run of cross-layer equalization over a copy of a graph.
///
/// New parameters are collected beside the graph and stored at the end.
struct EqualizationPass {
  /// A layer with its parameters on their way.
  struct LayerState {
    let layer: LinearLayer
    let label: String
    var weight: Tensor
    var bias: [Double]
    var weightChanged = false
    var biasChanged = false
  }

  var report = CrossLayerEqualization.Report()
  var graph: Graph
  let index: GraphIndex
  /// Layers in graph order.
  var layers: [LayerState] = []
  /// Place in `layers` by node position.
  var layerAt: [Int: Int] = [:]
  /// Positions of nodes whose weights are known to be finite.
  private var checked: Set<Int> = []
  /// Bounds that become constants per channel, by node position.
  private var newBounds: [Int: (bound: ChannelTracker.Bound, limits: [Double])] = [:]
  private var scalings: WeightScalings = WeightScalings()
  /// Whether scaled weights are read again, so that scaling cannot wait.
  private let scalesAtOnce: Bool

  init(_ graph: Graph, scalesAtOnce: Bool) {
    self.graph = graph
    self.scalesAtOnce = scalesAtOnce
    index = GraphIndex(graph)
  }

  /// Takes a layer's parameters into the pass; returns its place.
  mutating func add(_ layer: LinearLayer) throws(HalfstepError) -> Int {
    if let place = layerAt[layer.node] { return place }
    layerAt[layer.node] = layers.count
    layers.append(
      LayerState(
        layer: layer, label: graph.nodes[layer.node].label,
        weight: try layer.weight(in: graph, index), bias: try layer.bias(in: graph, index)))
    return layers.count - 1
  }

  // MARK: Our method

  mutating func equalizeUntilConverged(
    _ options: CrossLayerEqualization.Options, _ progress: ((_ completed: Int) -> Bool)?
  ) throws(HalfstepError) {
    var tracker = ChannelTracker(graph, index, acrossAdditions: options.equalizesResiduals)
    let numbering = Numbering(&tracker)
    var solverLayers: [EqualizationSolver.Layer] = []
    var places: [Int] = []
    for (position, tracked) in tracker.layers.enumerated() {
      let place = try add(tracked.layer)
      places.append(place)
      let inputs = numbering.inputs[position]
      let outputs = numbering.outputs[position]
      let takesPart = (inputs + outputs).contains { $0 >= 0 }
      solverLayers.append(
        EqualizationSolver.Layer(
          layout: tracked.layer.layout,
          slices: takesPart ? try slices(place) : try Tensor([], shape: [0]),
          inputs: takesPart ? inputs : [], outputs: takesPart ? outputs : []))
    }
    var solver = EqualizationSolver(
      layers: solverLayers, variableCount: numbering.count,
      activations: options.weighsActivations ? expectedRanges(numbering, tracker.bounds) : nil)
    try solver.solve(
      maximumIterations: options.maximumIterations, tolerance: options.tolerance,
      largestFactor: options.largestFactor, progress: progress)
    report.iterations = solver.iterations
    report.isConverged = solver.isConverged
    func factor(_ variable: Int) -> Double { variable < 0 ? 1 : solver.factors[variable] }

    for position in solverLayers.indices {
      let layer = solverLayers[position]
      try scale(
        places[position], outputs: layer.outputs.map { 1 / factor($0) },
        inputs: layer.inputs.map(factor))
    }
    addSets(solverLayers, factor)
    for (position, bound) in tracker.bounds.enumerated() {
      let factors = numbering.bounds[position].map(factor)
      if factors.contains(where: { $0 != 1 }) {
        newBounds[bound.position] = (bound, zip(bound.limits, factors).map { Double($0) / $1 })
      }
    }
    if options.absorbsHighBiases { try absorbHighBiases(tracker.bounds) }
  }

  /// Numbers the variables that some layer writes and some layer reads.
  private struct Numbering {
    var inputs: [[Int]] = []
    var outputs: [[Int]] = []
    var bounds: [[Int]] = []
    var count = 0

    init(_ tracker: inout ChannelTracker) {
      var isRead: Set<Int> = []
      let layers = tracker.layers
      for layer in layers {
        for id in layer.inputs ?? [] {
          if let variable = tracker.variable(id) { isRead.insert(variable) }
        }
      }
      var numbers: [Int: Int] = [:]
      for layer in layers {
        var outputs: [Int] = []
        for id in layer.outputs {
          guard let variable = tracker.variable(id), isRead.contains(variable) else {
            outputs.append(-1)
            continue
          }
          if numbers[variable] == nil { numbers[variable] = numbers.count }
          outputs.append(numbers[variable] ?? -1)
        }
        self.outputs.append(outputs)
        let count = layer.layer.inputChannels
        self.inputs.append(
          (layer.inputs ?? [Int](repeating: -1, count: count)).map { id in
            id < 0 ? -1 : tracker.variable(id).flatMap { numbers[$0] } ?? -1
          })
      }
      for bound in tracker.bounds {
        bounds.append(
          bound.channels.map { id in tracker.variable(id).flatMap { numbers[$0] } ?? -1 })
      }
      count = numbers.count
    }
  }

  /// The largest value that each variable is expected to reach, from the batch norm that was folded
  /// into the layer that writes it: `β + 3·|γ|` behind a rectifier, or the bound if that is lower, and
  /// `|β| + 3·|γ|` elsewhere. 0 where nothing is known.
  private func expectedRanges(
    _ numbering: Numbering, _ bounds: [ChannelTracker.Bound]
  ) -> [Double] {
    var ranges = [Double](repeating: 0, count: numbering.count)
    let boundAt = Self.byPosition(bounds)
    for (position, state) in layers.enumerated() {
      let outputs = numbering.outputs[position]
      guard let norm = graph.foldedBatchNorms[state.layer.output],
        norm.gamma.count == outputs.count, norm.beta.count == outputs.count
      else { continue }
      let activation = activation(behind: state.layer.output, boundAt)
      for (channel, variable) in outputs.enumerated() where variable >= 0 {
        let (beta, gamma) = (Double(norm.beta[channel]), abs(Double(norm.gamma[channel])))
        var range = activation.isRectified ? max(0, beta + 3 * gamma) : abs(beta) + 3 * gamma
        for bound in activation.bounds { range = min(range, Double(bound.limits[channel])) }
        if range.isFinite { ranges[variable] = range }
      }
    }
    return ranges
  }

  private static func byPosition(
    _ bounds: [ChannelTracker.Bound]
  ) -> [Int: ChannelTracker.Bound] {
    Dictionary(bounds.map { ($0.position, $0) }, uniquingKeysWith: { first, _ in first })
  }

  /// The rectifiers and bounds that a tensor passes before anything else reads it, and their output.
  private func activation(
    behind tensor: String, _ boundAt: [Int: ChannelTracker.Bound]
  ) -> (output: String, isRectified: Bool, bounds: [ChannelTracker.Bound]) {
    var result = (output: tensor, isRectified: false, bounds: [ChannelTracker.Bound]())
    while let use = index.soleUse(of: result.output) {
      let node = graph.nodes[use.node]
      if node.isOperator("Relu") {
        result.isRectified = true
      } else if let bound = boundAt[use.node], use.input != bound.minimumInput {
        if bound.minimumInput == nil { result.isRectified = true }
        result.bounds.append(bound)
      } else {
        break
      }
      result.output = node.outputs[0]
    }
    return result
  }

  /// Reports, for each layer whose output is scaled, who reads that output.
  private mutating func addSets(
    _ solverLayers: [EqualizationSolver.Layer], _ factor: (Int) -> Double
  ) {
    var readers: [Int: [Int]] = [:]
    for (position, layer) in solverLayers.enumerated() {
      for variable in Set(layer.inputs) where variable >= 0 {
        readers[variable, default: []].append(position)
      }
    }
    for (position, layer) in solverLayers.enumerated() {
      let variables = layer.outputs.filter { $0 >= 0 }
      guard !variables.isEmpty else { continue }
      let members = Set(variables.flatMap { readers[$0] ?? [] }).union([position]).sorted()
      report.sets.append(
        .init(
          layers: members.map { layers[$0].label },
          factors: [layer.outputs.map { Float(factor($0)) }]))
    }
  }

  // MARK: Both methods

  /// One value for each kernel slice of a layer that has the slice's largest magnitude.
  mutating func slices(_ place: Int) throws(HalfstepError) -> Tensor {
    let state = layers[place]
    let result = try state.layer.layout.slices(state.weight)
    try expectFinite(result, of: state.weight, state.label)
    checked.insert(state.layer.node)
    return result
  }

  /// Refuses NaN and infinity in layers that nothing was scaled by as well.
  func expectFiniteRest() throws(HalfstepError) {
    for position in graph.nodes.indices {
      guard let layer = LinearLayer(graph, at: position, index) else { continue }
      let label = graph.nodes[position].label
      if !checked.contains(position) {
        let weight = try layer.weight(in: graph, index)
        try expectFinite(weight, of: weight, label)
      }
      let bias = try layer.bias(in: graph, index)
      if let channel = bias.firstIndex(where: { !$0.isFinite }) {
        throw HalfstepError(
          .nonFiniteValue, "node '\(label)' bias: channel \(channel) is \(bias[channel])",
          node: label)
      }
    }
  }

  private func expectFinite(
    _ values: Tensor, of weight: Tensor, _ label: String
  ) throws(HalfstepError) {
    guard try WeightLayout.largestMagnitude(values).isFinite else {
      throw HalfstepError(
        .nonFiniteValue, "node '\(label)' weight \(weight.shape): NaN or infinite", node: label)
    }
  }

  /// Multiplies the weights that write and read channels; the bias and the record of a folded batch
  /// norm follow the outputs.
  mutating func scale(
    _ place: Int, outputs: [Double]?, inputs: [Double]?
  ) throws(HalfstepError) {
    let outputs = outputs.flatMap { $0.contains { $0 != 1 } ? $0 : nil }
    let inputs = inputs.flatMap { $0.contains { $0 != 1 } ? $0 : nil }
    guard outputs != nil || inputs != nil else { return }
    let layer = layers[place].layer
    do {
      var waits = false
      if !scalesAtOnce {
        waits = try scalings.add(
          layer, in: graph, index, outputFactors: outputs, inputFactors: inputs)
      }
      if !waits {
        layers[place].weight = try layer.layout.scaled(
          layers[place].weight, outputFactors: outputs, inputFactors: inputs)
        layers[place].weightChanged = true
      }
    } catch {
      throw HalfstepError(
        error.code, "node '\(layers[place].label)' \(error.message)", node: layers[place].label)
    }
    guard let outputs else { return }
    if layer.hasBias {
      for channel in outputs.indices { layers[place].bias[channel] *= outputs[channel] }
      layers[place].biasChanged = true
    }
    if var norm = graph.foldedBatchNorms[layer.output], norm.gamma.count == outputs.count,
      norm.beta.count == outputs.count
    {
      for channel in outputs.indices {
        norm.gamma[channel] = Float(Double(norm.gamma[channel]) * outputs[channel])
        norm.beta[channel] = Float(Double(norm.beta[channel]) * outputs[channel])
      }
      graph.foldedBatchNorms[layer.output] = norm
    }
  }

  /// Moves amounts from a layer's bias into those of the layers that read it.
  mutating func absorb(
    from place: Int, into readers: [Int], amounts: [Double]
  ) throws(HalfstepError) {
    guard amounts.contains(where: { $0 != 0 }) else { return }
    for channel in amounts.indices { layers[place].bias[channel] -= amounts[channel] }
    layers[place].biasChanged = true
    if var norm = graph.foldedBatchNorms[layers[place].layer.output] {
      for channel in amounts.indices {
        norm.beta[channel] = Float(Double(norm.beta[channel]) - amounts[channel])
      }
      graph.foldedBatchNorms[layers[place].layer.output] = norm
    }
    for reader in readers {
      let node = graph.nodes[layers[reader].layer.node]
      let alpha = Double(node.floatAttribute("alpha") ?? 1)
      let added = try layers[reader].layer.layout.response(layers[reader].weight, to: amounts)
      for channel in added.indices { layers[reader].bias[channel] += alpha * added[channel] }
      layers[reader].biasChanged = true
    }
    report.absorbedBiases.append(
      .init(
        layer: layers[place].label, consumers: readers.map { layers[$0].label },
        amounts: amounts.map { Float($0) }))
  }

  // MARK: High biases, our method

  /// Moves means far above zero into the next layers' biases.
  private mutating func absorbHighBiases(
    _ bounds: [ChannelTracker.Bound]
  ) throws(HalfstepError) {
    let boundAt = Self.byPosition(bounds)
    for place in layers.indices {
      let layer = layers[place].layer
      guard layer.hasBias, let norm = graph.foldedBatchNorms[layer.output],
        norm.beta.count == layer.outputChannels, norm.gamma.count == layer.outputChannels
      else { continue }
      let activation = activation(behind: layer.output, boundAt)
      let isRectified = activation.isRectified
      // Without a rectifier a bound would need the mean to stay below it; nobody builds that.
      guard isRectified || activation.bounds.isEmpty,
        let readers = absorbingReaders(of: activation.output)
      else { continue }
      let limits = activation.bounds.map { bound in
        newBounds[bound.position]?.limits ?? bound.limits.map(Double.init)
      }
      let amounts =
        isRectified ? Self.absorbableAmounts(norm, limits: limits) : norm.beta.map(Double.init)
      try absorb(from: place, into: readers, amounts: amounts)
      guard amounts.contains(where: { $0 != 0 }) else { continue }
      for (bound, limits) in zip(activation.bounds, limits) {
        newBounds[bound.position] = (bound, zip(limits, amounts).map { $0 - $1 })
      }
    }
  }

  /// What to take from each channel so that the largest value of the tensor becomes as small as it can.
  ///
  /// A channel stays above c = β − 3·|γ| and below u = β + 3·|γ| or its bound, by the paper's
  /// assumption. The tensor's largest value cannot fall below T = max(u − c); a channel gives up no more
  /// than it takes to come down to T, since each amount costs exactness and only the largest counts.
  private static func absorbableAmounts(
    _ norm: FoldedBatchNorm, limits: [[Double]]
  ) -> [Double] {
    var lower: [Double] = []
    var upper: [Double] = []
    for channel in norm.beta.indices {
      let (beta, gamma) = (Double(norm.beta[channel]), abs(Double(norm.gamma[channel])))
      let bound = limits.reduce(Double.infinity) { min($0, $1[channel]) }
      upper.append(max(0, min(beta + 3 * gamma, bound)))
      lower.append(min(max(0, beta - 3 * gamma), upper[channel]))
    }
    let target = zip(upper, lower).reduce(0) { max($0, $1.0 - $1.1) }
    return zip(upper, lower).map { min($1, max(0, $0 - target)) }
  }

  /// The layers that read a tensor if all its readers are layers that can take a constant into their
  /// bias exactly, or nil.
  private func absorbingReaders(of tensor: String) -> [Int]? {
    guard !index.outputs.contains(tensor), let uses = index.uses[tensor] else { return nil }
    var readers: [Int] = []
    for use in uses {
      guard use.input == 0, let place = layerAt[use.node] else { return nil }
      let layer = layers[place].layer
      let node = graph.nodes[use.node]
      guard layer.input == tensor else { return nil }
      switch layer.kind {
      case .conv:
        let padding = node.stringAttribute("auto_pad") ?? "NOTSET"
        guard padding == "NOTSET" || padding == "VALID",
          (node.intsAttribute("pads") ?? []).allSatisfy({ $0 == 0 })
        else { return nil }
      case .gemm: guard (node.intAttribute("transA") ?? 0) == 0 else { return nil }
      case .matMul: guard layer.hasBias else { return nil }
      // Where kernels overlap, and at the border, the kernel's sum is not what a constant adds.
      case .convTranspose: return nil
      }
      readers.append(place)
    }
    return readers.isEmpty ? nil : readers
  }

  // MARK: Storing

  /// Replaces the graph by the one with the new parameters; the pass is empty afterwards.
  mutating func finish(_ original: inout Graph) throws(HalfstepError) {
    var names = NameAllocator(graph)
    for state in layers {
      if state.biasChanged {
        let bias = state.bias.map { Float($0) }
        if let channel = bias.firstIndex(where: { !$0.isFinite }) {
          throw HalfstepError(
            .nonFiniteValue, "node '\(state.label)' bias: channel \(channel) is \(bias[channel])",
            node: state.label)
        }
        try state.layer.setBias(bias, in: &graph, index, names: &names)
      }
      if state.weightChanged {
        state.layer.setWeight(state.weight, in: &graph, index, names: &names)
      }
    }
    // From the last to the first, since each may insert a node behind its position.
    for position in newBounds.keys.sorted(by: >) {
      guard let (bound, limits) = newBounds[position] else { continue }
      try store(bound, limits, &names)
    }
    report.channelBounds.reverse()
    graph.removeUnusedConstants()
    layers = []
    try scalings.finish(&original, with: &graph)
  }

  /// Makes a node bound each channel by its own limit.
  private mutating func store(
    _ bound: ChannelTracker.Bound, _ limits: [Double], _ names: inout NameAllocator
  ) throws(HalfstepError) {
    let node = graph.nodes[bound.position]
    let constant = try Tensor(limits.map { Float($0) }, shape: bound.shape)
    report.channelBounds.append(node.label)
    if let slot = bound.minimumInput {
      graph.replaceConstant(
        at: bound.position, input: slot, with: constant, index, stem: node.inputs[slot],
        names: &names)
      return
    }
    let output = node.outputs[0]
    let rectified = names.fresh("\(output).relu")
    let limit = names.fresh("\(output).bound")
    graph.initializers[limit] = constant
    graph.update(at: bound.position) { node in
      node.opType = "Relu"
      node.inputs = [node.inputs[0]]
      node.outputs = [rectified]
      node.attributes = [:]
    }
    graph.insert(
      Node(
        name: node.name.isEmpty ? "" : "\(node.name).bound", opType: "Min",
        inputs: [rectified, limit], outputs: [output]), at: bound.position + 1)
  }
}
