// SPDX-License-Identifier: Apache-2.0
// Expected squared quantization error of a histogram, in closed form.

/// Expected squared quantization error of values known by their histogram.
///
/// Values are taken to be spread evenly over their bin; the first bin starts at the smallest value and
/// the last one ends at the largest, so that a constant tensor is a point. All positions are in
/// units of the bin width, counted from zero. The integrals are exact for any step: with
/// steps wider than bins the sum goes over grid cells, otherwise over bins.
struct HistogramNoise {
  /// Weight of the squared error of values outside the grid's limits.
  let clippingWeight: Double
  private let binWidth: Double
  /// Position of the left edge of bin 0.
  private let first: Double
  private let low: Double
  private let high: Double
  private let counts: [Double]
  /// Sums of counts, first and second moments of the bins before each index.
  private var sums: [SIMD4<Double>] = []

  /// - Parameters:
  ///   - statistics: Keeps a histogram and is not empty.
  ///   - clippingWeight: 3 for AIMET's SQNR, 1 for the mean squared error.
  init(_ statistics: RangeStatistics, clippingWeight: Double) {
    self.clippingWeight = clippingWeight
    binWidth = statistics.binWidth
    first = Double(statistics.firstBin)
    low = Double(statistics.minimum) / binWidth
    high = Double(statistics.maximum) / binWidth
    // A bare `Double.init` would choose the initializer from a bit pattern.
    counts = statistics.binCounts.map { Double($0) }
    var total = SIMD4<Double>()
    sums.reserveCapacity(counts.count + 1)
    for bin in counts.indices {
      sums.append(total)
      let (left, right) = edges(of: bin)
      total += moments(counts[bin], left, right)
    }
    sums.append(total)
  }

  /// Expected weighted squared error of all values on a grid, in tensor units squared.
  func callAsFunction(_ choice: GridChoice, fit: GridFit) -> RangeCost {
    let step = choice.scale / binWidth
    let lowest = Double(fit.minimumCode - choice.zeroPoint)
    let highest = Double(fit.maximumCode - choice.zeroPoint)
    let clipping =
      clippingWeight
      * (squaredDistance(from: nil, to: lowest * step, center: lowest * step)
        + squaredDistance(from: highest * step, to: nil, center: highest * step))
    var error = clipping
    // Codes whose cells meet the data.
    let bottom = max(lowest, (low / step).rounded())
    let top = min(highest, (high / step).rounded())
    if bottom <= top {
      error +=
        top - bottom <= Double(counts.count)
        ? cellError(bottom, top, lowest, highest, step)
        : binError(max(low, lowest * step), min(high, highest * step), step)
    }
    let area = binWidth * binWidth
    return RangeCost(total: error * area, clipping: clipping * area)
  }

  // MARK: - Sums over cells

  private func cellError(
    _ bottom: Double, _ top: Double, _ lowest: Double, _ highest: Double, _ step: Double
  ) -> Double {
    var error = 0.0
    var before = cumulated(max(bottom - 0.5, lowest) * step)
    var code = bottom
    while code <= top {
      let after = cumulated(min(code + 0.5, highest) * step)
      error += Self.squaredDistance(after - before, center: code * step)
      before = after
      code += 1
    }
    return error
  }

  /// ∫(x − center)² over the values between two positions; nil means no limit.
  private func squaredDistance(from: Double?, to: Double?, center: Double) -> Double {
    let start = from.map(cumulated) ?? SIMD4<Double>()
    let end = to.map(cumulated) ?? sums[counts.count]
    return Self.squaredDistance(end - start, center: center)
  }

  private static func squaredDistance(_ sums: SIMD4<Double>, center: Double) -> Double {
    // Cancellation can leave a tiny negative number where nothing lies.
    max(sums[2] - 2 * center * sums[1] + center * center * sums[0], 0)
  }

  /// Count and moments of the values below a position.
  private func cumulated(_ position: Double) -> SIMD4<Double> {
    let offset = position - first
    if !(offset > 0) || position <= low { return SIMD4<Double>() }
    if position >= high { return sums[counts.count] }
    let bin = min(Int(offset), counts.count - 1)
    let (left, right) = edges(of: bin)
    if position <= left || right <= left { return sums[bin] }
    let share = (position - left) / (right - left)
    return sums[bin] + moments(counts[bin] * share, left, position)
  }

  private func edges(of bin: Int) -> (left: Double, right: Double) {
    let left = first + Double(bin)
    return (max(left, low), min(left + 1, high))
  }

  /// Count and moments of values spread evenly from `left` to `right`.
  private func moments(_ count: Double, _ left: Double, _ right: Double) -> SIMD4<Double> {
    SIMD4(
      count, count * (left + right) / 2,
      count * (left * left + left * right + right * right) / 3, 0)
  }

  // MARK: - Sums over bins

  /// Error of the values between two positions within the limits of the grid.
  private func binError(_ from: Double, _ to: Double, _ step: Double) -> Double {
    let reciprocal = 1 / step
    var error = 0.0
    var bin = max(0, Int((from - first).rounded(.down)))
    let last = min(counts.count - 1, Int((to - first).rounded(.down)))
    var start = Self.roundingIntegral(from * reciprocal)
    while bin <= last {
      let (left, right) = edges(of: bin)
      if right > left {
        let end = Self.roundingIntegral(min(right, to) * reciprocal)
        error += counts[bin] * (end - start) * step / (right - left)
        start = end
      } else {
        let code = (left * reciprocal).rounded()
        error += counts[bin] * (left * reciprocal - code) * (left * reciprocal - code)
      }
      bin += 1
    }
    return error * step * step
  }

  /// ∫₀ᵘ (v − round(v))² dv: a whole period gives 1/12.
  @inline(__always) private static func roundingIntegral(_ u: Double) -> Double {
    // 1.5·2⁵² leaves no fraction bits, so the addition rounds.
    let magic = 0x1.8p52
    let whole = (u + magic) - magic
    let rest = u - whole
    return whole * (1 / 12.0) + rest * rest * rest * (1 / 3.0)
  }
}
