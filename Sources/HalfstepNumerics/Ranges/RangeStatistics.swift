// SPDX-License-Identifier: Apache-2.0
// What a quantizer remembers of the values it saw.

/// What a quantizer remembers of the values it saw: a commutative monoid under `merge`.
///
/// The state is a function of the multiset of values: it does not depend on their order, batches,
/// threads or processes, bit for bit. It holds the number of values, their minimum and maximum, and on
/// request a histogram whose bins are `[i·2^e, (i+1)·2^e)`. The exponent depends on the largest
/// magnitude alone (see `binExponent(forMagnitude:)`), and a histogram moves to a larger exponent by
/// adding neighbors, which is exact because ⌊⌊x/2^e⌋/2⌋ = ⌊x/2^(e+1)⌋. Negative zero counts as zero.
/// Non-finite values set a flag and are otherwise ignored.
package struct RangeStatistics: Sendable, Hashable {
  /// Whether a histogram is kept beside minimum and maximum.
  package let keepsHistogram: Bool
  /// Number of finite values seen.
  package internal(set) var count: UInt64 = 0
  /// Smallest finite value seen; +∞ if there was none.
  package internal(set) var minimum: Float = .infinity
  /// Largest finite value seen; −∞ if there was none.
  package internal(set) var maximum: Float = -.infinity
  /// Whether a NaN or an infinity was seen.
  package internal(set) var sawNonFinite: Bool = false
  /// Values in each bin, from the minimum's bin to the maximum's; empty without a histogram.
  package internal(set) var binCounts: [UInt64] = []

  /// Creates statistics of nothing.
  package init(keepsHistogram: Bool) { self.keepsHistogram = keepsHistogram }

  /// Whether no finite value was seen.
  package var isEmpty: Bool { count == 0 }

  // MARK: - Bins

  /// Most bins on either side of zero; data up to the largest magnitude takes 2,049...4,096.
  static let binsPerSide = 4096
  /// Most values that statistics may count; adding a tensor to that cannot overflow.
  static let countLimit: UInt64 = 1 << 62
  /// Smallest exponent of the bin width. Magnitudes below 2⁻¹⁰⁰ all share the bins next to zero.
  static let minimumExponent = -100

  /// Exponent `e` of the bin width 2^e for data of a given largest magnitude.
  ///
  /// For a magnitude in [2^k, 2^(k+1)) it is k − 11, but never less than `minimumExponent`.
  static func binExponent(forMagnitude magnitude: Float) -> Int {
    guard magnitude > 0 else { return minimumExponent }
    return max(Int(magnitude.exponent) - 11, minimumExponent)
  }

  /// Index of the bin that holds a finite value: ⌊x/2^e⌋.
  static func binIndex(_ value: Float, exponent: Int) -> Int {
    // A power of two scales exactly, and the quotient is below 4,096 by choice of the exponent.
    Int((Double(value) * Double(sign: .plus, exponent: -exponent, significand: 1)).rounded(.down))
  }

  /// Largest finite magnitude seen; 0 if there was none.
  var magnitude: Float { isEmpty ? 0 : max(maximum, -minimum) }
  /// Exponent of the width of the bins.
  package var binExponent: Int { Self.binExponent(forMagnitude: magnitude) }
  /// Width of the bins, a power of two.
  package var binWidth: Double { Double(sign: .plus, exponent: binExponent, significand: 1) }
  /// Index of the first bin of `binCounts`: that bin starts at `firstBin · binWidth`.
  package var firstBin: Int { isEmpty ? 0 : Self.binIndex(minimum, exponent: binExponent) }

  // MARK: - Merging

  /// Adds what another quantizer saw.
  ///
  /// - Throws: `HalfstepError.invalidArgument` if only one of the two keeps a histogram;
  ///   `.numericFailure` if the number of values would exceed 2⁶². The state is then unchanged.
  /// - Complexity: O(bins).
  package mutating func merge(_ other: RangeStatistics) throws(HalfstepError) {
    guard keepsHistogram == other.keepsHistogram else {
      throw HalfstepError(
        .invalidArgument, "cannot merge statistics with a histogram and statistics without")
    }
    guard count + other.count <= Self.countLimit else {
      throw HalfstepError(.numericFailure, "statistics count more than 2^62 values")
    }
    add(other)
  }

  /// Merges statistics of the same kind whose counts are known not to overflow.
  mutating func add(_ other: RangeStatistics) {
    sawNonFinite = sawNonFinite || other.sawNonFinite
    if other.isEmpty { return }
    widen(to: other.minimum, other.maximum)
    count += other.count
    if keepsHistogram {
      let shift = binExponent - other.binExponent
      let start = other.firstBin
      let first = firstBin
      for (offset, amount) in other.binCounts.enumerated() where amount > 0 {
        binCounts[((start + offset) >> shift) - first] += amount
      }
    }
  }

  /// Extends the range to new extremes, and the bins with it; the caller adds the counts.
  mutating func widen(to low: Float, _ high: Float) {
    let old = self
    // Adding zero makes a negative zero positive: equal multisets give equal bits.
    minimum = min(minimum, low) + 0
    maximum = max(maximum, high) + 0
    guard keepsHistogram else { return }
    if minimum == old.minimum && maximum == old.maximum { return }
    let exponent = Self.binExponent(forMagnitude: max(maximum, -minimum))
    let first = Self.binIndex(minimum, exponent: exponent)
    let last = Self.binIndex(maximum, exponent: exponent)
    binCounts = [UInt64](repeating: 0, count: last - first + 1)
    guard !old.isEmpty else { return }
    let shift = exponent - old.binExponent
    let start = old.firstBin
    for (offset, amount) in old.binCounts.enumerated() {
      binCounts[((start + offset) >> shift) - first] += amount
    }
  }
}
