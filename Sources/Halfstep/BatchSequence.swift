// SPDX-License-Identifier: Apache-2.0
// Data cut into batches.

import HalfstepNumerics

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
