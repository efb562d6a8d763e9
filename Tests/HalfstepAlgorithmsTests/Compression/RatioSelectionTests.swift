// SPDX-License-Identifier: Apache-2.0
// Tests of the knapsack and of the greedy choice.

import HalfstepAlgorithms
import TestSupport
import Testing

@Suite struct RatioSelectionTests {
  /// Least error of all combinations within a budget.
  private func bruteForce(_ items: [[Knapsack.Choice]], _ budget: Int) -> Double? {
    guard let first = items.first else { return budget >= 0 ? 0 : nil }
    let rest = Array(items.dropFirst())
    return first.compactMap { choice in
      bruteForce(rest, budget - choice.cost).map { $0 + choice.error }
    }.min()
  }

  @Test func knapsackIsAsGoodAsTryingEverything() throws {
    var random = SeededGenerator(seed: 11)
    for _ in 0..<40 {
      let items = (0..<6).map { _ in
        random.floats(5, in: 0...1).map { cost in
          Knapsack.Choice(
            cost: Int(cost * 1000), error: Double(random.floats(1, in: 0...1)[0]))
        }
      }
      for budget in [200, 900, 1700, 2600, 10_000] {
        let expected = bruteForce(items, budget)
        let solution = Knapsack.solve(items, budget: budget)
        #expect((expected == nil) == (solution == nil))
        guard let expected, let solution else { continue }
        // Sums of six numbers in another order.
        #expect(abs(solution.error - expected) <= 1e-14 && solution.isExact)
        #expect(solution.cost <= budget)
        let picked = zip(items, solution.picks).map { $0[$1] }
        #expect(picked.reduce(0) { $0 + $1.cost } == solution.cost)
      }
    }
    #expect(Knapsack.solve([], budget: 0)?.picks == [])
  }

  // Layers of equal cost; the level 0.7 lets the first take 0.25 and the second 0.75: together 0.5.
  @Test func greedyChoiceByHand() {
    let curves = [
      GreedySelection.Curve(ratios: [0.25, 0.5, 0.75], scores: [0.8, 0.85, 0.9]),
      GreedySelection.Curve(ratios: [0.25, 0.5, 0.75], scores: [0.1, 0.4, 0.8]),
    ]
    let ratios = GreedySelection.select(curves, target: 0.5) { ratios in
      ratios.reduce(0.0) { $0 + ($1 ?? 1) } / 2
    }
    #expect(ratios == [0.25, 0.75])
    #expect(curves[0].score(at: 0.375) == 0.825 && curves[0].score(at: 0.9) == 0.9)
  }

  @Test func fitRisesAndKeepsRisingPolynomials() {
    let ratios = (1...9).map { Double($0) / 10 }
    let rising = GreedySelection.Curve(ratios: ratios, scores: ratios.map { $0 * $0 })
    let same = GreedySelection.monotonicFit(rising)
    // x² has a slope of 0 or more: only the ridge of 1e-9 changes it.
    for (a, b) in zip(rising.scores, same.scores) { #expect(abs(a - b) < 1e-6) }
    let bumpy = GreedySelection.Curve(
      ratios: ratios, scores: [0.1, 0.5, 0.3, 0.6, 0.55, 0.7, 0.9, 0.8, 0.95])
    let fitted = GreedySelection.monotonicFit(bumpy)
    // Slopes are held at 49 places to 1e-9 of the range; between them they can dip by little.
    for (a, b) in zip(fitted.scores, fitted.scores.dropFirst()) { #expect(b >= a - 1e-6) }
    let error = zip(bumpy.scores, fitted.scores).map { abs($0 - $1) }.max() ?? 1
    #expect(error < 0.2)
  }
}
