// SPDX-License-Identifier: Apache-2.0
// What a quantizer remembers of the values it saw.

/// What a quantizer remembers of the values it saw: a commutative monoid under `merge`.
///
/// The state depends on the multiset of values only, not on their order, batches or threads.
package struct RangeStatistics: Sendable, Hashable {
  package init(keepsHistogram: Bool) {}

  /// Adds values; `paddingZeros` of them are zeros that the memory layout added and do not count.
  package mutating func observe(_ values: UnsafeBufferPointer<Float>, paddingZeros: Int = 0) {}
  /// Adds what another quantizer saw.
  package mutating func merge(_ other: RangeStatistics) throws(HalfstepError) {}
  package func serialized() -> [UInt8] { [] }
  package init(serialized bytes: [UInt8]) throws(HalfstepError) {
    throw HalfstepError(.internalError, "under construction")
  }
  /// Whether a NaN or an infinity was seen.
  package var sawNonFinite: Bool { false }
  package var isEmpty: Bool { true }

  /// Chooses the grid for a tensor that was seen through these statistics (per tensor).
  package func encoding(
    for spec: QuantizerSpec, scheme: RangeScheme, fixedMinimum: Double? = nil,
    fixedMaximum: Double? = nil
  ) throws(HalfstepError) -> Encoding {
    throw HalfstepError(.internalError, "under construction")
  }
}
