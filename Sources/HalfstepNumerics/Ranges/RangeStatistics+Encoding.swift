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
    if scheme == .minMax || (fixedMinimum != nil && fixedMaximum != nil) {
      return try fit.encoding(
        [fit.covering(minimum: low, maximum: high)], granularity: .perTensor)
    }
    throw HalfstepError(.internalError, "under construction")
  }
}
