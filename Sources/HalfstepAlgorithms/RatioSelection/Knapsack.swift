// SPDX-License-Identifier: Apache-2.0
// One choice for each layer such that errors are least within a budget.

import HalfstepNumerics

/// The multiple-choice knapsack: one choice for each item, least total error within a budget.
///
/// Partial solutions are extended item by item; those that another one beats in cost and error, or
/// that cannot become better than the best known solution by the bound of the linear relaxation, are
/// dropped. The result is exact unless more than `stateLimit` partial solutions would have to be kept.
package enum Knapsack {
  /// A choice for an item.
  package struct Choice: Hashable, Sendable {
    package let cost: Int
    package let error: Double

    package init(cost: Int, error: Double) {
      self.cost = cost
      self.error = error
    }
  }

  /// What was found.
  package struct Solution: Hashable, Sendable {
    /// Index of each item's choice.
    package let picks: [Int]
    package let cost: Int
    package let error: Double
    /// Whether no other picks have a smaller error, beyond rounding.
    package let isExact: Bool
  }

  private struct State {
    let cost: Int
    let error: Double
    let pick: Int32
    let parent: Int32
  }

  private static let stateLimit = 100_000

  /// Finds the picks.
  ///
  /// - Parameters:
  ///   - items: Choices of each item; each item has one or more, with costs of 0 or more and finite
  ///     errors of 0 or more.
  ///   - budget: Largest total cost.
  /// - Returns: The picks; nil if even the cheapest choices exceed the budget.
  /// - Complexity: O(items · choices · partial solutions).
  package static func solve(_ items: [[Choice]], budget: Int) -> Solution? {
    let fronts = items.map(front)
    let cheapest = fronts.map { $0.last.map { $0.choice.cost } ?? 0 }
    guard cheapest.reduce(0, +) <= budget else { return nil }
    let order = items.indices.sorted { fronts[$0].count > fronts[$1].count }
    // Bounds of what the items from a position on still cost.
    var bounds = [RelaxationBound](repeating: RelaxationBound([]), count: order.count + 1)
    for position in order.indices.reversed() {
      bounds[position] = RelaxationBound(order[position...].map { fronts[$0].map(\.choice) })
    }
    var incumbent = bounds[0].roundedError(budget) * (1 + 1e-12)
    var isExact = true
    var levels: [[State]] = [[State(cost: 0, error: 0, pick: -1, parent: -1)]]
    for (position, item) in order.enumerated() {
      var next: [State] = []
      for (parent, state) in levels[position].enumerated() {
        for (pick, entry) in fronts[item].enumerated() {
          let cost = state.cost + entry.choice.cost
          let error = state.error + entry.choice.error
          guard let rest = bounds[position + 1].leastError(budget - cost),
            error + rest <= incumbent
          else { continue }
          next.append(State(cost: cost, error: error, pick: Int32(pick), parent: Int32(parent)))
          incumbent = min(
            incumbent,
            (error + bounds[position + 1].roundedError(budget - cost)) * (1 + 1e-12))
        }
      }
      next.sort { ($0.cost, $0.error, $0.pick) < ($1.cost, $1.error, $1.pick) }
      var kept: [State] = []
      for state in next where state.error < (kept.last?.error ?? .infinity) { kept.append(state) }
      if kept.count > stateLimit {
        isExact = false
        let promising = kept.indices.sorted { a, b in
          let (x, y) = (kept[a], kept[b])
          let first = x.error + (bounds[position + 1].leastError(budget - x.cost) ?? .infinity)
          let second = y.error + (bounds[position + 1].leastError(budget - y.cost) ?? .infinity)
          return (first, a) < (second, b)
        }
        kept = promising.prefix(stateLimit).sorted().map { kept[$0] }
      }
      levels.append(kept)
    }
    guard
      let best = levels[order.count].indices.min(by: {
        levels[order.count][$0].error < levels[order.count][$1].error
      })
    else { return nil }
    let final = levels[order.count][best]
    var picks = [Int](repeating: 0, count: items.count)
    var state = final
    for position in order.indices.reversed() {
      picks[order[position]] = fronts[order[position]][Int(state.pick)].index
      state = levels[position][Int(state.parent)]
    }
    return Solution(picks: picks, cost: final.cost, error: final.error, isExact: isExact)
  }

  /// Choices that no other beats, with falling cost and rising error.
  private static func front(_ choices: [Choice]) -> [(index: Int, choice: Choice)] {
    let sorted = choices.enumerated().sorted {
      ($0.element.error, $0.element.cost, $0.offset) < (
        $1.element.error, $1.element.cost, $1.offset
      )
    }
    var result: [(index: Int, choice: Choice)] = []
    for (index, choice) in sorted where choice.cost < (result.last?.choice.cost ?? .max) {
      result.append((index, choice))
    }
    return result
  }
}

/// The linear relaxation of some items: least error for any budget.
private struct RelaxationBound {
  private var leastCost = 0
  private var largestError = 0.0
  /// Totals of cost and of error saved after each step up the convex hulls, best steps first.
  private var costs: [Int] = []
  private var savings: [Double] = []

  init(_ items: [[Knapsack.Choice]]) {
    var steps: [(cost: Int, saving: Double)] = []
    for choices in items {
      // From the cheapest choice up, along the lower convex hull.
      var hull: [Knapsack.Choice] = []
      for choice in choices.reversed() {
        while hull.count >= 2 {
          let (a, b) = (hull[hull.count - 2], hull[hull.count - 1])
          let earlier = (a.error - b.error) * Double(choice.cost - a.cost)
          let direct = (a.error - choice.error) * Double(b.cost - a.cost)
          if earlier > direct { break }
          hull.removeLast()
        }
        hull.append(choice)
      }
      guard let first = hull.first else { continue }
      leastCost += first.cost
      largestError += first.error
      for (a, b) in zip(hull, hull.dropFirst()) {
        steps.append((b.cost - a.cost, a.error - b.error))
      }
    }
    steps.sort { $0.saving * Double($1.cost) > $1.saving * Double($0.cost) }
    var (cost, saving) = (0, 0.0)
    for step in steps {
      cost += step.cost
      saving += step.saving
      costs.append(cost)
      savings.append(saving)
    }
  }

  /// Number of whole steps that a budget beyond the least cost pays.
  private func steps(_ budget: Int) -> Int {
    var (low, high) = (0, costs.count)
    while low < high {
      let middle = (low + high) / 2
      if costs[middle] <= budget { low = middle + 1 } else { high = middle }
    }
    return low
  }

  /// Least error of fractional choices; nil if the budget does not pay the cheapest ones.
  func leastError(_ budget: Int) -> Double? {
    let free = budget - leastCost
    guard free >= 0 else { return nil }
    let count = steps(free)
    let (paid, saved) = count > 0 ? (costs[count - 1], savings[count - 1]) : (0, 0)
    var error = largestError - saved
    if count < costs.count {
      error -= (savings[count] - saved) * Double(free - paid) / Double(costs[count] - paid)
    }
    // Rounding must not cut off what is equally good.
    return max(0, error - largestError * 1e-13)
  }

  /// Error of the whole steps that fit: a solution.
  func roundedError(_ budget: Int) -> Double {
    let free = budget - leastCost
    guard free >= 0 else { return .infinity }
    let count = steps(free)
    return largestError - (count > 0 ? savings[count - 1] : 0) + largestError * 1e-13
  }
}
