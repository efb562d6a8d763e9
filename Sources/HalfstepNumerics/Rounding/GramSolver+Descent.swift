// SPDX-License-Identifier: Apache-2.0
// Improves codes one at a time, and searches short rows exactly.

extension GramSolver {
  /// Rows up to this many columns are searched.
  package static let searchLimit = 32

  /// Goes over the columns of every row, and gives each code the value that is best for the others as
  /// they are.
  ///
  /// The cost of no row rises. Gradients are computed anew at the start of each sweep.
  ///
  /// - Parameter sweeps: Times to go over all columns at most; ends when nothing moves.
  /// - Complexity: O(rowCount · columns · (columns + codes that move)) a sweep, on all threads.
  package func descend(sweeps: Int) throws(HalfstepError) {
    guard let grid else { return }
    let (n, rows) = (columns, rowCount)
    for _ in 0..<sweeps {
      var moved = [Bool](repeating: false, count: rows)
      codes.withUnsafeMutableBufferPointer { codes in
        gradients.withUnsafeMutableBufferPointer { gradients in
          hessian.withUnsafeBufferPointer { hessian in
            moved.withUnsafeMutableBufferPointer { moved in
              nonisolated(unsafe) let (c, r) = (codes.baseAddress!, gradients.baseAddress!)
              nonisolated(unsafe) let h = hessian.baseAddress!
              nonisolated(unsafe) let moved = moved
              Parallel.forEachRange(rows, grain: 1) { _, range in
                for row in range {
                  moved[row] = sweep(row, grid, c + row * n, r + row * n, h)
                }
              }
            }
          }
        }
      }
      try refresh()
      if !moved.contains(true) { return }
    }
  }

  private func sweep(
    _ row: Int, _ grid: RoundingGrid, _ codes: UnsafeMutablePointer<Float>,
    _ gradient: UnsafeMutablePointer<Float>, _ hessian: UnsafePointer<Float>
  ) -> Bool {
    let n = columns
    var hasMoved = false
    for column in stride(from: n - 1, through: 0, by: -1) {
      let scale = grid.scales[row * grid.blocks + block(column, grid)]
      let curvature = hessian[column * n + column]
      let wanted = codes[column] + gradient[column] / (curvature * scale)
      // Moves below half a step are the common case.
      if abs(wanted - codes[column]) <= 0.5 { continue }
      let (low, high) = bounds(row, column, grid)
      let next = min(max(wanted, low), high).rounded(.toNearestOrEven)
      let change = (next - codes[column]) * scale
      if change == 0 { continue }
      // Moves that gain less than float gradients can tell are left out.
      let gain = change * (2 * gradient[column] - change * curvature)
      if !(gain > 1e-5 * scale * scale * curvature) { continue }
      codes[column] = next
      hasMoved = true
      let own = hessian + column * n
      for other in 0..<n { gradient[other] -= change * own[other] }
    }
    return hasMoved
  }

  /// Finds the best codes of every row for the scales as they are.
  ///
  /// A depth-first search from column to column that visits codes in the order of their distance and
  /// leaves out what cannot beat the best so far. Exact unless a row takes more than `nodes` steps; the
  /// codes never become worse.
  ///
  /// - Parameter nodes: Codes to try for a row.
  package func search(nodes: Int) throws(HalfstepError) {
    guard let grid, columns <= Self.searchLimit else { return }
    let limits = costs()
    for row in 0..<rowCount { searchRow(row, grid, limits[row], nodes) }
    try refresh()
  }

  private func searchRow(_ row: Int, _ grid: RoundingGrid, _ start: Double, _ nodes: Int) {
    let n = columns
    let base = row * n
    var scale = [Double](repeating: 0, count: n)
    var low = scale
    var high = scale
    for i in 0..<n {
      scale[i] = Double(grid.scales[row * grid.blocks + block(i, grid)])
      let limits = bounds(row, i, grid)
      (low[i], high[i]) = (Double(limits.low), Double(limits.high))
    }
    // Sums of the errors of later columns through the factor, one row for each depth.
    var carried = [Double](repeating: 0, count: (n + 1) * n)
    var center = [Double](repeating: 0, count: n)
    var code = center
    var below = center
    var above = center
    var cost = [Double](repeating: 0, count: n + 1)
    var best = start * (1 - 1e-6)
    var found: [Double]?
    var left = nodes
    var depth = n - 1

    func pivot(_ i: Int) -> Double { Double(factor[i * n + i]) }
    func enter(_ i: Int) {
      center[i] = (Double(target[base + i]) + carried[(i + 1) * n + i] / pivot(i)) / scale[i]
      code[i] = min(max(center[i].rounded(.toNearestOrEven), low[i]), high[i])
      below[i] = code[i] - 1
      above[i] = code[i] + 1
    }
    /// Goes to the next nearest code; false if there is none.
    func next(_ i: Int) -> Bool {
      let hasBelow = below[i] >= low[i]
      let hasAbove = above[i] <= high[i]
      if hasBelow && (!hasAbove || center[i] - below[i] <= above[i] - center[i]) {
        code[i] = below[i]
        below[i] -= 1
        return true
      }
      guard hasAbove else { return false }
      code[i] = above[i]
      above[i] += 1
      return true
    }
    enter(depth)
    while left > 0 {
      left -= 1
      let rest = pivot(depth) * scale[depth] * (center[depth] - code[depth])
      let sum = cost[depth + 1] + rest * rest
      var isLeaving = sum >= best
      if !isLeaving {
        if depth == 0 {
          best = sum
          found = code
          isLeaving = true
        } else {
          cost[depth] = sum
          let error = Double(target[base + depth]) - scale[depth] * code[depth]
          for k in 0..<depth {
            carried[depth * n + k] =
              carried[(depth + 1) * n + k] + error * Double(factor[depth * n + k])
          }
          depth -= 1
          enter(depth)
          continue
        }
      }
      // Codes come in the order of their cost: none after this one at this depth is better.
      depth += 1
      while depth < n, !next(depth) { depth += 1 }
      if depth == n { break }
    }
    guard let found else { return }
    for i in 0..<n { codes[base + i] = Float(found[i]) }
  }
}
