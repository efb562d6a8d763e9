// SPDX-License-Identifier: Apache-2.0
// Chooses the grid of a constant from its values.

extension Encoding {
  /// Chooses the grid of a constant from its values, group by group.
  ///
  /// Symmetric unsigned codes are used only if no group holds a negative value. Scales of dead groups
  /// are raised to 2⁻²⁰ of the largest scale.
  ///
  /// - Parameters:
  ///   - weights: Values, float32, any shape that the granularity's axes fit.
  ///   - spec: The kind of grid and the groups.
  ///   - scheme: How each group's range is chosen.
  /// - Returns: An encoding of the specification's granularity.
  /// - Throws: `HalfstepError.nonFiniteValue` if a value is NaN or infinite; `.emptyStatistics` if the
  ///   tensor has no elements; `.typeMismatch` unless float32; `.invalidArgument` for a width, axis or
  ///   percentile outside its range.
  /// - Complexity: O(elements) for `minMax`, O(elements·candidates) for searches.
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
      if scheme == .minMax || spec.bits == 32 {
        let choices = zip(ranges.minimum, ranges.maximum).map { low, high in
          fit.covering(minimum: Double(low), maximum: Double(high))
        }
        return try fit.encoding(choices, granularity: spec.granularity)
      }
      throw HalfstepError(.internalError, "under construction")
    }
  }
}
