// SPDX-License-Identifier: Apache-2.0
// Rounds a network's weights layer by layer with a method of choice.

import HalfstepGraph
import HalfstepNumerics
import OrderedCollections

/// Rounds a network's weights layer by layer: each layer sees what the layers rounded before it make
/// of the calibration data, and aims at what the float network computes there.
///
/// Activations of the quantized prefix are on the grids that a simulation of the float network
/// calibrates. The method's result is compared with rounding to nearest on rows that were held out, and
/// the better is kept. The network's function changes; the graph remembers the encodings of the
/// rounded weights (`Graph.weightEncodings`).
package struct LayerReconstruction: Sendable {
  /// What rounding may use.
  package struct Options: Sendable {
    /// Width of weights, 2...16.
    package var parameterBits = 4
    /// Widths of single layers' weights, 2...16, by names or labels of nodes.
    package var layerBits: [String: Int] = [:]
    /// Width of activations in the quantized prefix, 2...16; nil keeps them in float.
    package var activationBits: Int? = 8
    /// Input channels that share a scale in weights that are quantized per channel; nil for all.
    package var parameterBlockSize: Int?
    /// How ranges of weights (rounded to nearest) and activations are chosen.
    package var scheme: RangeScheme = .minMax
    /// What the target quantizes.
    package var configuration: RuntimeConfiguration
    /// Names or labels of nodes that stay in float.
    package var excludedLayers: [String] = []
    /// Rows that a layer learns from at most; rounders may take fewer.
    package var maximumRows = 1 << 15
    /// Rows that validate at most.
    package var heldOutRows = 2048
    /// Bytes of activations in memory; more goes to a temporary file.
    package var maximumBytes = 1 << 26
    /// Whether a method's result gives way to rounding to nearest where that is better.
    package var keepsBetter = true
    /// Whether a layer whose output is added to another tensor aims at the sum, such as the output of a
    /// residual block, instead of at its own output.
    package var targetsSums = false
    /// Decides which rows are drawn.
    package var seed: UInt64 = 0
    /// Whether the graph gets the rounded weights; otherwise only the biases that go with them.
    package var writesWeights = true
    /// Folder in which results of layers are kept, so that a later run resumes; nil for none.
    package var cacheFolder: String?
    /// What candidates for a layer are compared by.
    package var validation: Validation = .layer

    package init(configuration: RuntimeConfiguration) { self.configuration = configuration }
  }

  /// What candidates for a layer are compared by.
  package enum Validation: Hashable, Sendable {
    /// The layer's own output on rows that nothing is learned from.
    case layer
    /// The network's outputs on samples from all over the data, with the layers that are still to come in float, or rounded to nearest
    /// with their activations quantized.
    case outputs(isQuantized: Bool)
  }

  /// How far a run is.
  package struct Progress: Sendable {
    /// Layers that are done.
    package let completed: Int
    package let total: Int
    /// Label of the layer at work.
    package let layer: String
    /// Share of that layer that is done, 0...1.
    package let fraction: Double
    /// About how long the rest will take; nil while too little is done to tell.
    package var secondsLeft: Double?
  }

  /// What became of a layer.
  package struct LayerReport: Sendable {
    /// The node's label.
    package let layer: String
    /// Name of the weight.
    package let weight: String
    package let bits: Int
    /// Noise over signal on held-out data, of what the validation looks at, with weights rounded to
    /// nearest and the bias as it was.
    package let before: Double
    /// Noise over signal of what was kept.
    package let after: Double
    /// What was kept: the method's note, or "nearest".
    package let kept: String
  }

  package struct Report: Sendable {
    package var layers: [LayerReport] = []
    /// Layers whose weights stay in float or were not rounded by the method, with the reason.
    package var skipped: [(layer: String, reason: String)] = []
    package init() {}
  }

  package var options: Options
  package init(options: Options) { self.options = options }

  /// Rounds all layers whose weights the configuration quantizes.
  ///
  /// - Parameters:
  ///   - graph: The float network; unchanged if an error is thrown. Nodes may come out in another,
  ///     equivalent order.
  ///   - batches: Inputs by name, `[N, …]`; the result does not depend on how they are batched.
  ///   - rounder: The method.
  ///   - progress: Told now and then; false cancels.
  /// - Throws: `HalfstepError.cancelled`; `.emptyStatistics` without data; `.nonFiniteValue` for data
  ///   or weights; `.invalidArgument` for options; what `Session` and the method throw.
  @discardableResult
  package func apply(
    to graph: inout Graph, batches: [[String: Tensor]], rounder: some LayerRounder,
    progress: ((Progress) -> Bool)? = nil
  ) throws(HalfstepError) -> Report {
    guard options.maximumRows > 0, options.heldOutRows > 0 else {
      throw HalfstepError(.invalidArgument, "rounding: expected 1 or more rows")
    }
    var source = graph
    try source.validateAndSort()
    let data = try ReconstructionData(batches, for: source)
    var report = Report()
    let simulation = try calibrated(source, data, progress)
    let stops = stops(in: source, simulation, &report)
    let walk = LayerWalk(
      graph: source, quantized: try prefix(source, simulation, except: stops), stops: stops,
      activations: activations(simulation), data: data, maximumBytes: options.maximumBytes,
      rest: try rest(source, simulation))
    var result = source
    var names = NameAllocator(source)
    let cache = try options.cacheFolder.map { (folder) throws(HalfstepError) in
      try RoundingCache(folder: folder)
    }
    // What candidates are compared with belongs to the key, and so do the layers before.
    var network = cache != nil && walk.rest != nil ? try Self.hash(of: source, data) : nil
    let estimate = TimeEstimate(stops.map(\.layer))
    func tell(_ fraction: Double) throws(HalfstepError) {
      guard let progress else { return }
      let label = source.nodes[stops[max(walk.position, 0)].layer.node].label
      let state = Progress(
        completed: max(walk.position, 0), total: stops.count, layer: label, fraction: fraction,
        secondsLeft: estimate.secondsLeft(max(walk.position, 0), fraction))
      if !progress(state) {
        throw HalfstepError(.cancelled, "rounding was cancelled at node '\(label)'", node: label)
      }
    }
    while try walk.advance(progress: { () throws(HalfstepError) in try tell(0) }) {
      let stop = walk.stops[walk.position]
      guard let quantizer = simulation.quantizers[stop.weight], let nearest = quantizer.encoding
      else { throw HalfstepError(.internalError, "rounding: '\(stop.weight)' has no grid") }
      let problem = try LayerProblem(
        walk, spec: quantizer.site.spec, nearest: nearest, options: options, report: tell)
      var entry: RoundingCache.Entry?
      var key: String?
      if cache != nil, let identity = rounder.identity {
        key = try RoundingCache.key(problem, method: identity, network: network)
        if network != nil { network = key }
      }
      if let cache, let key { entry = cache.load(key, for: problem) }
      let known: RoundingCache.Entry
      if let entry {
        known = entry
      } else {
        known = try better(problem, rounder)
        if let cache, let key { try cache.store(key, known) }
      }
      let rounding = known.rounding
      report.layers.append(
        LayerReport(
          layer: problem.node.label, weight: problem.weightName, bits: problem.spec.bits,
          before: known.before, after: known.after, kept: rounding.note))
      let before = names
      for isResult in [false, true] {
        var fresh = before
        func change(_ graph: inout Graph) throws(HalfstepError) {
          try rounding.put(
            into: &graph, stop.layer, stop.weight, walk.index,
            writesWeight: !isResult || options.writesWeights, names: &fresh)
        }
        if isResult { try change(&result) } else { try walk.commit(change) }
        names = fresh
      }
      if options.writesWeights { result.weightEncodings[stop.weight] = rounding.encoding }
    }
    result.checkInvariants()
    graph = result
    return report
  }

  // MARK: Preparation

  /// A simulation of the network with float weights and the activation grids calibrated.
  private func calibrated(
    _ graph: Graph, _ data: ReconstructionData, _ progress: ((Progress) -> Bool)?
  ) throws(HalfstepError) -> QuantizationSimulation {
    var settings = QuantizationSimulation.Options()
    settings.parameterBits = options.parameterBits
    settings.activationBits = options.activationBits ?? 8
    settings.parameterBlockSize = options.parameterBlockSize
    settings.scheme = options.scheme
    settings.excludedLayers = options.excludedLayers
    settings.usesWeightEncodings = false
    let simulation = try QuantizationSimulation(
      graph: graph, configuration: options.configuration, options: settings)
    try simulation.setLayerBits(options.layerBits, in: graph)
    if options.activationBits == nil { return simulation }
    // Ranges of the float network: at few bits, weights rounded to nearest would make them useless.
    let parameters = simulation.quantizers.filter { $1.isEnabled && $1.site.role == .parameter }
    for name in parameters.keys { try simulation.setEnabled(false, for: name) }
    for chunk in data.chunks {
      try simulation.observe(chunk)
      if let progress,
        !progress(Progress(completed: 0, total: 1, layer: "calibration", fraction: 0))
      {
        throw HalfstepError(.cancelled, "rounding was cancelled while calibrating")
      }
    }
    try simulation.computeEncodings()
    for name in parameters.keys { try simulation.setEnabled(true, for: name) }
    return simulation
  }

  /// The layers that the method rounds.
  private func stops(
    in graph: Graph, _ simulation: QuantizationSimulation, _ report: inout Report
  ) -> [LayerWalk.Stop] {
    let index = GraphIndex(graph)
    var stops: [LayerWalk.Stop] = []
    var seen: Set<String> = []
    for position in graph.nodes.indices {
      guard let layer = LinearLayer(graph, at: position, index),
        let name = graph.nodes[position].input(1)
      else { continue }
      let label = graph.nodes[position].label
      guard let quantizer = simulation.quantizers[name], quantizer.isEnabled,
        quantizer.site.role == .parameter
      else {
        report.skipped.append((label, "the configuration does not quantize its weight"))
        continue
      }
      guard seen.insert(name).inserted else {
        report.skipped.append((label, "its weight was rounded for an earlier layer"))
        continue
      }
      stops.append(LayerWalk.Stop(layer: layer, weight: name))
    }
    return stops
  }

  /// The network with all constants rounded to nearest but those that the method rounds.
  private func prefix(
    _ graph: Graph, _ simulation: QuantizationSimulation, except stops: [LayerWalk.Stop]
  ) throws(HalfstepError) -> Graph {
    let own = Set(stops.map(\.weight))
    var rounded: [String: Tensor] = [:]
    for (name, quantizer) in simulation.quantizers where quantizer.isEnabled && !own.contains(name)
    {
      guard let value = simulation.constants[name], let encoding = quantizer.encoding,
        quantizer.site.role == .parameter || options.activationBits != nil
      else { continue }
      rounded[name] = try encoding.fakeQuantize(value)
    }
    return try graph.replacingConstants(rounded)
  }

  /// What runs behind a layer when candidates are compared.
  private func rest(
    _ graph: Graph, _ simulation: QuantizationSimulation
  ) throws(HalfstepError) -> LayerWalk.Rest? {
    switch options.validation {
    case .layer: nil
    case .outputs(isQuantized: false): LayerWalk.Rest(graph: graph, activations: [:])
    case .outputs(isQuantized: true):
      LayerWalk.Rest(
        graph: try prefix(graph, simulation, except: []), activations: activations(simulation))
    }
  }

  private func activations(_ simulation: QuantizationSimulation) -> [String: Encoding] {
    if options.activationBits == nil { return [:] }
    var grids: [String: Encoding] = [:]
    for (name, quantizer) in simulation.quantizers
    where quantizer.isEnabled && quantizer.site.role == .activation && !quantizer.isConstant {
      grids[name] = quantizer.encoding
    }
    return grids
  }

  /// A hash of a network and of the data.
  private static func hash(
    of graph: Graph, _ data: ReconstructionData
  ) throws(HalfstepError) -> String {
    var hash = ContentHash()
    for node in graph.nodes {
      hash.add("\(node.opType) \(node.inputs) \(node.outputs)")
      for name in node.attributes.keys.sorted() {
        if case .tensor(let value)? = node.attributes[name] { hash.add(value) }
        hash.add("\(name) \(String(describing: node.attributes[name]))")
      }
    }
    for name in graph.initializers.keys.sorted() {
      hash.add(name)
      if let value = graph.initializers[name] { hash.add(value) }
    }
    for chunk in data.chunks {
      for name in chunk.keys.sorted() { if let value = chunk[name] { hash.add(value) } }
    }
    return hash.text
  }

  // MARK: One layer

  /// Runs the method and keeps the better of its result and rounding to nearest.
  private func better(
    _ problem: LayerProblem, _ rounder: some LayerRounder
  ) throws(HalfstepError) -> RoundingCache.Entry {
    let plain = try problem.nearest.fakeQuantize(problem.weight)
    var kept = LayerRounding(weight: plain, encoding: problem.nearest, note: "nearest")
    let before = try problem.noise(of: kept)
    var after = before
    let rounding = try rounder.round(problem)
    guard rounding.weight.shape == problem.weight.shape else {
      throw HalfstepError(
        .internalError, "node '\(problem.node.label)': rounding changed the weight's shape")
    }
    let noise =
      if let known = rounding.heldOutNoise { known } else { try problem.noise(of: rounding) }
    if noise <= before || !options.keepsBetter {
      kept = rounding
      after = noise
    }
    return RoundingCache.Entry(rounding: kept, before: before, after: after)
  }
}

extension Graph {
  /// Gives a constant another value, be it an initializer or a Constant node.
  mutating func setConstant(_ name: String, to value: Tensor) {
    if initializers[name] != nil {
      initializers[name] = value
      return
    }
    for position in nodes.indices where nodes[position].isOperator("Constant") {
      if nodes[position].outputs.first == name {
        update(at: position) { $0.attributes = ["value": .tensor(value)] }
      }
    }
  }
}

extension QuantizationSimulation {
  /// Gives the weights of single layers their own widths.
  ///
  /// - Parameter widths: By names or labels of nodes.
  /// - Throws: `HalfstepError.unknownName` for a name that no linear layer has; `.invalidArgument` for
  ///   a width other than 2...16, a layer that is excluded, a weight that the configuration does not
  ///   quantize, or different widths of one weight.
  func setLayerBits(_ widths: [String: Int], in graph: Graph) throws(HalfstepError) {
    if widths.isEmpty { return }
    let index = GraphIndex(graph)
    var left = widths
    var given: [String: (layer: String, bits: Int)] = [:]
    for position in graph.nodes.indices {
      let node = graph.nodes[position]
      guard let bits = widths[node.name] ?? widths[node.label],
        LinearLayer(graph, at: position, index) != nil, let weight = node.input(1)
      else { continue }
      left[node.name] = nil
      left[node.label] = nil
      if options.excludedLayers.contains(node.name) || options.excludedLayers.contains(node.label) {
        throw HalfstepError(
          .invalidArgument,
          "layer widths: layer '\(node.label)' is excluded, so that its weight has no width of \(bits)",
          node: node.label)
      }
      guard quantizers[weight]?.isEnabled == true else {
        throw HalfstepError(
          .invalidArgument,
          "layer widths: the configuration does not quantize the weight of layer '\(node.label)'",
          node: node.label)
      }
      if let (other, width) = given.updateValue((node.label, bits), forKey: weight), width != bits {
        throw HalfstepError(
          .invalidArgument,
          "layer widths: layers '\(other)' and '\(node.label)' share a weight: expected one width,"
            + " got \(width) and \(bits)", node: node.label)
      }
      try setBits(bits, for: weight)
    }
    if let name = left.keys.min() {
      throw HalfstepError(.unknownName, "layer widths: no layer with weights is named '\(name)'")
    }
  }
}
