// SPDX-License-Identifier: Apache-2.0
// Chooses how many channels each unit keeps.

import HalfstepNumerics

extension ChannelPruner {
  /// Rounds of linearization at most.
  private static let rounds = 12

  /// Chooses sizes such that the sum of the units' errors is least within a budget.
  ///
  /// A layer's cost is a product of the channels that it reads and writes, so that units are not
  /// independent. Costs are made linear around a choice, the knapsack of that is solved exactly, and so
  /// on from its solution; of all choices whose true cost is within the budget the best is returned,
  /// with what is left of the budget given to the units that gain most.
  ///
  /// - Parameters:
  ///   - options: For each unit the sizes to choose from, rising; the last is the whole unit.
  ///   - budget: Largest cost of the network.
  /// - Returns: nil if even the smallest sizes exceed the budget.
  func select(
    _ options: [[Int]], _ rankings: [ChannelRanking], budget: Int
  ) -> [Int?]? {
    func value(_ picks: [Int]) -> Int {
      cost(zip(options, picks).map { $0[$1] }, rankings).value(metric)
    }
    func error(_ picks: [Int]) -> Double {
      var sum = 0.0
      for unit in picks.indices { sum += rankings[unit].errors[options[unit][picks[unit]]] }
      return sum
    }
    let smallest = [Int](repeating: 0, count: options.count)
    guard value(smallest) <= budget else { return nil }
    var best = smallest
    var least = error(smallest)
    /// Remembers a choice that is within the budget and better.
    func offer(_ picks: [Int]) -> Bool {
      guard value(picks) <= budget else { return false }
      let full = filled(picks, options, rankings, budget, value)
      let own = error(full)
      if own < least { (best, least) = (full, own) }
      return true
    }
    // The same share of every unit is where it starts.
    var current = smallest
    for step in stride(from: options.map(\.count).max() ?? 1, to: 0, by: -1) {
      let even = options.map { min($0.count - 1, step - 1) }
      if value(even) <= budget {
        current = even
        break
      }
    }
    _ = offer(current)
    var seen: Set<[Int]> = []
    for _ in 0..<Self.rounds where seen.insert(current).inserted {
      guard let next = linearized(current, options, rankings, budget, value) else { break }
      _ = offer(next)
      current = next
    }
    return zip(options, best).enumerated().map { unit, choice in
      choice.0[choice.1] == units[unit].channels.count ? nil : choice.0[choice.1]
    }
  }

  /// The best choice when costs are linear around a choice, made such that its true cost is within the
  /// budget if that takes few attempts.
  private func linearized(
    _ current: [Int], _ options: [[Int]], _ rankings: [ChannelRanking], _ budget: Int,
    _ value: ([Int]) -> Int
  ) -> [Int]? {
    let base = value(current)
    var choices: [[Knapsack.Choice]] = []
    var constant = base
    for unit in options.indices {
      var own: [Int] = []
      for pick in options[unit].indices {
        var changed = current
        changed[unit] = pick
        own.append(value(changed))
      }
      // What the unit costs more than with its smallest size.
      choices.append(
        options[unit].indices.map {
          Knapsack.Choice(
            cost: max(own[$0] - own[0], 0), error: rankings[unit].errors[options[unit][$0]])
        })
      constant -= max(own[current[unit]] - own[0], 0)
    }
    var room = budget - constant
    var result: [Int]?
    for _ in 0..<8 {
      guard let solution = Knapsack.solve(choices, budget: room) else { break }
      result = solution.picks
      let excess = value(solution.picks) - budget
      if excess <= 0 { break }
      room -= excess
    }
    return result
  }

  /// Enlarges units, the one that gains most for its cost first, as long as the budget allows.
  private func filled(
    _ picks: [Int], _ options: [[Int]], _ rankings: [ChannelRanking], _ budget: Int,
    _ value: ([Int]) -> Int
  ) -> [Int] {
    var picks = picks
    var total = value(picks)
    while true {
      var (best, rate, next) = (-1, -1.0, total)
      for unit in picks.indices where picks[unit] + 1 < options[unit].count {
        var larger = picks
        larger[unit] += 1
        let cost = value(larger)
        guard cost <= budget else { continue }
        let sizes = (options[unit][picks[unit]], options[unit][larger[unit]])
        let gain = rankings[unit].errors[sizes.0] - rankings[unit].errors[sizes.1]
        let own = gain / Double(max(cost - total, 1))
        if own > rate { (best, rate, next) = (unit, own, cost) }
      }
      if best < 0 { return picks }
      picks[best] += 1
      total = next
    }
  }
}
