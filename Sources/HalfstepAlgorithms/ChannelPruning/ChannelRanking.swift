// SPDX-License-Identifier: Apache-2.0
// Which channels of a unit go first, and what each number of them costs in error.

import HalfstepGraph
import HalfstepNumerics

/// What a channel's importance is measured by.
package enum ChannelImportance: Int32, Hashable, Sendable {
  /// What the layers that read it lose when the channels that stay make up for it, with data.
  case reconstruction = 0
  /// The squared weights that read it, as in AIMET.
  case magnitude = 1
}

/// In which order the channels of a unit go, and what is lost.
struct ChannelRanking: Sendable {
  /// Positions in the unit's `channels`: a first part is kept.
  let order: [Int]
  /// Sum over the unit's readers of the share of their output (or weight) that is lost, when so many
  /// channels are kept: `[count + 1]`.
  let errors: [Double]
  /// Least number of channels that must be kept.
  let minimum: Int

  /// Ranks the channels of units.
  ///
  /// - Parameters:
  ///   - data: Inputs; needed for `.reconstruction`.
  /// - Throws: `HalfstepError.emptyStatistics` without data where it is needed; what running the
  ///   network throws; `.nonFiniteValue` for weights.
  /// - Complexity: Of `.reconstruction`: one run of the network, O(rows · columns²) for each layer and
  ///   O(channels³) for each unit.
  static func all(
    _ dependencies: ChannelDependencies, _ units: [ChannelUnit], _ importance: ChannelImportance,
    _ data: ReconstructionData?, _ progress: (Double) throws(HalfstepError) -> Void
  ) throws(HalfstepError) -> [ChannelRanking] {
    var moments = Moments(dependencies, units)
    switch importance {
    case .magnitude:
      for layer in moments.readers { try moments.addMagnitudes(layer) }
    case .reconstruction:
      guard let data else {
        throw HalfstepError(
          .emptyStatistics,
          "channel pruning by reconstruction error needs calibration data; give some, or choose "
            + "channels by magnitude")
      }
      let graph = dependencies.graph
      var stops: [Int] = []
      for layer in moments.readers {
        if dependencies.layers[layer].isWide {
          try moments.addMagnitudes(layer)
        } else {
          stops.append(layer)
        }
      }
      try LayerVisits(graph: graph, data: data).forEach(
        stops.map { dependencies.layers[$0].stop(graph) },
        { (share) throws(HalfstepError) in try progress(0.9 * share) }
      ) { (position, problem, _) throws(HalfstepError) in
        try moments.add(stops[position], problem)
      }
    }
    var result: [ChannelRanking] = []
    for (position, unit) in units.enumerated() {
      let (order, errors) = try moments.order(position, importance)
      result.append(protected(order, errors, unit, position, dependencies, units))
    }
    try progress(1)
    return result
  }

  /// Moves forward what must not go: every tensor keeps a channel.
  private static func protected(
    _ order: [Int], _ errors: [Double], _ unit: ChannelUnit, _ position: Int,
    _ dependencies: ChannelDependencies, _ units: [ChannelUnit]
  ) -> ChannelRanking {
    var dependencies = dependencies
    var places: [Int: Int] = [:]
    for (place, channel) in order.enumerated() { places[unit.channels[channel]] = place }
    let all = Set(unit.channels)
    var kept: Set<Int> = [0]
    for (_, channels) in dependencies.tensors.sorted(by: { $0.key < $1.key }) {
      // A channel of another unit, or one that stays, may go or stay on its own account.
      let own = Set(channels.ids)
      guard own.isSubset(of: all), own.count < all.count,
        own.allSatisfy({ dependencies.isFree($0) }),
        let first = own.compactMap({ places[$0] }).min()
      else { continue }
      if kept.isDisjoint(with: own.compactMap { places[$0] }) { kept.insert(first) }
    }
    if kept.count == 1 { return ChannelRanking(order: order, errors: errors, minimum: 1) }
    let front = kept.sorted()
    let moved =
      front.map { order[$0] } + order.indices.filter { !kept.contains($0) }.map { order[$0] }
    return ChannelRanking(order: moved, errors: errors, minimum: front.count)
  }
}

extension ChannelDependencies.Layer {
  /// Columns beyond which a layer's moments take too much memory (two matrices, 512 MiB): such layers
  /// are judged by their weights, and are not fitted anew.
  private static let widest = 5792

  var isWide: Bool { layer.layout.columns > Self.widest }

  func stop(_ graph: Graph) -> LayerWalk.Stop {
    LayerWalk.Stop(layer: layer, weight: graph.nodes[layer.node].inputs[1])
  }
}

/// Moments of what channels contribute to the layers that read them.
private struct Moments {
  /// Layers that read a channel of some unit, ascending.
  let readers: [Int]
  private let dependencies: ChannelDependencies
  private let units: [ChannelUnit]
  /// For each unit, `[channels, channels]`.
  private var sums: [[Double]]
  /// For each unit the place of each of its channels.
  private let places: [[Int: Int]]

  init(_ dependencies: ChannelDependencies, _ units: [ChannelUnit]) {
    self.dependencies = dependencies
    self.units = units
    readers = Set(units.flatMap(\.readers)).sorted()
    sums = units.map { [Double](repeating: 0, count: $0.channels.count * $0.channels.count) }
    places = units.map { unit in
      Dictionary(uniqueKeysWithValues: unit.channels.enumerated().map { ($1, $0) })
    }
  }

  /// For each unit that a layer reads: the place of each of its input channels, −1 for others.
  private func maps(_ layer: Int) -> [(unit: Int, places: [Int])] {
    let inputs = dependencies.layers[layer].inputs ?? []
    return units.indices.filter { units[$0].readers.contains(layer) }.map { unit in
      (unit, inputs.map { places[unit][$0] ?? -1 })
    }
  }

  /// Adds each input channel's share of a layer's squared weight.
  mutating func addMagnitudes(_ position: Int) throws(HalfstepError) {
    let item = dependencies.layers[position]
    let layout = item.layer.layout
    let weight = try item.layer.weight(in: dependencies.graph, dependencies.index)
    var powers = [Double](repeating: 0, count: layout.inputChannels)
    try weight.withFloats { (values) throws(HalfstepError) in
      for group in 0..<layout.groups {
        let matrix = layout.matrix(of: values, group: group)
        for (index, value) in matrix.enumerated() {
          let channel = index % layout.columns / layout.spatial
          powers[group * layout.inputsPerGroup + channel] += Double(value) * Double(value)
        }
      }
    }
    let total = powers.reduce(0, +)
    guard total.isFinite else {
      throw HalfstepError(
        .nonFiniteValue, "node '\(item.name)' weight \(weight.shape): NaN or infinite",
        node: item.name)
    }
    guard total > 0 else { return }
    for (unit, places) in maps(position) {
      let count = units[unit].channels.count
      for (channel, place) in places.enumerated() where place >= 0 {
        sums[unit][place * count + place] += powers[channel] / total
      }
    }
  }

  /// Adds the moments of what channels contribute to a layer's output, over the output's own.
  mutating func add(_ position: Int, _ problem: LayerProblem) throws(HalfstepError) {
    let layout = problem.layer.layout
    let columns = layout.columns
    let statistics = try GramRounding.statistics(of: problem, keepsCross: false)
    let maps = maps(position)
    var parts = maps.map { [Double](repeating: 0, count: sums[$0.unit].count) }
    var total = 0.0
    for group in 0..<layout.groups {
      let gram = statistics.gram(group: group, isCentered: problem.canChangeBias)
      let matrix = try problem.weight.withFloats { (values) throws(HalfstepError) in
        layout.matrix(of: values, group: group).map { Double($0) }
      }
      let products = try LAPACK.onOneThread { () throws(HalfstepError) in
        Matrix(rows: columns, columns: layout.outputsPerGroup, values: matrix).gram()
      }
      for (index, map) in maps.enumerated() {
        let count = units[map.unit].channels.count
        let places = (0..<columns).map {
          map.places[group * layout.inputsPerGroup + $0 / layout.spatial]
        }
        for row in 0..<columns where places[row] >= 0 {
          let target = places[row] * count
          for column in 0..<columns where places[column] >= 0 {
            let at = row * columns + column
            parts[index][target + places[column]] += gram[at] * products.values[at]
          }
        }
      }
      for index in gram.indices { total += gram[index] * products.values[index] }
    }
    guard total.isFinite else {
      throw HalfstepError(
        .nonFiniteValue, "node '\(problem.node.label)': weights or inputs are too large",
        node: problem.node.label)
    }
    guard total > 0 else { return }
    for (index, map) in maps.enumerated() {
      for place in parts[index].indices { sums[map.unit][place] += parts[index][place] / total }
    }
  }

  /// The order in which a unit's channels are kept, and what is lost.
  func order(
    _ unit: Int, _ importance: ChannelImportance
  ) throws(HalfstepError) -> (order: [Int], errors: [Double]) {
    let count = units[unit].channels.count
    if importance == .reconstruction {
      let elimination = try ChannelElimination(sums[unit], count: count)
      return (elimination.order, elimination.errors)
    }
    let powers = (0..<count).map { sums[unit][$0 * count + $0] }
    // Of equals the first stay.
    let order = powers.indices.sorted { (powers[$1], $0) < (powers[$0], $1) }
    var errors = [0.0]
    for place in order.reversed() { errors.append(errors[errors.count - 1] + powers[place]) }
    return (order, errors.reversed())
  }
}
