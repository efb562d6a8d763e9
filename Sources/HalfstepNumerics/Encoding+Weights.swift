// SPDX-License-Identifier: Apache-2.0
// Chooses the grid of a constant from its values.

extension Encoding {
  /// Chooses the grid of a constant from its values, group by group.
  ///
  /// Symmetric unsigned codes are used only if no group holds a negative value. Scales of dead groups
  /// are raised to 2⁻²⁰ of the largest scale. Groups below 32,768 elements are searched on their
  /// values, larger ones on their histogram. The result does not depend on the number of threads.
  /// 32-bit grids cover the range whatever the scheme.
  ///
  /// - Parameters:
  ///   - weights: Values, float32, any shape that the granularity's axes fit.
  ///   - spec: The kind of grid and the groups.
  ///   - scheme: How each group's range is chosen.
  /// - Returns: An encoding of the specification's granularity.
  /// - Throws: `HalfstepError.nonFiniteValue` if a value is NaN or infinite; `.emptyStatistics` if the
  ///   tensor has no elements; `.typeMismatch` unless float32; `.invalidArgument` for a width, axis or
  ///   percentile outside its range; `.outOfMemory`.
  /// - Complexity: O(elements) for `minMax` and `percentile`, O(elements·candidates) for searches.
  package static func make(
    for weights: Tensor, spec: QuantizerSpec, scheme: RangeScheme
  ) throws(HalfstepError) -> Encoding {
    try spec.validate()
    try scheme.validate()
    let layout = try GroupLayout(spec.granularity, shape: weights.shape)
    return try weights.withFloats { (values) throws(HalfstepError) in
      guard let start = values.baseAddress, values.count > 0 else {
        throw HalfstepError(.emptyStatistics, "weight \(weights.shape) has no elements")
      }
      let ranges = try layout.ranges(of: start)
      let fit = GridFit(spec, minimum: Double(ranges.minimum.min() ?? 0))
      let choices =
        scheme == .minMax || spec.bits > 16
        ? zip(ranges.minimum, ranges.maximum).map { low, high in
          fit.covering(minimum: Double(low), maximum: Double(high))
        }
        : try WeightSearch(fit: fit, scheme: scheme, ranges: ranges).choices(start, layout)
      return try fit.encoding(choices, granularity: spec.granularity)
    }
  }
}

/// Chooses the grids of all groups of one constant.
private struct WeightSearch {
  let fit: GridFit
  let scheme: RangeScheme
  let ranges: GroupRanges

  /// Groups from this size on are searched on their histogram: its bins are so many and so full that
  /// treating each as even changes nothing that matters.
  private static let largeGroup = 1 << 15

  func choices(
    _ values: UnsafePointer<Float>, _ layout: GroupLayout
  ) throws(HalfstepError) -> [GridChoice] {
    let sizes = layout.groupSizes()
    // A copy in which each group is contiguous, and which selection may reorder.
    let copy = try TensorStorage(byteCount: layout.elementCount * MemoryLayout<Float>.stride)
    defer { withExtendedLifetime(copy) {} }
    let gathered = copy.baseAddress.bindMemory(to: Float.self, capacity: layout.elementCount)
    layout.gather(values, into: gathered, sizes: sizes)
    var starts = [0]
    for size in sizes { starts.append(starts[starts.count - 1] + size) }

    var result = [GridChoice](
      repeating: GridChoice(scale: fit.smallestScale, zeroPoint: 0), count: sizes.count)
    // Large groups one after the other, each on all threads; small ones side by side.
    var small: [Int] = []
    for group in sizes.indices {
      if sizes[group] < Self.largeGroup {
        small.append(group)
      } else {
        let part = UnsafeMutableBufferPointer(start: gathered + starts[group], count: sizes[group])
        result[group] = chooseByHistogram(UnsafeBufferPointer(part))
      }
    }
    result.withUnsafeMutableBufferPointer { result in
      guard let result = result.baseAddress else { return }
      let grain = max(1, (1 << 12) / max(layout.elementCount / max(sizes.count, 1), 1))
      Parallel.forEachRange(small.count, grain: grain) { _, range in
        for index in range {
          let group = small[index]
          if sizes[group] > 0 {
            result[group] = choose(gathered + starts[group], sizes[group], group)
          }
        }
      }
    }
    return result
  }

  private func chooseByHistogram(_ values: UnsafeBufferPointer<Float>) -> GridChoice {
    var statistics = RangeStatistics(keepsHistogram: true)
    statistics.observe(values)
    return statistics.choose(fit, scheme)
  }

  private func choose(
    _ values: UnsafeMutablePointer<Float>, _ count: Int, _ group: Int
  ) -> GridChoice {
    let low = Double(ranges.minimum[group])
    let high = Double(ranges.maximum[group])
    switch scheme {
    case .minMax:
      return fit.covering(minimum: low, maximum: high)
    case .sqnr:
      return leastNoise(values, count, low, high, clippingWeight: 3)
    case .mse:
      return leastNoise(values, count, low, high, clippingWeight: 1)
    case .percentile(let percentile):
      let outside = min(Int(Double(count) * (1 - percentile / 100)), count - 1)
      let lower = select(values, count: count, position: outside)
      let upper = select(values, count: count, position: count - 1 - outside)
      return fit.covering(minimum: Double(min(lower, upper)), maximum: Double(max(lower, upper)))
    case .entropy:
      // Fewer values than codes can be told apart without loss.
      if count <= fit.maximumCode - fit.minimumCode {
        return fit.covering(minimum: low, maximum: high)
      }
      return chooseByHistogram(UnsafeBufferPointer(start: values, count: count))
    }
  }

  private func leastNoise(
    _ values: UnsafePointer<Float>, _ count: Int, _ low: Double, _ high: Double,
    clippingWeight: Double
  ) -> GridChoice {
    // The error of few values is a bumpy function of the scale and needs more candidates.
    let search = RangeSearch(fit: fit, minimum: low, maximum: high, thorough: count < 4096)
    return search.best { choice in
      let grid = GridConstants(
        reciprocal: Float(1 / choice.scale), scale: Float(choice.scale),
        low: Float(fit.minimumCode - choice.zeroPoint),
        high: Float(fit.maximumCode - choice.zeroPoint))
      let noise = gridNoise(values, count: count, grid: grid)
      let area = choice.scale * choice.scale
      return RangeCost(
        total: (noise.total + (clippingWeight - 1) * noise.clipped) * area,
        clipping: clippingWeight * noise.clipped * area)
    }
  }
}
