// SPDX-License-Identifier: Apache-2.0
// Takes channels out of a network: which units it has, what they cost, and the result.

import HalfstepGraph
import HalfstepNumerics
import Synchronization

/// Takes channels out of a network, as often as wanted; the network itself never changes.
///
/// Sizes are numbers of channels that a unit keeps.
struct ChannelPruner: Sendable {
  let graph: Graph
  let costs: ModelCosts
  let metric: CostMetric
  let importance: ChannelImportance
  /// Whether layers are fitted to the channels that are left.
  let reconstructs: Bool
  let dependencies: ChannelDependencies
  let units: [ChannelUnit]
  let refusals: [CompressionRefusal]
  private var rankings = Rankings()

  /// Finds out what can be pruned.
  ///
  /// - Parameters:
  ///   - graph: Valid and sorted.
  ///   - costs: Its costs.
  ///   - ignored: Positions in `costs.layers` of layers that stay as they are.
  ///   - inputKeepers: Positions of layers that keep what they read.
  init(
    _ graph: Graph, _ costs: ModelCosts, _ options: CompressionOptions, ignored: Set<Int>,
    inputKeepers: Set<Int>
  ) throws(HalfstepError) {
    self.graph = graph
    self.costs = costs
    metric = options.metric
    importance = options.importance
    reconstructs = options.reconstructs
    var dependencies = try ChannelDependencies(
      graph, inputShapes: options.inputShapes, ignored: Set(ignored.map { costs.layers[$0].node }),
      inputKeepers: Set(inputKeepers.map { costs.layers[$0].node }),
      keepsPositions: options.keepsPositions)
    let units = ChannelUnit.all(in: dependencies).filter { $0.channels.count > 1 }
    let writers = Set(units.flatMap(\.writers))
    var refusals: [CompressionRefusal] = []
    for (position, layer) in dependencies.layers.enumerated() where !writers.contains(position) {
      // Depthwise layers follow the unit that they read.
      if ignored.contains(position) || layer.losesGroups { continue }
      var reason = dependencies.reason(layer)
      if reason == nil, layer.outputs.allSatisfy({ dependencies.isFree($0) }) {
        reason = "there is only one of them"
      }
      guard let reason else { continue }
      refusals.append(
        CompressionRefusal(
          layer: layer.name, reason: "node '\(layer.name)': its output channels stay: \(reason)"))
    }
    self.dependencies = dependencies
    self.units = units
    self.refusals = refusals
  }

  /// What units look like from outside: each by the first layer that writes it.
  var layers: [CompressibleLayer] {
    units.map { unit in
      let cost = costs.layers[unit.writers[0]]
      return CompressibleLayer(
        name: cost.name, operatorType: cost.operatorType, weight: cost.weight, cost: cost.cost,
        maximumUnits: unit.channels.count)
    }
  }

  /// The unit that a layer, a position in `costs.layers`, writes.
  func unit(writtenBy layer: Int) -> Int? { units.firstIndex { $0.writers.contains(layer) } }

  /// The units of which a layer, a position in `costs.layers`, reads channels, ascending.
  ///
  /// - Throws: `HalfstepError.unsupportedOperator` with the reason if it loses none.
  func units(readBy layer: Int) throws(HalfstepError) -> [Int] {
    let found = units.indices.filter { units[$0].readers.contains(layer) }
    if !found.isEmpty { return found }
    let item = dependencies.layers[layer]
    var dependencies = dependencies
    var reason = "it reads no layer's channels one by one"
    if item.losesGroups {
      reason = "it keeps as many groups as it reads: name the layers around it"
    } else if let inputs = item.inputs {
      reason = dependencies.reason(inputs) ?? "they were to stay, or there is only one of them"
    }
    throw HalfstepError(
      .unsupportedOperator, "layer '\(item.name)': its input channels stay: \(reason)",
      node: item.name)
  }

  /// Number of channels for a ratio in (0, 1), rounded down; at least 1.
  func size(_ unit: Int, ratio: Double) -> Int {
    // A hundred units in the last place: 0.1 · n is not exact.
    let wanted = Double(units[unit].channels.count) * ratio * (1 + 2e-14)
    return max(1, min(Int(wanted.rounded(.down)), units[unit].channels.count))
  }

  // MARK: Data

  /// Rankings and the error of each size; kept until `forget`.
  func ranked(
    _ data: ReconstructionData?, _ progress: (Double) throws(HalfstepError) -> Void = { _ in }
  ) throws(HalfstepError) -> [ChannelRanking] {
    if let known = rankings.values { return known }
    let found = try ChannelRanking.all(dependencies, units, importance, data, progress)
    rankings.values = found
    return found
  }

  /// Forgets rankings: there is other data.
  mutating func forget() { rankings = Rankings() }

  // MARK: Costs

  /// Which channels go, by representative.
  func removal(_ sizes: [Int?], _ rankings: [ChannelRanking]) -> ChannelRemoval {
    var isRemoved = [Bool](repeating: false, count: dependencies.sets.count)
    for (unit, size) in sizes.enumerated() {
      guard let size else { continue }
      for place in rankings[unit].order[size...] { isRemoved[units[unit].channels[place]] = true }
    }
    return ChannelRemoval(dependencies: dependencies, isRemoved: isRemoved)
  }

  /// The cost of each layer when channels go.
  func layerCosts(_ removal: ChannelRemoval) -> [Cost] {
    costs.layers.indices.map { position in
      let cost = costs.layers[position].cost
      let item = dependencies.layers[position]
      let layout = item.layer.layout
      let outputs = removal.kept(item.outputs).count
      let inputs = item.inputs.map { removal.kept($0).count } ?? layout.inputChannels
      // Of layers that lose groups, inputs over those of a group is the number of groups.
      let weights =
        item.losesGroups
        ? outputs * layout.inputsPerGroup * layout.spatial
        : outputs * inputs / layout.groups * layout.spatial
      return Cost(macs: cost.macs / cost.parameters * weights, parameters: weights)
    }
  }

  func cost(_ sizes: [Int?], _ rankings: [ChannelRanking]) -> Cost {
    layerCosts(removal(sizes, rankings)).reduce(.zero, +)
  }

  /// The cost of the network; as if the last channels went as long as no ranking is known, which
  /// differs only where some layers read a part of a unit.
  func cost(_ sizes: [Int?]) -> Cost {
    let natural = units.map { unit in
      ChannelRanking(order: Array(unit.channels.indices), errors: [], minimum: 1)
    }
    return cost(sizes, rankings.values ?? natural)
  }

  // MARK: Result

  /// Prunes.
  ///
  /// - Parameters:
  ///   - sizes: Channels that each unit keeps; nil for all.
  ///   - data: Inputs; needed to reconstruct and to rank by reconstruction.
  /// - Throws: `HalfstepError.invalidArgument` for fewer channels than must stay; `.emptyStatistics`
  ///   without data where it is needed; what running the network throws.
  func prune(
    _ sizes: [Int?], _ data: ReconstructionData?,
    _ progress: (Double) throws(HalfstepError) -> Void
  ) throws(HalfstepError) -> (graph: Graph, report: CompressionReport) {
    let isChanged = zip(sizes, units).contains { size, unit in
      size.map { $0 < unit.channels.count } ?? false
    }
    if isChanged, reconstructs, data == nil {
      throw HalfstepError(
        .emptyStatistics,
        "channel pruning needs calibration data to fit the layers to the channels that are left; give "
          + "some, or turn reconstruction off")
    }
    guard isChanged else {
      try progress(1)
      let same = report(
        sizes, costs.layers.map(\.cost), fits: [:], biases: [:], after: costs.total)
      return (graph, same)
    }
    let share = rankings.values == nil && importance == .reconstruction ? 0.5 : 0
    let rankings = try ranked(data) { (part) throws(HalfstepError) in try progress(share * part) }
    for (position, (size, ranking)) in zip(sizes, rankings).enumerated() {
      guard let size, size < ranking.minimum else { continue }
      throw HalfstepError(
        .invalidArgument,
        "layer '\(layers[position].name)': expected at least \(ranking.minimum) channels, so that no "
          + "tensor becomes empty, got \(size)")
    }
    let removal = removal(sizes, rankings)
    var fits: [Int: ChannelRefit.Fit] = [:]
    if reconstructs, let data {
      fits = try ChannelRefit(dependencies: dependencies, data: data).fits(removal) {
        (part) throws(HalfstepError) in try progress(share + (1 - share) * part)
      }
    }
    var result = graph
    var names = NameAllocator(graph)
    var biases: [Int: String] = [:]
    for position in fits.keys.sorted() {
      guard let fit = fits[position] else { continue }
      let layer = dependencies.layers[position].layer
      layer.setWeight(fit.weight, in: &result, dependencies.index, names: &names)
      if let bias = fit.bias {
        try layer.setBias(bias, in: &result, dependencies.index, names: &names)
        let place = layer.biasNode ?? (position: layer.node, input: 2)
        biases[position] = result.nodes[place.position].input(place.input)
      }
    }
    let constants = try removal.apply(to: &result)
    try progress(1)
    let after = layerCosts(removal)
    var report = report(
      sizes, after, fits: fits, biases: biases, after: after.reduce(.zero, +))
    report.constants = constants
    return (result, report)
  }

  private func report(
    _ sizes: [Int?], _ after: [Cost], fits: [Int: ChannelRefit.Fit], biases: [Int: String],
    after total: Cost
  ) -> CompressionReport {
    var details: [CompressionReport.Layer] = []
    for (position, cost) in costs.layers.enumerated() {
      let unit = unit(writtenBy: position)
      details.append(
        CompressionReport.Layer(
          name: cost.name, operatorType: cost.operatorType, units: unit.flatMap { sizes[$0] },
          maximumUnits: unit.map { units[$0].channels.count } ?? 0, before: cost.cost,
          after: after[position], weight: cost.weight, pair: nil,
          noise: fits[position].map {
            CompressionReport.Noise(plain: $0.noiseBefore, kept: $0.noiseAfter)
          }, fittedBias: biases[position]))
    }
    return CompressionReport(
      layers: details, before: costs.total, after: total, refusals: refusals)
  }
}

/// Rankings once they are known; copies of a pruner share them.
private final class Rankings: Sendable {
  private let storage: Mutex<[ChannelRanking]?> = Mutex(nil)

  var values: [ChannelRanking]? {
    get { storage.withLock { $0 } }
    set { storage.withLock { $0 = newValue } }
  }
}
