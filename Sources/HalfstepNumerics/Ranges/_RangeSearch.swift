// SPDX-License-Identifier: Apache-2.0
// Finds the grid with the least cost: a coarse set of candidates, then local refinement.

/// What a candidate costs.
struct RangeCost {
  var total: Double
  /// Part of the cost that no narrower range can lower: the clipping error. 0 if nothing is known.
  var clipping: Double
}

/// Finds the grid with the least cost among grids that cover a part of a range.
///
/// A candidate keeps the share `low` of the range below zero and the share `high` of the range above.
/// Symmetric grids and one-sided ranges have one share only. Deterministic; a tie goes to the candidate
/// that was tried first, and the whole range is tried first.
struct RangeSearch {
  let fit: GridFit
  /// Ends of the range; zero lies within.
  let minimum: Double
  let maximum: Double
  /// Candidates of the first round for one share; AIMET's number is 100.
  private let steps: Int
  /// Candidates of the first round for each of two shares; AIMET's numbers are 17 and 21.
  private let stepsPerSide: Int
  /// Starting points that are refined.
  private let starts: Int
  private let smallestScale: Double

  /// Creates a search over parts of the range from the smallest to the largest value.
  ///
  /// - Parameter thorough: Whether the cost is cheap, or so bumpy that many candidates are needed.
  init(fit: GridFit, minimum: Double, maximum: Double, thorough: Bool = true) {
    self.fit = fit
    self.minimum = min(minimum, 0)
    self.maximum = max(maximum, 0)
    steps = thorough ? 100 : 20
    stepsPerSide = thorough ? 16 : 8
    starts = thorough ? 6 : 2
    // AIMET's floor would erase data near 10⁻⁷; the search needs one only where there is no range.
    smallestScale =
      self.minimum == 0 && self.maximum == 0 ? fit.smallestScale : Self.leastScale
  }

  /// The candidate with the least cost.
  func best(_ cost: (GridChoice) -> RangeCost) -> GridChoice {
    let hasOneShare = fit.spec.isSymmetric || minimum == 0 || maximum == 0
    let points = hasOneShare ? diagonal(cost) : plane(cost)
    var winner = points[0]
    // Sorted by cost, then by order; the best starting points are refined each on its own.
    let order = points.indices.sorted { (points[$0].cost, $0) < (points[$1].cost, $1) }
    for start in order.prefix(starts) {
      if points[start].cost < winner.cost { winner = points[start] }
      let refined = refine(
        points[start], step: 0.5 / Double(hasOneShare ? steps : stepsPerSide),
        hasOneShare: hasOneShare, cost)
      if refined.cost < winner.cost { winner = refined }
    }
    return winner.choice
  }

  /// Candidates that keep the same share of both sides.
  private func diagonal(_ cost: (GridChoice) -> RangeCost) -> [Point] {
    var points: [Point] = []
    var least = Double.infinity
    for step in stride(from: steps, through: 1, by: -1) {
      let share = Double(step) / Double(steps)
      points.append(point(share, share, cost))
      least = min(least, points[points.count - 1].cost)
      // Clipping grows as the range shrinks: no later candidate can win.
      if points[points.count - 1].clipping >= least && least > 0 { break }
    }
    for step in 1...max(1, steps / 20) {
      let share = 1 + Double(step) / Double(steps)
      points.append(point(share, share, cost))
    }
    return points
  }

  /// Candidates that keep any shares.
  private func plane(_ cost: (GridChoice) -> RangeCost) -> [Point] {
    var points: [Point] = []
    var least = Double.infinity
    for row in stride(from: stepsPerSide, through: 1, by: -1) {
      for column in stride(from: stepsPerSide, through: 1, by: -1) {
        let sides = Double(stepsPerSide)
        points.append(point(Double(row) / sides, Double(column) / sides, cost))
        least = min(least, points[points.count - 1].cost)
        if points[points.count - 1].clipping >= least && least > 0 {
          if column == stepsPerSide { return points }
          break
        }
      }
    }
    return points
  }

  /// Scales whose reciprocals and products with codes are ordinary floats.
  private static let leastScale = 0x1p-100
  /// Ranges somewhat wider than the data can align a coarse grid better with it.
  private static let widestShare = 1.0625
  /// Shares closer than this are not told apart.
  private static let finestStep = 0x1p-11

  private struct Point {
    var low: Double
    var high: Double
    var choice: GridChoice
    var cost: Double
    var clipping: Double
  }

  private func point(_ low: Double, _ high: Double, _ cost: (GridChoice) -> RangeCost) -> Point {
    let choice = fit.covering(
      minimum: minimum * low, maximum: maximum * high, smallestScale: smallestScale)
    let cost = cost(choice)
    return Point(
      low: low, high: high, choice: choice, cost: cost.total, clipping: cost.clipping)
  }

  /// Walks downhill from a point, halving the step where no neighbor is better.
  private func refine(
    _ start: Point, step initial: Double, hasOneShare: Bool, _ cost: (GridChoice) -> RangeCost
  ) -> Point {
    let moves: [(Double, Double)] =
      hasOneShare
      ? [(1, 1), (-1, -1)]
      : [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)]
    var best = start
    var step = initial
    while step >= Self.finestStep {
      var better: Point?
      for (low, high) in moves {
        let low = best.low + low * step
        let high = best.high + high * step
        guard low > 0, high > 0, low <= Self.widestShare, high <= Self.widestShare else {
          continue
        }
        let next = point(low, high, cost)
        if next.cost < (better ?? best).cost { better = next }
      }
      if let better { best = better } else { step /= 2 }
    }
    return best
  }
}
