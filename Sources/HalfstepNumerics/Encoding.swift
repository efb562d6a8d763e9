// SPDX-License-Identifier: Apache-2.0
// A quantizer's result: integer grid, scales and zero points.

/// The integer grid of one tensor: `real = scale · (code − zeroPoint)`.
public struct Encoding: Hashable, Sendable {
  /// Width of the codes, 2...16, or 32 for biases.
  public let bits: Int
  /// Whether codes are signed: −2^(bits−1)... instead of 0....
  public let isSigned: Bool
  /// Whether the quantizer was asked to be symmetric; zero points are then 0.
  public let isSymmetric: Bool
  /// Whether the lowest signed code is left out.
  public let isStrict: Bool
  /// Which elements share a scale.
  public let granularity: Granularity
  /// Positive finite steps with finite reciprocals, one a group, in tensor units per code.
  public let scales: [Float]
  /// Codes that stand for 0, one a group, each within the grid.
  public let zeroPoints: [Int32]

  /// Creates an encoding after checking its numbers.
  ///
  /// - Throws: `HalfstepError.invalidArgument` for a width outside 2...16 and 32, a scale that is not
  ///   positive and finite, a zero point outside the grid, or counts that differ.
  public init(
    bits: Int, isSigned: Bool, isSymmetric: Bool, isStrict: Bool = false,
    granularity: Granularity = .perTensor, scales: [Float], zeroPoints: [Int32]
  ) throws(HalfstepError) {
    guard QuantizerSpec.bitRange.contains(bits) || bits == 32 else {
      throw HalfstepError(.invalidArgument, "encoding: expected 2...16 or 32 bits, got \(bits)")
    }
    guard !scales.isEmpty, scales.count == zeroPoints.count else {
      throw HalfstepError(
        .invalidArgument,
        "encoding: \(scales.count) scales and \(zeroPoints.count) zero points")
    }
    self.bits = bits
    self.isSigned = isSigned
    self.isSymmetric = isSymmetric
    self.isStrict = isStrict
    self.granularity = granularity
    self.scales = scales
    self.zeroPoints = zeroPoints
    // A scale so small that its reciprocal overflows would turn zeros into NaN.
    for scale in scales where !(scale > 0 && scale.isFinite && (1 / scale).isFinite) {
      throw HalfstepError(.invalidArgument, "encoding: scale \(scale) is not positive and finite")
    }
    for zero in zeroPoints where Int(zero) < minimumCode || Int(zero) > maximumCode {
      throw HalfstepError(
        .invalidArgument, "encoding: zero point \(zero) is outside \(minimumCode)...\(maximumCode)")
    }
  }

  /// Lowest code of the grid.
  public var minimumCode: Int { isSigned ? -(1 << (bits - 1)) + (isStrict ? 1 : 0) : 0 }
  /// Highest code of the grid.
  public var maximumCode: Int { isSigned ? (1 << (bits - 1)) - 1 : (1 << bits) - 1 }
  /// Smallest real number of the grid in a group.
  public func minimum(group: Int) -> Double {
    Double(scales[group]) * Double(minimumCode - Int(zeroPoints[group]))
  }
  /// Largest real number of the grid in a group.
  public func maximum(group: Int) -> Double {
    Double(scales[group]) * Double(maximumCode - Int(zeroPoints[group]))
  }
}
