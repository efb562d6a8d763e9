// SPDX-License-Identifier: Apache-2.0
// Collects the statistics of one batch, aside from those that count.

import HalfstepNumerics
import HalfstepRuntime

/// Collects the statistics of one batch, aside from those that count, so that a failed run leaves no
/// trace.
final class CalibrationObserver: TensorObserver {
  let tensors: [String]
  /// What the batch held, by position in `tensors`.
  private(set) var batch: [RangeStatistics]
  /// The first tensor that held a NaN or an infinity.
  private(set) var nonFinite: String?
  private let positions: [String: Int]
  private let empty: RangeStatistics

  init(_ tensors: [String], keepsHistogram: Bool) {
    self.tensors = tensors
    empty = RangeStatistics(keepsHistogram: keepsHistogram)
    batch = Array(repeating: empty, count: tensors.count)
    positions = Dictionary(uniqueKeysWithValues: tensors.enumerated().map { ($1, $0) })
  }

  /// Starts a batch.
  func begin() {
    nonFinite = nil
    for index in batch.indices { batch[index] = empty }
  }

  /// Lets go of the batch's histograms.
  func end() { begin() }

  func observe(_ tensor: String, values: UnsafeBufferPointer<Float>, paddingZeros: Int) {
    guard nonFinite == nil, let position = positions[tensor] else { return }
    batch[position].observe(values, paddingZeros: paddingZeros)
    if batch[position].sawNonFinite { nonFinite = tensor }
  }
}
