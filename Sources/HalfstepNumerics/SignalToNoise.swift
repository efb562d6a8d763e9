// SPDX-License-Identifier: Apache-2.0
// Signal-to-noise ratio between two buffers.

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// Power of a signal and of the noise in a copy of it: a commutative monoid under `merge`.
package struct SignalToNoise: Sendable, Hashable {
  /// Sum of the squares of the reference.
  package private(set) var signal: Double = 0
  /// Sum of the squares of the differences.
  package private(set) var noise: Double = 0

  /// Creates the ratio of nothing.
  package init() {}

  /// Compares two buffers.
  ///
  /// - Throws: `HalfstepError.shapeMismatch` if the counts differ.
  package init(
    reference: UnsafeBufferPointer<Float>, test: UnsafeBufferPointer<Float>
  ) throws(HalfstepError) {
    try add(reference: reference, test: test)
  }

  /// Compares two tensors of the same number of elements.
  ///
  /// - Throws: `HalfstepError.shapeMismatch` if the counts differ; `.typeMismatch` unless float32.
  package init(reference: Tensor, test: Tensor) throws(HalfstepError) {
    let sums = try reference.withFloats { (first) throws(HalfstepError) in
      try test.withFloats { (second) throws(HalfstepError) in
        try SignalToNoise(reference: first, test: second)
      }
    }
    self = sums
  }

  /// Adds the powers of two more buffers.
  ///
  /// Accumulates in `Double`, in an order that depends on the count only. NaN and infinities in either
  /// buffer give a ratio that is not a number.
  ///
  /// - Throws: `HalfstepError.shapeMismatch` if the counts differ; nothing is then added.
  /// - Complexity: O(elements).
  package mutating func add(
    reference: UnsafeBufferPointer<Float>, test: UnsafeBufferPointer<Float>
  ) throws(HalfstepError) {
    guard reference.count == test.count else {
      throw HalfstepError(
        .shapeMismatch,
        "signal to noise: expected \(reference.count) values, got \(test.count)")
    }
    guard let first = reference.baseAddress, let second = test.baseAddress else { return }
    var signals = SIMD8<Double>(repeating: 0)
    var noises = SIMD8<Double>(repeating: 0)
    let count = reference.count
    var index = 0
    while index &+ 8 <= count {
      for lane in 0..<8 {
        let value = Double(first[index &+ lane])
        let difference = Double(second[index &+ lane]) - value
        signals[lane] += value * value
        noises[lane] += difference * difference
      }
      index &+= 8
    }
    while index < count {
      let value = Double(first[index])
      let difference = Double(second[index]) - value
      signals[0] += value * value
      noises[0] += difference * difference
      index &+= 1
    }
    signal += signals.sum()
    noise += noises.sum()
  }

  /// Adds powers that were measured elsewhere.
  package mutating func merge(_ other: SignalToNoise) {
    signal += other.signal
    noise += other.noise
  }

  /// The ratio in decibels: `10·log₁₀(signal/noise)`.
  ///
  /// +∞ without noise (also for an all-zero reference that was matched); −∞ for noise on silence.
  package var decibels: Double {
    noise == 0 ? .infinity : 10 * log10(signal / noise)
  }
}
