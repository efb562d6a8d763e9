// SPDX-License-Identifier: Apache-2.0
// Chooses the grid of a tensor from its statistics.

extension RangeStatistics {
  /// Chooses the grid for a tensor that was seen through these statistics (per tensor).
  ///
  /// Zero is always on the grid. Computed in `Double`; the scale is rounded to float at the end.
  ///
  /// - Parameters:
  ///   - spec: The kind of grid; its granularity is taken to be per tensor.
  ///   - scheme: How the range is chosen. All but `minMax` need a histogram.
  ///   - fixedMinimum: Replaces the lower end that was chosen, if given.
  ///   - fixedMaximum: Replaces the upper end that was chosen, if given.
  /// - Returns: A per-tensor encoding.
  /// - Throws: `HalfstepError.emptyStatistics` if nothing was seen and an end is not fixed;
  ///   `.invalidState` if the scheme needs a histogram that was not kept; `.invalidArgument` for a
  ///   width, percentile or fixed range that makes no sense.
  package func encoding(
    for spec: QuantizerSpec, scheme: RangeScheme, fixedMinimum: Double? = nil,
    fixedMaximum: Double? = nil
  ) throws(HalfstepError) -> Encoding {
    try spec.validate()
    try scheme.validate()
    for bound in [fixedMinimum, fixedMaximum] {
      if let bound, !(abs(bound) <= Double(Float.greatestFiniteMagnitude)) {
        throw HalfstepError(.invalidArgument, "fixed range: \(bound) is not a finite float")
      }
    }
    if isEmpty && (fixedMinimum == nil || fixedMaximum == nil) {
      throw HalfstepError(.emptyStatistics, "no values were seen")
    }
    let low = fixedMinimum ?? Double(minimum)
    let high = fixedMaximum ?? Double(maximum)
    if fixedMinimum != nil, fixedMaximum != nil, low > high {
      throw HalfstepError(.invalidArgument, "fixed range: \(low) is above \(high)")
    }
    let fit = GridFit(spec, minimum: low)
    guard scheme != .minMax, fixedMinimum == nil || fixedMaximum == nil, spec.bits <= 16 else {
      return try fit.encoding(
        [fit.covering(minimum: low, maximum: high)], granularity: .perTensor)
    }
    guard keepsHistogram else {
      throw HalfstepError(.invalidState, "range scheme \(scheme) needs a histogram")
    }
    var choice = choose(fit, scheme)
    if fixedMinimum != nil || fixedMaximum != nil {
      // The search decided about the free end only.
      let reach = fit.reach(of: choice)
      choice = fit.covering(
        minimum: fixedMinimum ?? max(low, reach.lowerBound),
        maximum: fixedMaximum ?? min(high, reach.upperBound))
    }
    return try fit.encoding([choice], granularity: .perTensor)
  }

  /// The grid that a scheme prefers; the histogram holds values.
  func choose(_ fit: GridFit, _ scheme: RangeScheme) -> GridChoice {
    let low = Double(minimum)
    let high = Double(maximum)
    let search = RangeSearch(fit: fit, minimum: low, maximum: high)
    switch scheme {
    case .minMax:
      return fit.covering(minimum: low, maximum: high)
    case .sqnr:
      let noise = HistogramNoise(self, clippingWeight: 3)
      return search.best { noise($0, fit: fit) }
    case .mse:
      let noise = HistogramNoise(self, clippingWeight: 1)
      return search.best { noise($0, fit: fit) }
    case .percentile(let percentile):
      let range = quantileRange(percentile)
      return fit.covering(minimum: range.lowerBound, maximum: range.upperBound)
    case .entropy:
      // A grid that tells all bins apart loses nothing.
      if fit.maximumCode - fit.minimumCode >= binCounts.count {
        return fit.covering(minimum: low, maximum: high)
      }
      let entropy = HistogramEntropy(self)
      return search.best { entropy($0, fit: fit) }
    }
  }

  /// The range between two quantiles, as bounds of the bins that hold them.
  ///
  /// - Parameter percentile: 50...100; the share 1 − percentile/100 lies outside on each side, at most.
  func quantileRange(_ percentile: Double) -> ClosedRange<Double> {
    let outside = Double(count) * (1 - percentile / 100)
    func edge(_ bins: some Sequence<Int>, step: Int) -> Int {
      var sum = 0.0
      for bin in bins {
        sum += Double(binCounts[bin])
        if sum > outside { return firstBin + bin + step }
      }
      return firstBin
    }
    let low = Double(edge(binCounts.indices, step: 0)) * binWidth
    let high = Double(edge(binCounts.indices.reversed(), step: 1)) * binWidth
    return max(low, Double(minimum))...max(min(high, Double(maximum)), low)
  }
}
