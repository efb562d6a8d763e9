// SPDX-License-Identifier: Apache-2.0
// What a quantizer is asked to be, before it has seen data.

/// What a quantizer is asked to be: width, symmetry and granularity, before it has seen data.
public struct QuantizerSpec: Hashable, Sendable {
  /// Width of the integer codes, 2...16, or 32 for biases.
  public var bits: Int
  /// Whether zero sits in the middle of the grid (signed codes, zero point 0).
  public var isSymmetric: Bool
  /// Whether a symmetric grid leaves out its lowest code, so that it has as many negative codes as
  /// positive ones.
  public var isStrict: Bool
  /// Whether a symmetric quantizer that saw no negative value uses unsigned codes.
  public var allowsUnsigned: Bool
  /// Which elements share a scale.
  public var granularity: Granularity

  /// Creates a description of a quantizer.
  public init(
    bits: Int, isSymmetric: Bool, isStrict: Bool = false, allowsUnsigned: Bool = false,
    granularity: Granularity = .perTensor
  ) {
    self.bits = bits
    self.isSymmetric = isSymmetric
    self.isStrict = isStrict
    self.allowsUnsigned = allowsUnsigned
    self.granularity = granularity
  }

  /// Widths that quantizers may have.
  public static let bitRange = 2...16
}
