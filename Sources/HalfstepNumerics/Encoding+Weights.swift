// SPDX-License-Identifier: Apache-2.0
// Chooses the grid of a constant from its values.

extension Encoding {
  /// Chooses the grid of a constant from its values, group by group.
  ///
  /// - Throws: `HalfstepError.nonFiniteValue` if a value is NaN or infinite.
  package static func make(
    for weights: Tensor, spec: QuantizerSpec, scheme: RangeScheme
  ) throws(HalfstepError) -> Encoding {
    throw HalfstepError(.internalError, "under construction")
  }
}
