// SPDX-License-Identifier: Apache-2.0
// What AdaRound is run with.

import HalfstepNumerics

/// What AdaRound is run with; defaults are AIMET's, but for the batch.
package struct AdaRoundOptions: Hashable, Sendable {
  /// Steps of gradient descent for each layer; nil for AIMET's choice: 10,000 if weights have 8 bits
  /// or more, otherwise 15,000.
  package var iterations: Int?
  /// Weight of the regularizer that pushes weights to the grid, 0 or more.
  package var regularization = 0.01
  /// Exponent of the regularizer when it sets in and at the end, 1 or more each.
  package var beta = SoftRounding.ClosedInterval(start: 20, end: 2)
  /// Share of the iterations without the regularizer, 0..<1.
  package var warmStart = 0.2
  /// Adam's learning rate, positive.
  package var rate = 1e-3
  /// Output positions in a batch, and no more than 32 samples have. AIMET takes all positions of 32
  /// samples; neighbors in a picture say nearly the same, so fewer positions from all over the data
  /// serve as well and cost less.
  package var batchRows = 256
  /// Samples whose positions are the most that a batch takes.
  package static let batchSamples = 32
  /// Decides the order in which rows are visited.
  package var seed: UInt64 = 0

  package init() {}

  /// Iterations for weights of a width.
  package func iterations(bits: Int) -> Int { iterations ?? (bits >= 8 ? 10_000 : 15_000) }

  /// - Throws: `HalfstepError.invalidArgument` naming the option that is out of range.
  package func validate() throws(HalfstepError) {
    func fail(_ text: String) -> HalfstepError {
      HalfstepError(.invalidArgument, "AdaRound: \(text)")
    }
    if let iterations, !(1...100_000_000).contains(iterations) {
      throw fail("iterations: expected 1...100000000, got \(iterations)")
    }
    guard regularization >= 0, regularization <= 1e6 else {
      throw fail("regularization: expected 0...1000000, got \(regularization)")
    }
    guard (1...1000).contains(beta.start), (1...1000).contains(beta.end) else {
      throw fail("beta range: expected numbers in 1...1000, got \(beta.start) and \(beta.end)")
    }
    guard warmStart >= 0, warmStart < 1 else {
      throw fail("warm start: expected 0 or more and less than 1, got \(warmStart)")
    }
    guard rate > 0, rate <= 1 else {
      throw fail("learning rate: expected more than 0 and up to 1, got \(rate)")
    }
    guard (1...1 << 20).contains(batchRows) else {
      throw fail("batch: expected 1...1048576 rows, got \(batchRows)")
    }
  }
}
