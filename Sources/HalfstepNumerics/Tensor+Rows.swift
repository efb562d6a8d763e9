// SPDX-License-Identifier: Apache-2.0
// Parts of a tensor along its first dimension.

extension Tensor {
  /// Rows of a tensor, sharing its memory.
  ///
  /// - Parameter rows: Positions along the first dimension, within its extent.
  /// - Returns: A tensor `[rows.count, …]` over the same memory; writing to it copies.
  /// - Throws: `HalfstepError.shapeMismatch` for a scalar; `.invalidArgument` for rows outside the
  ///   tensor; `.typeMismatch` if an element takes less than a byte.
  public func rows(_ rows: Range<Int>) throws(HalfstepError) -> Tensor {
    guard let extent = shape.dimensions.first else {
      throw HalfstepError(.shapeMismatch, "rows \(rows): expected rank 1 or more, got a scalar")
    }
    guard rows.lowerBound >= 0, rows.upperBound <= extent else {
      throw HalfstepError(.invalidArgument, "rows \(rows): outside shape \(shape)")
    }
    guard let bits = dataType.bitWidth, bits >= 8 else {
      throw HalfstepError(.typeMismatch, "rows of \(dataType): elements share bytes")
    }
    if rows.count == extent { return self }
    let part = try Shape([rows.count] + shape.dimensions.dropFirst())
    let rowBytes = Tensor.byteCount(of: dataType, count: count / Swift.max(extent, 1))
    let owner = storage
    let memory = TensorStorage(
      borrowing: owner.baseAddress + rows.lowerBound * rowBytes, byteCount: rows.count * rowBytes,
      release: { withExtendedLifetime(owner) {} })
    return try Tensor(dataType, shape: part, storage: memory)
  }
}
