// SPDX-License-Identifier: Apache-2.0
// The grid between the ends of a range, as range learning trains them.

extension Encoding {
  /// The grid whose lowest and highest codes stand for the ends of each group's range.
  ///
  /// With N steps the scale is `(maximum − minimum)/N`, in double precision, then rounded to float. A
  /// symmetric grid's zero point is 0 wherever the range lies; an asymmetric one's is
  /// `round(−minimum/scale)`, half to even, counted from the lowest code and kept within the grid. Ends on
  /// the wrong side of zero count as 0, and a scale is at least what a min-max range would get. Unlike
  /// the grid that covers data, a symmetric one takes both ends alike, so that each has a gradient.
  ///
  /// - Parameters:
  ///   - minimums: Lower ends, one a group. Must be finite.
  ///   - maximums: Upper ends, one a group. Must be finite.
  ///   - bits: Width of the codes, 2...16.
  ///   - isSigned: Whether codes are signed.
  ///   - isSymmetric: Whether zero points are 0.
  ///   - isStrict: Whether the lowest signed code is left out.
  ///   - granularity: Which elements share a scale.
  /// - Returns: An encoding with one scale a group.
  /// - Throws: `HalfstepError.nonFiniteValue` for an end that is NaN or infinite; `.shapeMismatch` if the
  ///   numbers of ends differ; `.invalidArgument` for a width outside 2...16, or no groups.
  package static func spanning(
    minimums: UnsafeBufferPointer<Float>, maximums: UnsafeBufferPointer<Float>, bits: Int,
    isSigned: Bool, isSymmetric: Bool, isStrict: Bool, granularity: Granularity = .perTensor
  ) throws(HalfstepError) -> Encoding {
    guard QuantizerSpec.bitRange.contains(bits) else {
      throw HalfstepError(.invalidArgument, "range: expected 2...16 bits, got \(bits)")
    }
    guard minimums.count == maximums.count else {
      throw HalfstepError(
        .shapeMismatch, "range: \(minimums.count) minimums and \(maximums.count) maximums")
    }
    let lowest = isSigned ? -(1 << (bits - 1)) + (isStrict ? 1 : 0) : 0
    let highest = isSigned ? (1 << (bits - 1)) - 1 : (1 << bits) - 1
    let steps = Double(highest - lowest)
    let smallest = GridFit(QuantizerSpec(bits: bits, isSymmetric: isSymmetric), minimum: -1)
      .smallestScale
    var scales: [Float] = []
    var zeros: [Int32] = []
    for (group, ends) in zip(minimums, maximums).enumerated() {
      guard ends.0.isFinite, ends.1.isFinite else {
        throw HalfstepError(
          .nonFiniteValue, "range of group \(group): \(ends.0)...\(ends.1) is not finite")
      }
      let low = min(Double(ends.0), 0)
      let scale = max((max(Double(ends.1), 0) - low) / steps, smallest)
      // Two ends may be further apart than the largest float, their step may not.
      scales.append(Float(scale))
      let zero = isSymmetric ? 0 : min((-low / scale).rounded(.toNearestOrEven), steps)
      zeros.append(Int32(zero) + (isSymmetric ? 0 : Int32(lowest)))
    }
    return try Encoding(
      bits: bits, isSigned: isSigned, isSymmetric: isSymmetric, isStrict: isStrict,
      granularity: granularity, scales: scales, zeroPoints: zeros)
  }
}

extension Encoding {
  /// Ends of a range for each group, from which `spanning` makes this very encoding.
  ///
  /// They are the reals of the lowest and highest codes, rounded to float. Where the rounding would
  /// change the scale, the end further from zero is rounded toward zero and the other one makes up for
  /// it; that end's floats are close enough together.
  ///
  /// - Returns: Lower and upper ends, one a group.
  /// - Throws: `HalfstepError.invalidArgument` if no range gives a group's grid: a symmetric grid with a
  ///   zero point other than 0, 32 bits, or a scale below the least one.
  package func ends() throws(HalfstepError) -> (minimums: [Float], maximums: [Float]) {
    var minimums: [Float] = []
    var maximums: [Float] = []
    let steps = Double(maximumCode - minimumCode)
    for (scale, zero) in zip(scales, zeroPoints) {
      let below = Double(scale) * Double(Int(zero) - minimumCode)
      let above = Double(scale) * Double(maximumCode - Int(zero))
      var low = Float(below)
      var high = Float(above)
      if Float((Double(high) + Double(low)) / steps) != scale {
        let width = Double(scale) * steps
        if above >= below {
          high = Self.roundedDown(above)
          low = Float(width - Double(high))
        } else {
          low = Self.roundedDown(below)
          high = Float(width - Double(low))
        }
      }
      minimums.append(low == 0 ? 0 : -low)
      maximums.append(high)
    }
    let made = try minimums.withUnsafeBufferPointer { (low) throws(HalfstepError) in
      try maximums.withUnsafeBufferPointer { (high) throws(HalfstepError) in
        try Encoding.spanning(
          minimums: low, maximums: high, bits: bits, isSigned: isSigned, isSymmetric: isSymmetric,
          isStrict: isStrict, granularity: granularity)
      }
    }
    guard made == self else {
      let group = scales.indices.first {
        made.scales[$0] != scales[$0] || made.zeroPoints[$0] != zeroPoints[$0]
      }
      throw HalfstepError(
        .invalidArgument,
        "group \(group ?? 0): no range has scale \(scales[group ?? 0]) and zero point "
          + "\(zeroPoints[group ?? 0])")
    }
    return (minimums, maximums)
  }

  /// The largest float that is not above a number.
  private static func roundedDown(_ value: Double) -> Float {
    let rounded = Float(value)
    return Double(rounded) > value ? rounded.nextDown : rounded
  }
}
