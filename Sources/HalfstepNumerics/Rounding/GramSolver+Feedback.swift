// SPDX-License-Identifier: Apache-2.0
// Rounds column by column and feeds errors forward.

import CDNNL

extension GramSolver {
  /// Rows that are rounded side by side.
  private static let lanes = 32
  /// Columns between two products with the rest of the factor.
  private static let width = 32

  /// Rounds all rows with feedback.
  ///
  /// - Parameter grid: Steps and code ranges.
  /// - Returns: Codes in the order of work, `[rowCount, columns]`, and `(t − q)·H·(t − q)` of each row.
  /// - Complexity: O(rowCount · columns²), on all threads.
  package func feedback(_ grid: RoundingGrid) -> (codes: [Float], costs: [Double]) {
    var codes = [Float](repeating: 0, count: rowCount * columns)
    var costs = [Double](repeating: 0, count: rowCount)
    codes.withUnsafeMutableBufferPointer { codes in
      costs.withUnsafeMutableBufferPointer { costs in
        factor.withUnsafeBufferPointer { factor in
          nonisolated(unsafe) let (codes, costs) = (codes, costs)
          nonisolated(unsafe) let lower = factor.baseAddress!
          MatrixProduct.onOneThreadEach((rowCount + Self.lanes - 1) / Self.lanes) { part in
            let rows = part * Self.lanes..<min((part + 1) * Self.lanes, rowCount)
            round(rows, grid, lower, codes, costs)
          }
        }
      }
    }
    return (codes, costs)
  }

  /// Rounds up to `lanes` rows; everything is kept column by column, rows side by side.
  private func round(
    _ rows: Range<Int>, _ grid: RoundingGrid, _ lower: UnsafePointer<Float>,
    _ codes: UnsafeMutableBufferPointer<Float>, _ costs: UnsafeMutableBufferPointer<Double>
  ) {
    let n = columns
    let lanes = Self.lanes
    let memory = UnsafeMutablePointer<Float>.allocate(capacity: (2 * n + 5) * lanes)
    defer { memory.deallocate() }
    memory.initialize(repeating: 0, count: (2 * n + 5) * lanes)
    let carried = memory
    let errors = memory + n * lanes
    let scale = errors + n * lanes
    let low = scale + lanes
    let high = low + lanes
    let aim = high + lanes
    let cost = aim + lanes
    // Empty lanes round zeros.
    for lane in 0..<lanes { scale[lane] = 1 }
    var end = n
    var lastBlock = -1
    while end > 0 {
      let start = max(0, end - Self.width)
      for i in stride(from: end - 1, through: start, by: -1) {
        let pivot = lower[i * n + i]
        let own = block(i, grid)
        if own != lastBlock || anchors != nil {
          lastBlock = own
          for row in rows {
            let lane = row - rows.lowerBound
            scale[lane] = grid.scales[row * grid.blocks + own]
            (low[lane], high[lane]) = bounds(row, i, grid)
          }
        }
        for row in rows { aim[row - rows.lowerBound] = target[row * n + i] }
        let carry = carried + i * lanes
        let error = errors + i * lanes
        let inverse = 1 / pivot
        for lane in 0..<lanes {
          let wanted = aim[lane] + carry[lane] * inverse
          let limited = min(max(wanted / scale[lane], low[lane]), high[lane])
          let code = (limited + roundingMagic) - roundingMagic
          let value = code * scale[lane]
          let rest = pivot * (wanted - value)
          cost[lane] += rest * rest
          error[lane] = aim[lane] - value
          aim[lane] = code
        }
        for row in rows { codes[row * n + i] = aim[row - rows.lowerBound] }
        for k in start..<i {
          let share = lower[i * n + k]
          let to = carried + k * lanes
          for lane in 0..<lanes { to[lane] += share * error[lane] }
        }
      }
      if start > 0 {
        _ = MatrixProduct.single(
          rows: start, columns: lanes, inner: end - start,
          .init(lower + start * n, stride: n, isTransposed: true),
          .init(errors + start * lanes, stride: lanes), keep: 1, into: carried, cStride: lanes)
      }
      end = start
    }
    for row in rows { costs[row] = Double(cost[row - rows.lowerBound]) }
  }
}
