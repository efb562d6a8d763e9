// SPDX-License-Identifier: Apache-2.0
// Compresses a network: which layers, how far, and the result.

import HalfstepGraph
import HalfstepNumerics
import Synchronization

/// Compresses a network, as often as wanted and with any ratios; the network itself never changes.
package struct Compressor: Sendable {
  package let graph: Graph
  package let options: CompressionOptions
  /// Costs of the network as it is.
  package let costs: ModelCosts
  /// What can be compressed, in the order in which it runs.
  package let layers: [CompressibleLayer]
  /// What cannot, and why.
  package let refusals: [CompressionRefusal]
  private let items: [LowRankLayer]
  /// Does the work of channel pruning; nil for other schemes.
  private var pruner: ChannelPruner?
  /// Inputs that layers are split for; nil for none.
  private var data: ReconstructionData?
  private var errors = ErrorCurves()
  private var prepared = PreparedLayers()

  /// Largest rank of a layer's matrix that is factorized.
  private static let rankLimit = 16_384

  /// Finds out what can be compressed.
  ///
  /// - Throws: `HalfstepError.invalidArgument` for options out of range; `.unknownName` for an ignored
  ///   layer that does not exist; what `ModelCosts` throws.
  /// - Complexity: O(nodes + weights).
  package init(_ graph: Graph, _ options: CompressionOptions) throws(HalfstepError) {
    guard (1...1 << 20).contains(options.multiplicity) else {
      throw HalfstepError(
        .invalidArgument, "multiplicity: expected 1...1048576, got \(options.multiplicity)")
    }
    var graph = graph
    try graph.validateAndSort()
    self.graph = graph
    self.options = options
    let costs = try ModelCosts(graph, inputShapes: options.inputShapes)
    self.costs = costs
    let ignored = try Self.positions(of: options.ignoredLayers, costs)
    let inputKeepers = try Self.positions(of: options.inputKeepers, costs)
    if options.scheme == .channelPruning {
      let pruner = try ChannelPruner(
        graph, costs, options, ignored: ignored, inputKeepers: inputKeepers)
      items = []
      layers = pruner.layers
      refusals = pruner.refusals
      self.pruner = pruner
      return
    }
    let index = GraphIndex(graph)
    var refusals: [CompressionRefusal] = []
    let form: LowRankForm = options.scheme == .spatialSVD ? .spatial : .channels
    var found: [LowRankLayer] = []
    for (position, cost) in costs.layers.enumerated() where !ignored.contains(position) {
      guard let layer = LinearLayer(graph, at: cost.node, index) else { continue }
      do throws(HalfstepError) {
        let item = try LowRankLayer(form, graph, layer, cost)
        guard item.maximumRank <= Self.rankLimit else {
          throw HalfstepError(
            .unsupportedOperator,
            "node '\(item.name)': a matrix of rank \(item.maximumRank) is too large to factorize")
        }
        found.append(item)
      } catch {
        refusals.append(CompressionRefusal(layer: cost.name, reason: error.message))
      }
    }
    items = found
    layers = found.map { item in
      CompressibleLayer(
        name: item.name, operatorType: graph.nodes[item.layer.node].opType,
        weight: item.weightName, cost: item.cost, maximumUnits: item.maximumRank)
    }
    self.refusals = refusals
  }

  /// What goes when channels are pruned; nil for other schemes.
  ///
  /// - Throws: As `errorCurves`.
  package func removal(units: [Int?]) throws(HalfstepError) -> ChannelRemoval? {
    guard let pruner, units.count == layers.count else { return nil }
    return pruner.removal(units, try pruner.ranked(data))
  }

  /// Takes unlabeled inputs, for which layers are split from now on.
  ///
  /// - Parameter batches: Inputs by name, `[N, …]`; copied. Results do not depend on how they are cut.
  /// - Throws: What `ReconstructionData` throws.
  package mutating func calibrate(_ batches: [[String: Tensor]]) throws(HalfstepError) {
    data = try ReconstructionData(batches, for: graph)
    errors = ErrorCurves()
    prepared = PreparedLayers()
    pruner?.forget()
  }

  /// Position in `costs.layers` of a layer by node name, weight, or weight without `.weight`.
  private static func position(
    of name: String, _ costs: ModelCosts
  ) throws(HalfstepError) -> Int {
    if let position = costs.layers.firstIndex(where: { $0.name == name }) { return position }
    let position = costs.layers.firstIndex { $0.weight == name || $0.weight == name + ".weight" }
    guard let position else {
      throw HalfstepError(.unknownName, "the network has no layer '\(name)'")
    }
    return position
  }

  /// Positions in `costs.layers`; a weight's name means every layer that reads it.
  private static func positions(
    of names: [String], _ costs: ModelCosts
  ) throws(HalfstepError) -> Set<Int> {
    var result: Set<Int> = []
    for name in names {
      let first = costs.layers[try position(of: name, costs)]
      for (position, layer) in costs.layers.enumerated()
      where layer.node == first.node || (first.name != name && layer.weight == first.weight) {
        result.insert(position)
      }
    }
    return result
  }

  /// Positions in `layers` of what a layer reads, by node name, weight, or weight without `.weight`;
  /// where layers are split, of the layer itself.
  ///
  /// - Throws: As `position(of:)`.
  package func positions(readBy name: String) throws(HalfstepError) -> [Int] {
    guard let pruner else { return [try position(of: name)] }
    return try pruner.units(readBy: try Self.position(of: name, costs))
  }

  /// Positions in `costs.layers` of the layers that write and read the channels of one of `layers`;
  /// where layers are split, the layer itself for both.
  package func members(_ position: Int) -> (writers: [Int], readers: [Int]) {
    guard let pruner else {
      let own = costs.layers.firstIndex { $0.node == items[position].layer.node }
      let list = own.map { [$0] } ?? []
      return (list, list)
    }
    return (pruner.units[position].writers, pruner.units[position].readers)
  }

  /// Position in `layers` of a layer by node name, weight, or weight without `.weight`.
  ///
  /// - Throws: `HalfstepError.unsupportedOperator` with the reason if the layer cannot be compressed;
  ///   `.unknownName`.
  package func position(of name: String) throws(HalfstepError) -> Int {
    let own = try Self.position(of: name, costs)
    let place = costs.layers[own]
    if let pruner {
      if let unit = pruner.unit(writtenBy: own) { return unit }
      if pruner.dependencies.layers[own].losesGroups {
        throw HalfstepError(
          .unsupportedOperator,
          "layer '\(place.name)' keeps as many groups as it reads: give a size to the layer before it",
          node: place.name)
      }
    }
    if let position = layers.firstIndex(where: {
      $0.weight == place.weight && $0.name == place.name
    }) {
      return position
    }
    let reason = refusals.first { $0.layer == place.name }?.reason
    throw HalfstepError(
      .unsupportedOperator, reason ?? "layer '\(place.name)' is ignored", node: place.name)
  }

  // MARK: Ratios

  /// The rank or number of channels of a ratio, rounded up to the multiplicity; nil for 1 and more,
  /// which leave a layer as it is.
  ///
  /// - Throws: `HalfstepError.invalidArgument` for a ratio that is not positive.
  package func units(_ position: Int, ratio: Double) throws(HalfstepError) -> Int? {
    guard ratio > 0 else {
      throw HalfstepError(
        .invalidArgument,
        "layer '\(layers[position].name)': expected a ratio above 0, got \(ratio)")
    }
    if ratio >= 1 { return nil }
    if let pruner {
      return rounded(
        pruner.size(position, ratio: ratio), limit: layers[position].maximumUnits)
    }
    let item = items[position]
    let rank = item.rank(ratio: ratio, options.metric)
    let largest = item.rank(ratio: 1, options.metric)
    return rounded(rank, limit: largest)
  }

  /// Rounds up to the multiplicity, at most to a limit.
  private func rounded(_ units: Int, limit: Int) -> Int {
    let multiple = options.multiplicity
    return min((units + multiple - 1) / multiple * multiple, max(limit, 1))
  }

  /// The network's cost for a size of each layer, nil for those that stay.
  package func cost(units: [Int?]) -> Cost {
    if let pruner { return pruner.cost(units) }
    var total = costs.total
    for (item, units) in zip(items, units) {
      guard let units else { continue }
      let cost = item.cost(rank: units)
      total.macs += cost.macs - item.cost.macs
      total.parameters += cost.parameters - item.cost.parameters
    }
    return total
  }

  /// The cost over the original one.
  package func ratio(_ cost: Cost) -> Double {
    let all = costs.total.value(options.metric)
    return all > 0 ? Double(cost.value(options.metric)) / Double(all) : 1
  }

  // MARK: Result

  /// Compresses.
  ///
  /// - Parameters:
  ///   - units: Rank of each of `layers`; nil leaves a layer as it is.
  ///   - progress: Receives the share that is done; throws to stop.
  /// - Returns: The compressed network and what was done.
  /// - Throws: `HalfstepError.invalidArgument` for a size outside 1...maximum or a wrong number of
  ///   them; `.nonFiniteValue`; `.numericFailure`.
  /// - Complexity: O(weights · ranks).
  package func compress(
    units: [Int?], progress: (Double) throws(HalfstepError) -> Void = { _ in }
  ) throws(HalfstepError) -> (graph: Graph, report: CompressionReport) {
    guard units.count == layers.count else {
      throw HalfstepError(
        .invalidArgument, "sizes: expected \(layers.count), one for each layer, got \(units.count)")
    }
    for (layer, units) in zip(layers, units) {
      guard let units else { continue }
      guard (1...layer.maximumUnits).contains(units) else {
        throw HalfstepError(
          .invalidArgument,
          "layer '\(layer.name)': expected a size in 1...\(layer.maximumUnits), got \(units)")
      }
    }
    if let pruner { return try pruner.prune(units, data, progress) }
    return try split(items, units, progress)
  }

  private func split(
    _ items: [LowRankLayer], _ units: [Int?], _ progress: (Double) throws(HalfstepError) -> Void
  ) throws(HalfstepError) -> (graph: Graph, report: CompressionReport) {
    let chosen = items.indices.filter { units[$0] != nil }
    let form = options.scheme == .spatialSVD ? SingularDecomposition.Split.even : .right
    var weights: [Int: (first: Tensor, second: Tensor)] = [:]
    var choices: [Int: LowRankChoice] = [:]
    if let data, chosen.count == 1 {
      let position = chosen[0]
      let (choice, layer) = try LowRankReconstruction(graph: graph, data: data).choice(
        items[position], rank: units[position] ?? 1, form, known: prepared.take(position), progress)
      prepared.keep(layer, position)
      weights[position] = choice.weights
      choices[position] = choice
    } else if let data {
      let found = try LowRankReconstruction(graph: graph, data: data).choices(
        chosen.map { items[$0] }, ranks: chosen.map { units[$0] ?? 1 }, form, progress)
      for (position, choice) in zip(chosen, found) {
        weights[position] = choice.weights
        choices[position] = choice
      }
    } else {
      try forEach(chosen, items, progress) { (position) throws(HalfstepError) in
        let item = items[position]
        let rank = units[position] ?? 1
        let decomposition: SingularDecomposition
        if chosen.count > 1 {
          decomposition = try item.decomposition(graph, rank: rank)
        } else if let known = prepared.decomposition(position) {
          decomposition = known
        } else {
          // A greedy choice goes on to ask for other ranks of the layer.
          decomposition = try item.decomposition(graph)
          prepared.keep(decomposition, position)
        }
        let factors = decomposition.factors(rank: rank, form)
        return try item.weights(factors.left, factors.rightTransposed)
      } store: {
        weights[$0] = $1
      }
    }
    var result = graph
    var names = NameAllocator(graph)
    let index = GraphIndex(graph)
    for position in chosen {
      guard let bias = choices[position]?.bias else { continue }
      try items[position].layer.setBias(bias, in: &result, index, names: &names)
    }
    var pairs: [Int: CompressionReport.Pair] = [:]
    // From behind, so that positions of earlier nodes hold.
    for position in chosen.reversed() {
      guard let pair = weights[position] else { continue }
      pairs[position] = try items[position].replace(in: &result, with: pair, names: &names)
    }
    result.removeUnusedConstants()
    result.checkInvariants()
    var after: [Int: Cost] = [:]
    for position in chosen {
      after[items[position].layer.node] = items[position].cost(rank: units[position] ?? 1)
    }
    var details: [CompressionReport.Layer] = []
    for cost in costs.layers {
      let position = items.firstIndex { $0.layer.node == cost.node }
      details.append(
        CompressionReport.Layer(
          name: cost.name, operatorType: cost.operatorType, units: position.flatMap { units[$0] },
          maximumUnits: position.map { items[$0].maximumRank } ?? 0, before: cost.cost,
          after: after[cost.node] ?? cost.cost, weight: cost.weight,
          pair: position.flatMap { pairs[$0] },
          noise: position.flatMap { choices[$0] }.map {
            CompressionReport.Noise(plain: $0.noiseBefore, kept: $0.noiseAfter)
          }))
    }
    let total = try ModelCosts(result, inputShapes: options.inputShapes).total
    return (
      result,
      CompressionReport(layers: details, before: costs.total, after: total, refusals: refusals)
    )
  }

  /// Computes something for layers, a layer on each thread, the largest ones first.
  private func forEach<Value>(
    _ positions: [Int], _ items: [LowRankLayer],
    _ progress: (Double) throws(HalfstepError) -> Void,
    _ compute: (Int) throws(HalfstepError) -> Value, store: (Int, Value) -> Void
  ) throws(HalfstepError) {
    func work(_ position: Int) -> Double {
      let rank = Double(items[position].maximumRank)
      return rank * rank * Double(max(items[position].rowCount, items[position].columnCount))
    }
    let order = positions.sorted { (work($0), $1) > (work($1), $0) }
    let all = order.reduce(0) { $0 + work($1) }
    try progress(0)
    var results = [Result<Value, HalfstepError>?](repeating: nil, count: order.count)
    let state = Mutex((done: 0.0, failure: HalfstepError?.none))
    try LAPACK.onOneThread { () throws(HalfstepError) in
      results.withUnsafeMutableBufferPointer { results in
        nonisolated(unsafe) let results = results
        Parallel.forEach(order.count) { thread, index in
          guard state.withLock({ $0.failure == nil }) else { return }
          results[index] = Result { () throws(HalfstepError) in try compute(order[index]) }
          let done = state.withLock {
            $0.done += work(order[index])
            return $0.done
          }
          // Only the thread that called may call back.
          guard thread == 0 else { return }
          do throws(HalfstepError) {
            try progress(all > 0 ? min(done / all, 1) : 1)
          } catch {
            state.withLock { $0.failure = error }
          }
        }
      }
    }
    if let failure = state.withLock({ $0.failure }) { throw failure }
    for (position, result) in zip(order, results) {
      if let result { store(position, try result.get()) }
    }
    try progress(1)
  }

  // MARK: Automatic ratios

  /// The share of each layer that each size loses when nothing else is compressed: of the power of its
  /// output with data, else of its squared weight.
  ///
  /// - Parameter progress: Receives the share that is done; throws to stop.
  /// - Returns: For each of `layers` the shares from size 0 up to its maximum, or with data to the
  ///   largest size that is no more costly than the layer.
  /// - Throws: `HalfstepError.nonFiniteValue`, `.numericFailure`; with data, what running the network
  ///   throws.
  /// - Complexity: O(weights · ranks), and with data O(rows · columns²) a layer. Kept until the data
  ///   changes.
  package func errorCurves(
    progress: (Double) throws(HalfstepError) -> Void = { _ in }
  ) throws(HalfstepError) -> [[Double]] {
    if let pruner { return try pruner.ranked(data, progress).map(\.errors) }
    if let known = errors.values { return known }
    var curves = [[Double]?](repeating: nil, count: items.count)
    if let data {
      curves = try LowRankReconstruction(graph: graph, data: data).lostShares(
        items, ranks: items.map { $0.rank(ratio: 1, options.metric) }, progress)
    }
    // Inputs that are always zero say nothing.
    let open = items.indices.filter { curves[$0] == nil }
    try forEach(open, items, data == nil ? progress : { _ in }) {
      (position) throws(HalfstepError) in
      try items[position].decomposition(graph).lostShares
    } store: {
      curves[$0] = $1
    }
    let result = curves.map { $0 ?? [] }
    errors.values = result
    return result
  }

  /// Chooses sizes by the share of each layer that is lost, such that their sum is least within a
  /// target.
  ///
  /// - Parameters:
  ///   - target: Cost wanted over original cost, in (0, 1].
  ///   - progress: Receives the share that is done; throws to stop.
  /// - Returns: Sizes; nil for layers that stay.
  /// - Throws: `HalfstepError.invalidArgument` if the target is out of range or cannot be reached.
  package func select(
    target: Double, progress: (Double) throws(HalfstepError) -> Void = { _ in }
  ) throws(HalfstepError) -> [Int?] {
    try Self.check(target)
    if let pruner { return try select(pruner, target, progress) }
    let shares = try errorCurves(progress: progress)
    var sizes: [[Int?]] = []
    var choices: [[Knapsack.Choice]] = []
    for (position, item) in items.enumerated() {
      var options: [Int?] = [nil]
      for step in 1..<Self.steps {
        let size = try units(position, ratio: Double(step) / Double(Self.steps))
        if let size, options.last != size { options.append(size) }
      }
      let lost = shares[position]
      sizes.append(options)
      choices.append(
        options.map { size in
          let cost = size.map(item.cost(rank:)) ?? item.cost
          return Knapsack.Choice(
            cost: cost.value(self.options.metric), error: size.map { lost[$0] } ?? 0)
        })
    }
    let other =
      costs.total.value(options.metric)
      - items.reduce(0) { $0 + $1.cost.value(options.metric) }
    let budget = Int((target * Double(costs.total.value(options.metric))).rounded(.down)) - other
    guard let solution = Knapsack.solve(choices, budget: budget) else {
      throw unreachable(target, sizes.map { $0.count > 1 ? $0[1] : nil })
    }
    return zip(sizes, solution.picks).map { $0[$1] }
  }

  private func select(
    _ pruner: ChannelPruner, _ target: Double, _ progress: (Double) throws(HalfstepError) -> Void
  ) throws(HalfstepError) -> [Int?] {
    let rankings = try pruner.ranked(data, progress)
    var sizes: [[Int]] = []
    for (position, ranking) in rankings.enumerated() {
      var own: Set = [layers[position].maximumUnits]
      for step in 1..<Self.steps {
        let size = try units(position, ratio: Double(step) / Double(Self.steps)) ?? 1
        own.insert(max(size, ranking.minimum))
      }
      sizes.append(own.sorted())
    }
    let budget = Int((target * Double(costs.total.value(options.metric))).rounded(.down))
    guard let result = pruner.select(sizes, rankings, budget: budget) else {
      throw unreachable(target, sizes.map { $0.first })
    }
    return result
  }

  /// Number of ratios at which the automatic choice looks.
  private static let steps = 64

  static func check(_ target: Double) throws(HalfstepError) {
    guard target > 0, target <= 1 else {
      throw HalfstepError(.invalidArgument, "target ratio: expected (0, 1], got \(target)")
    }
  }

  private func unreachable(_ target: Double, _ smallest: [Int?]) -> HalfstepError {
    let least = ratio(cost(units: smallest))
    return HalfstepError(
      .invalidArgument,
      "target ratio \(target): the layers that can be compressed allow \(least) at best")
  }

  /// Chooses ratios from scores of networks in which one layer is compressed, as AIMET does.
  ///
  /// - Parameters:
  ///   - target: Cost wanted over original cost, in (0, 1].
  ///   - curves: Ratios and scores of each of `layers`.
  ///   - usesMonotonicFit: Whether each curve is first replaced by a rising polynomial.
  /// - Returns: Sizes; nil for layers that stay.
  /// - Throws: `HalfstepError.invalidArgument` for curves that do not fit.
  package func select(
    target: Double, curves: [GreedySelection.Curve], usesMonotonicFit: Bool
  ) throws(HalfstepError) -> [Int?] {
    try Self.check(target)
    // Costs depend on which channels go.
    if let pruner { _ = try pruner.ranked(data) }
    guard curves.count == layers.count else {
      throw HalfstepError(
        .invalidArgument,
        "scores: expected curves of \(layers.count) layers, got \(curves.count)")
    }
    var rounded: [GreedySelection.Curve] = []
    for (position, given) in curves.enumerated() {
      let isRising = zip(given.ratios, given.ratios.dropFirst()).allSatisfy { $0 < $1 }
      guard given.ratios.count == given.scores.count, !given.ratios.isEmpty, isRising,
        given.ratios.allSatisfy({ $0 > 0 && $0 <= 1 }), given.scores.allSatisfy(\.isFinite)
      else {
        throw HalfstepError(
          .invalidArgument,
          "scores of layer '\(layers[position].name)': expected finite scores at rising ratios in "
            + "(0, 1]")
      }
      let curve = usesMonotonicFit ? GreedySelection.monotonicFit(given) : given
      guard options.multiplicity > 1 else {
        rounded.append(curve)
        continue
      }
      // A rounded size has a ratio of its own, and the score that the curve has there.
      var result = GreedySelection.Curve(ratios: [], scores: [])
      for ratio in curve.ratios {
        guard let size = try units(position, ratio: ratio) else { continue }
        let actual = self.actualRatio(position, size)
        if let last = result.ratios.last, actual <= last { continue }
        result.ratios.append(actual)
        result.scores.append(curve.score(at: actual))
      }
      rounded.append(result)
    }
    let ratios = try GreedySelection.select(rounded, target: target) {
      (ratios) throws(HalfstepError) in
      ratio(cost(units: try sizes(ratios)))
    }
    return try sizes(ratios)
  }

  private func sizes(_ ratios: [Double?]) throws(HalfstepError) -> [Int?] {
    var sizes: [Int?] = []
    for (position, ratio) in ratios.enumerated() {
      sizes.append(try ratio.flatMap { (r) throws(HalfstepError) in try units(position, ratio: r) })
    }
    return sizes
  }

  /// The ratio that a size amounts to.
  package func actualRatio(_ position: Int, _ units: Int) -> Double {
    if pruner != nil { return Double(units) / Double(layers[position].maximumUnits) }
    let item = items[position]
    return Double(item.cost(rank: units).value(options.metric))
      / Double(item.cost.value(options.metric))
  }
}

/// Error curves once they are known; copies of a compressor share them.
private final class ErrorCurves: Sendable {
  private let storage: Mutex<[[Double]]?> = Mutex(nil)

  var values: [[Double]]? {
    get { storage.withLock { $0 } }
    set { storage.withLock { $0 = newValue } }
  }
}

/// What is known about the layer that was last split alone: a greedy choice asks for many ranks of one
/// layer after the other. Copies of a compressor share it.
private final class PreparedLayers: Sendable {
  private struct Known {
    var position = -1
    var layer: PreparedLayer?
    var decomposition: SingularDecomposition?
  }

  private let storage: Mutex<Known> = Mutex(Known())

  /// Takes out a layer, so that nobody else uses it.
  func take(_ position: Int) -> PreparedLayer? {
    storage.withLock { known in
      guard known.position == position else { return nil }
      defer { known.layer = nil }
      return known.layer
    }
  }

  func keep(_ layer: PreparedLayer, _ position: Int) {
    storage.withLock { $0 = Known(position: position, layer: layer) }
  }

  func decomposition(_ position: Int) -> SingularDecomposition? {
    storage.withLock { $0.position == position ? $0.decomposition : nil }
  }

  func keep(_ decomposition: SingularDecomposition, _ position: Int) {
    storage.withLock { $0 = Known(position: position, decomposition: decomposition) }
  }
}
