// SPDX-License-Identifier: Apache-2.0
// Estimates of the time that is left.

import HalfstepAlgorithms
import HalfstepNumerics
import Testing

@Suite struct TimeEstimateTests {
  /// By hand: of two layers, one with three quarters of the arithmetic, the first is 1/4 + 3/8 = 5/8.
  @Test func layersCountByTheirArithmeticAndAlike() throws {
    let estimate = TimeEstimate(work: [3, 1])
    #expect(estimate.secondsLeft(0, 0, elapsed: 5) == nil)
    #expect(estimate.secondsLeft(1, 0, elapsed: 5) == 3)
    // Half of the first: 5/16 are done, 11/16 left.
    #expect(estimate.secondsLeft(0, 0.5, elapsed: 5) == 11)
    #expect(estimate.secondsLeft(1, 1, elapsed: 5) == 0)
    #expect(estimate.secondsLeft(2, 0, elapsed: 5) == nil)
    #expect(TimeEstimate(work: []).secondsLeft(0, 0, elapsed: 1) == nil)
    // Layers without arithmetic count alike.
    #expect(TimeEstimate(work: [0, 0]).secondsLeft(1, 0, elapsed: 4) == 4)
  }

  @Test func roundingTellsTimeThatIsLeft() throws {
    var graph = try LayerWalkTests.graph()
    var told: [Double] = []
    try LayerReconstruction(options: try LayerWalkTests.options()).apply(
      to: &graph, batches: [["x": try LayerWalkTests.data(24)]], rounder: GramRounding()
    ) { state in
      if let left = state.secondsLeft { told.append(left) }
      return true
    }
    #expect(!told.isEmpty && told.allSatisfy { $0 >= 0 && $0.isFinite })
  }
}
