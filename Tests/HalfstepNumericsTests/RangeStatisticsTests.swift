// SPDX-License-Identifier: Apache-2.0
// Statistics depend on the multiset of values and on nothing else.

import HalfstepNumerics
import Testing

@Suite struct RangeStatisticsTests {
  @Test func binsAreAlignedPowersOfTwo() {
    // The largest magnitude is 3, in [2, 4): bins are 2^(1−10) = 2^−9 wide, and 3 is in bin 1536.
    let statistics = observed([3, 0, -0.001, 2.999])
    #expect(statistics.count == 4)
    #expect(statistics.minimum == -0.001 && statistics.maximum == 3)
    #expect(statistics.binWidth == 0x1p-9)
    #expect(statistics.firstBin == -1)
    #expect(statistics.binCounts.count == 1538)
    #expect(statistics.binCounts[0] == 1)  // −0.001
    #expect(statistics.binCounts[1] == 1)  // 0
    #expect(statistics.binCounts[1 + 1535] == 1)  // 2.999 / 2^−9 = 1535.5
    #expect(statistics.binCounts[1 + 1536] == 1)
  }

  @Test func coarseningAddsNeighbors() {
    var statistics = observed([0.25, 0.25 + 0x1p-12])
    #expect(statistics.binWidth == 0x1p-12 && statistics.binCounts == [1, 1])
    statistics.observe([-1])
    #expect(statistics.binWidth == 0x1p-10)
    #expect(statistics == observed([-1, 0.25 + 0x1p-12, 0.25]))
  }
}

/// Statistics with a histogram of some values.
func observed(_ values: [Float]) -> RangeStatistics {
  var statistics = RangeStatistics(keepsHistogram: true)
  statistics.observe(values)
  return statistics
}

extension RangeStatistics {
  /// Adds the values of an array.
  mutating func observe(_ values: [Float]) { values.withUnsafeBufferPointer { observe($0) } }
}
