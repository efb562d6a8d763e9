// SPDX-License-Identifier: Apache-2.0
// How long the rest of a run over layers will take.

import HalfstepGraph

/// Estimates how long the rest of a run over layers will take, from how long the layers so far took.
///
/// A layer counts with a share that does not depend on its size, for running the networks up to it, and
/// with one for its arithmetic, which grows with its weights times the length of its rows.
package struct TimeEstimate {
  /// What is done when each layer begins; the last is everything.
  private let done: [Double]
  private let start = ContinuousClock.now
  /// Part of all below which nothing is said.
  private static let least = 0.02

  package init(_ layers: [LinearLayer]) {
    self.init(
      work: layers.map { layer in
        let layout = layer.layout
        let columns = Double(layout.columns)
        return Double(layout.groups) * columns * (Double(layout.outputsPerGroup) + columns)
      })
  }

  /// - Parameter work: Arithmetic of each layer, 0 or more, in any unit.
  package init(work: [Double]) {
    let total = max(work.reduce(0, +), .leastNormalMagnitude)
    var done = [0.0]
    for own in work {
      done.append(done[done.count - 1] + 0.5 / Double(work.count) + 0.5 * own / total)
    }
    self.done = done
  }

  /// Seconds that the rest will take; nil while too little is done to tell.
  ///
  /// - Parameters:
  ///   - layer: The layer at work.
  ///   - fraction: Share of it that is done.
  ///   - elapsed: Seconds since the start; nil for the clock's.
  package func secondsLeft(
    _ layer: Int, _ fraction: Double, elapsed: Double? = nil
  ) -> Double? {
    guard layer + 1 < done.count, layer >= 0 else { return nil }
    let all = done[done.count - 1]
    let now = done[layer] + min(max(fraction, 0), 1) * (done[layer + 1] - done[layer])
    guard now >= Self.least * all else { return nil }
    let passed = ContinuousClock.now - start
    let seconds =
      elapsed ?? Double(passed.components.seconds) + Double(passed.components.attoseconds) * 1e-18
    return seconds * (all - now) / now
  }
}
