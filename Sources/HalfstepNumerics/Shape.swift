// SPDX-License-Identifier: Apache-2.0
// Tensor dimensions whose product is known not to overflow.

/// The dimensions of a tensor, outermost first; never negative, with a product that fits in `Int`.
public struct Shape: Hashable, Sendable, CustomStringConvertible {
  /// Extents, outermost first; empty for a scalar.
  public let dimensions: [Int]
  /// Product of the extents; 1 for a scalar.
  public let elementCount: Int

  /// Creates a shape after checking each extent and the product.
  ///
  /// - Parameter dimensions: Extents, each 0 or more.
  /// - Throws: `HalfstepError.invalidArgument` for a negative extent, a rank above 32, or a product
  ///   of 2⁴⁸ or more.
  public init(_ dimensions: [Int]) throws(HalfstepError) {
    guard dimensions.count <= Self.maximumRank else {
      throw HalfstepError(
        .invalidArgument, "shape: expected rank up to 32, got \(dimensions.count)")
    }
    // Zero extents are left out of the overflow check, so that [0, 2^40, 2^40] is refused as well.
    var magnitude = 1
    for extent in dimensions {
      guard extent >= 0 else {
        throw HalfstepError(.invalidArgument, "shape \(dimensions): negative extent")
      }
      let (product, overflow) = magnitude.multipliedReportingOverflow(by: max(extent, 1))
      guard !overflow, product < Self.elementLimit else {
        throw HalfstepError(.invalidArgument, "shape \(dimensions): too many elements")
      }
      magnitude = product
    }
    self.dimensions = dimensions
    self.elementCount = dimensions.contains(0) ? 0 : magnitude
  }

  private init(unchecked dimensions: [Int], count: Int) {
    self.dimensions = dimensions
    self.elementCount = count
  }

  /// The shape of a single number.
  public static let scalar = Shape(unchecked: [], count: 1)

  /// The shape of a vector.
  ///
  /// - Parameter count: Elements; the caller holds a collection of that many, so it is in range.
  public static func vector(_ count: Int) -> Shape { Shape(unchecked: [count], count: count) }

  /// Largest rank that is accepted.
  public static let maximumRank = 32
  /// Products at or above this are refused: byte counts derived from them must not overflow.
  public static let elementLimit = 1 << 48

  /// Number of dimensions.
  public var rank: Int { dimensions.count }
  /// The extent at `index`, which must be a valid index.
  public subscript(index: Int) -> Int { dimensions[index] }

  /// Elements between neighbors along each dimension of a row-major tensor.
  public var strides: [Int] {
    var result = [Int](repeating: 1, count: rank)
    for axis in stride(from: rank - 2, through: 0, by: -1) {
      result[axis] = result[axis + 1] * max(dimensions[axis + 1], 1)
    }
    return result
  }

  public var description: String { dimensions.description }
}
