// SPDX-License-Identifier: Apache-2.0
// Parts of a tensor along its first dimension.

import HalfstepNumerics

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

/// Splits data into batches along the first dimension.
struct BatchSequence {
  let data: [String: Tensor]
  let rowCount: Int
  let batchSize: Int

  /// - Throws: `HalfstepError.invalidArgument` without data, rows or a batch size;
  ///   `.shapeMismatch` for a scalar or differing numbers of rows.
  init(_ data: [String: Tensor], batchSize: Int) throws(HalfstepError) {
    guard batchSize > 0 else {
      throw HalfstepError(.invalidArgument, "batch size: expected 1 or more, got \(batchSize)")
    }
    var rowCount: Int?
    for (name, tensor) in data.sorted(by: { $0.key < $1.key }) {
      guard let extent = tensor.shape.dimensions.first else {
        throw HalfstepError(.shapeMismatch, "calibration data '\(name)': a scalar has no rows")
      }
      if let rowCount, rowCount != extent {
        throw HalfstepError(
          .shapeMismatch, "calibration data '\(name)': expected \(rowCount) rows, got \(extent)")
      }
      rowCount = extent
    }
    guard let rowCount, rowCount > 0 else {
      throw HalfstepError(.invalidArgument, "calibration data: no rows")
    }
    self.data = data
    self.rowCount = rowCount
    self.batchSize = batchSize
  }

  var count: Int { (rowCount - 1) / batchSize + 1 }

  func batch(_ index: Int) throws(HalfstepError) -> [String: Tensor] {
    let start = index * batchSize
    let end = batchSize < rowCount - start ? start + batchSize : rowCount
    var batch: [String: Tensor] = [:]
    for (name, tensor) in data { batch[name] = try tensor.rows(start..<end) }
    return batch
  }
}
