// SPDX-License-Identifier: Apache-2.0
// Exponential, logarithm and logistic function of vectors, without calls into libm.

extension SIMD16<Float> {
  /// 2 to the power of each lane; lanes are first brought into −126...126. Within 2 ulps.
  @inline(__always) var exponentialBase2: Lanes {
    let x = atLeast(Lanes(repeating: -126)).atMost(Lanes(repeating: 126))
    let sum = x + roundingMagic
    let fraction = x - (sum - roundingMagic)
    // Taylor's series of 2^f for |f| ≤ 1/2: the first term left out is below 2⁻²⁷.
    var power = Lanes(repeating: 1.525_273e-5)
    power = power * fraction + 1.540_353e-4
    power = power * fraction + 1.333_356e-3
    power = power * fraction + 9.618_129e-3
    power = power * fraction + 5.550_411e-2
    power = power * fraction + 0.240_226_5
    power = power * fraction + 0.693_147_2
    power = power * fraction + 1
    // The low bits of `sum` hold the integer part.
    let bits = unsafeBitCast(sum, to: SIMD16<Int32>.self)
    let exponent = (bits &- (Int32(bitPattern: roundingMagic.bitPattern) &- 127)) &<< 23
    return power * unsafeBitCast(exponent, to: Lanes.self)
  }

  /// Logarithm to base 2 of positive normal lanes, absolute error below 2⁻²² or relative 2⁻²².
  @inline(__always) var logarithmBase2: Lanes {
    let bits = unsafeBitCast(self, to: SIMD16<Int32>.self)
    // Mantissas from √½ to √2, so that the logarithm near 1 loses nothing.
    let exponent = (bits &- 0x3F35_04F3) &>> 23
    let mantissa = unsafeBitCast(bits &- (exponent &<< 23), to: Lanes.self)
    let ratio = (mantissa - 1) / (mantissa + 1)
    let square = ratio * ratio
    // 2/ln 2 · (t + t³/3 + t⁵/5 + …), |t| ≤ 0.172: the first term left out is below 2⁻³⁰.
    var series = Lanes(repeating: 0.320_598_9)
    series = series * square + 0.412_198_6
    series = series * square + 0.577_078
    series = series * square + 0.961_796_7
    series = series * square + 2.885_390_1
    let integer =
      unsafeBitCast(exponent &+ Int32(bitPattern: roundingMagic.bitPattern), to: Lanes.self)
      - roundingMagic
    return series * ratio + integer
  }

  /// 1 / (1 + e^−x), within 4 ulps.
  @inline(__always) var logistic: Lanes {
    1 / (1 + (self * -1.442_695).exponentialBase2)
  }

  /// Square roots, lane by lane, which the optimizer turns into sqrtps.
  @inline(__always) var roots: Lanes {
    var result = self
    for lane in 0..<16 { result[lane] = self[lane].squareRoot() }
    return result
  }

  /// Magnitudes.
  @inline(__always) var magnitudes: Lanes {
    let bits = unsafeBitCast(self, to: SIMD16<UInt32>.self) & 0x7FFF_FFFF
    return unsafeBitCast(bits, to: Lanes.self)
  }

  /// Magnitudes of `self` with the signs of `other`.
  @inline(__always) func signed(as other: Lanes) -> Lanes {
    let sign = unsafeBitCast(other, to: SIMD16<UInt32>.self) & 0x8000_0000
    let rest = unsafeBitCast(self, to: SIMD16<UInt32>.self) & 0x7FFF_FFFF
    return unsafeBitCast(sign | rest, to: Lanes.self)
  }
}
