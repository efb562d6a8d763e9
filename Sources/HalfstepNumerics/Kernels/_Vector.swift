// SPDX-License-Identifier: Apache-2.0
// The vector type of the kernels, and the few operations that all of them use.

/// Sixteen floats: four SSE registers, enough independent work to hide latencies.
typealias Lanes = SIMD16<Float>

extension SIMD16<Float> {
  /// Floats in one vector.
  @inline(__always) static var width: Int { 16 }

  @inline(__always) init(loading pointer: UnsafePointer<Float>) {
    self = UnsafeRawPointer(pointer).loadUnaligned(as: Lanes.self)
  }
  @inline(__always) func store(to pointer: UnsafeMutablePointer<Float>) {
    UnsafeMutableRawPointer(pointer).storeBytes(of: self, as: Lanes.self)
  }

  // The two selections are written lane by lane because the optimizer turns exactly this into one
  // maxps or minps a register; masks and `pointwiseMax` compile to four instructions or to a loop.

  /// The larger of each pair; `other` where `self` is NaN, and where both are zeros.
  @inline(__always) func atLeast(_ other: Lanes) -> Lanes {
    var result = other
    for lane in 0..<16 { result[lane] = self[lane] > other[lane] ? self[lane] : other[lane] }
    return result
  }
  /// The smaller of each pair; `other` where `self` is NaN, and where both are zeros.
  @inline(__always) func atMost(_ other: Lanes) -> Lanes {
    var result = other
    for lane in 0..<16 { result[lane] = self[lane] < other[lane] ? self[lane] : other[lane] }
    return result
  }

  /// The nearest integers, ties to even, for magnitudes up to 2²²; zeros come out positive.
  ///
  /// Adding 1.5·2²³ leaves no fraction bits, so the addition itself rounds. No rounding instruction
  /// and no libm call are needed on a baseline x86-64.
  @inline(__always) var roundedToEven: Lanes { (self + roundingMagic) - roundingMagic }
}

/// 1.5·2²³: a float whose unit in the last place is 1, for sums within ±2²² of it.
let roundingMagic: Float = 12_582_912
