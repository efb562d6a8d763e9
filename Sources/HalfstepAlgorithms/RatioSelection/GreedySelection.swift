// SPDX-License-Identifier: Apache-2.0
// AIMET's greedy choice of ratios from evaluation scores.

import HalfstepNumerics

/// Chooses a ratio for each layer from scores of networks in which only that layer is compressed.
///
/// A score level is searched by bisection: every layer takes its smallest ratio whose score reaches
/// the level, or stays as it is if none does; the level is right when the network's cost meets the
/// target.
package struct GreedySelection: Sendable {
  /// What a layer was seen to do.
  package struct Curve: Hashable, Sendable {
    /// Ratios in rising order.
    package var ratios: [Double]
    /// Score at each ratio; higher is better.
    package var scores: [Double]

    package init(ratios: [Double], scores: [Double]) {
      self.ratios = ratios
      self.scores = scores
    }

    /// The score at a ratio, linear between neighbors and constant outside.
    package func score(at ratio: Double) -> Double {
      guard let next = ratios.firstIndex(where: { $0 >= ratio }) else { return scores.last ?? 0 }
      if next == 0 || ratios[next] == ratio { return scores[next] }
      let part = (ratio - ratios[next - 1]) / (ratios[next] - ratios[next - 1])
      return scores[next - 1] + part * (scores[next] - scores[next - 1])
    }

    /// The smallest ratio whose score, and that of every larger one, is at least a level; nil if
    /// not even the largest ratio's is.
    func ratio(reaching level: Double) -> Double? {
      for (ratio, score) in zip(ratios, scores) where score >= level { return ratio }
      return nil
    }
  }

  /// Cost of the network within which the target is met.
  static let ratioTolerance = 0.001
  /// Smallest window of levels, as a share of all scores.
  static let windowTolerance = 0.0001

  /// Chooses ratios.
  ///
  /// - Parameters:
  ///   - curves: A curve for each layer; ratios rising, as many finite scores as ratios, 1 or more.
  ///   - target: Cost wanted over original cost, in (0, 1].
  ///   - modelRatio: Cost of the network over original cost for a ratio of each layer, nil for
  ///     layers that stay.
  /// - Returns: Ratios; nil for layers that stay.
  /// - Reference: the procedure is AIMET's.
  package static func select<Failure: Error>(
    _ curves: [Curve], target: Double, modelRatio: ([Double?]) throws(Failure) -> Double
  ) throws(Failure) -> [Double?] {
    let all = curves.flatMap(\.scores)
    guard let least = all.min(), let largest = all.max() else { return curves.map { _ in nil } }
    var (low, high) = (least, largest)
    var level = (low + high) / 2
    // The window halves each time: 14 rounds bring it below a ten-thousandth.
    for _ in 0..<64 {
      let ratios = curves.map { $0.ratio(reaching: level) }
      let reached = try modelRatio(ratios)
      if abs(reached - target) <= ratioTolerance { return ratios }
      if high - low <= windowTolerance * (largest - least) { break }
      if reached > target { high = level } else { low = level }
      level = (low + high) / 2
    }
    return curves.map { $0.ratio(reaching: low) }
  }

  /// The polynomial of degree 7 nearest to a curve whose slope is nowhere below 0, at the curve's
  /// ratios.
  ///
  /// The slope is held at 0, 0.02 … 0.96. Curves of fewer than three points are returned as they are.
  package static func monotonicFit(_ curve: Curve) -> Curve {
    let points = curve.ratios.count
    guard points >= 3 else { return curve }
    let degree = min(7, points - 1)
    // Chebyshev polynomials on [0, 1] keep the equations well conditioned.
    func basis(_ x: Double) -> (values: [Double], slopes: [Double]) {
      let t = 2 * x - 1
      var (values, slopes) = ([1, t], [0.0, 2.0])
      for n in 2..<max(degree + 1, 2) {
        values.append(2 * t * values[n - 1] - values[n - 2])
        slopes.append(4 * values[n - 1] + 2 * t * slopes[n - 1] - slopes[n - 2])
      }
      return (Array(values.prefix(degree + 1)), Array(slopes.prefix(degree + 1)))
    }
    let size = degree + 1
    var normal = Matrix(rows: size, columns: size)
    var right = Matrix(rows: size, columns: 1)
    for (ratio, score) in zip(curve.ratios, curve.scores) {
      let row = basis(ratio).values
      for i in 0..<size {
        right[i, 0] += row[i] * score
        for j in 0..<size { normal[i, j] += row[i] * row[j] }
      }
    }
    for i in 0..<size { normal[i, i] += 1e-9 }
    let knots = (0...48).map { Double($0) * 0.02 }
    var slopes = Matrix(rows: size, columns: knots.count)
    for (column, knot) in knots.enumerated() {
      for (row, value) in basis(knot).slopes.enumerated() { slopes[row, column] = value }
    }
    guard let free = normal.solvedPositiveDefinite(right),
      let lifts = normal.solvedPositiveDefinite(slopes)
    else { return curve }
    // Multipliers of the slopes, one after the other until nothing moves.
    let coupling = Matrix.product(slopes, transposed: true, lifts)
    var multipliers = [Double](repeating: 0, count: knots.count)
    var gaps = Matrix.product(slopes, transposed: true, free).values
    let scale = (curve.scores.max() ?? 0) - (curve.scores.min() ?? 0)
    for _ in 0..<20_000 {
      var moved = 0.0
      for knot in knots.indices {
        let step = max(-multipliers[knot], -gaps[knot] / coupling[knot, knot])
        if step == 0 { continue }
        multipliers[knot] += step
        for other in knots.indices { gaps[other] += step * coupling[other, knot] }
        moved = max(moved, abs(step) * coupling[knot, knot])
      }
      if moved <= 1e-9 * scale { break }
    }
    var fitted = free
    for knot in knots.indices where multipliers[knot] > 0 {
      for row in 0..<size { fitted[row, 0] += multipliers[knot] * lifts[row, knot] }
    }
    var result = curve
    for (index, ratio) in curve.ratios.enumerated() {
      result.scores[index] = zip(basis(ratio).values, fitted.values).reduce(0) { $0 + $1.0 * $1.1 }
    }
    return result
  }
}
