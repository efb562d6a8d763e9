// SPDX-License-Identifier: Apache-2.0
// Statistics depend on the multiset of values and on nothing else.

import HalfstepNumerics
import Testing

@Suite struct RangeStatisticsTests {
  @Test func binsAreAlignedPowersOfTwo() {
    // The largest magnitude is 3, in [2, 4): bins are 2^(1−11) = 2^−10 wide, and 3 is in bin 3072.
    let statistics = observed([3, 0, -0.0005, 2.9995])
    #expect(statistics.count == 4)
    #expect(statistics.minimum == -0.0005 && statistics.maximum == 3)
    #expect(statistics.binWidth == 0x1p-10)
    #expect(statistics.firstBin == -1)
    #expect(statistics.binCounts.count == 3074)
    #expect(statistics.binCounts[0] == 1)  // −0.0005
    #expect(statistics.binCounts[1] == 1)  // 0
    #expect(statistics.binCounts[1 + 3071] == 1)  // 2.9995 / 2^−10 = 3071.5
    #expect(statistics.binCounts[1 + 3072] == 1)
  }

  @Test func coarseningAddsNeighbors() {
    var statistics = observed([0.25, 0.25 + 0x1p-13])
    #expect(statistics.binWidth == 0x1p-13 && statistics.binCounts == [1, 1])
    statistics.observe([-1])
    #expect(statistics.binWidth == 0x1p-11)
    #expect(statistics == observed([-1, 0.25 + 0x1p-13, 0.25]))
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
