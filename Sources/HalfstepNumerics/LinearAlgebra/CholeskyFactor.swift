// SPDX-License-Identifier: Apache-2.0
// The Cholesky factor of a positive definite matrix, in double precision.

/// The lower triangular L with `L·Lᵀ = A`, in double precision and row-major order.
///
/// Computed in blocks on all threads; every element is summed in a fixed order, so that the result does
/// not depend on their number. The upper triangle holds what it held before.
package struct CholeskyFactor: Sendable {
  /// Rows and columns.
  package let size: Int
  /// Elements, `[size, size]`.
  package private(set) var elements: [Double]

  private static let block = 64

  /// Factors a matrix of which the lower triangle is read.
  ///
  /// - Parameters:
  ///   - matrix: Elements, `[size, size]`, finite; becomes the factor.
  ///   - size: Rows, 0 or more.
  /// - Throws: `HalfstepError.numericFailure` if a pivot is not positive.
  /// - Complexity: O(size³).
  package init(_ matrix: consuming [Double], size: Int) throws(HalfstepError) {
    guard matrix.count == size * size else {
      throw HalfstepError(
        .numericFailure, "Cholesky factor: \(matrix.count) elements for \(size) rows")
    }
    self.size = size
    var failed = -1
    matrix.withUnsafeMutableBufferPointer { buffer in
      guard let start = buffer.baseAddress else { return }
      nonisolated(unsafe) let a = start
      var first = 0
      while first < size, failed < 0 {
        let width = min(Self.block, size - first)
        failed = Self.factorDiagonal(a, size, first, width)
        if failed >= 0 { break }
        let below = first + width
        let from = first
        Parallel.forEachRange(size - below, grain: 16) { _, range in
          for row in range { Self.solvePanelRow(a, size, from, width, below + row) }
        }
        // Rows in fours; long rows come last, so that ends are dealt out first.
        let quads = (size - below + 3) / 4
        Parallel.forEachRange(quads, grain: 4) { _, range in
          for index in range {
            // Pairs of a short and a long row go to the same thread.
            let quad = index % 2 == 0 ? index / 2 : quads - 1 - index / 2
            Self.updateRows(a, size, from, width, below, below + 4 * quad)
          }
        }
        first += width
      }
    }
    guard failed < 0 else {
      throw HalfstepError(
        .numericFailure, "Cholesky: the matrix is not positive definite at row \(failed)")
    }
    elements = matrix
  }

  /// Factors a diagonal block; returns a row whose pivot is not positive, or −1.
  private static func factorDiagonal(
    _ a: UnsafeMutablePointer<Double>, _ size: Int, _ first: Int, _ width: Int
  ) -> Int {
    for column in first..<first + width {
      for row in column..<first + width {
        var sum = a[row * size + column]
        for k in first..<column { sum -= a[row * size + k] * a[column * size + k] }
        if row == column {
          guard sum > 0, sum.isFinite else { return row }
          a[row * size + column] = sum.squareRoot()
        } else {
          a[row * size + column] = sum / a[column * size + column]
        }
      }
    }
    return -1
  }

  private static func solvePanelRow(
    _ a: UnsafeMutablePointer<Double>, _ size: Int, _ first: Int, _ width: Int, _ row: Int
  ) {
    let own = a + row * size
    for column in first..<first + width {
      var sum = own[column]
      let other = a + column * size
      for k in first..<column { sum -= own[k] * other[k] }
      own[column] = sum / other[column]
    }
  }

  /// Subtracts the panel's products from four rows, up to their diagonals.
  private static func updateRows(
    _ a: UnsafeMutablePointer<Double>, _ size: Int, _ first: Int, _ width: Int, _ below: Int,
    _ row: Int
  ) {
    let rows = min(4, size - row)
    if rows < 4 {
      for r in row..<row + rows {
        for column in below...r {
          a[r * size + column] -= dot(a + r * size + first, a + column * size + first, width)
        }
      }
      return
    }
    let r0 = a + row * size
    let (r1, r2, r3) = (r0 + size, r0 + 2 * size, r0 + 3 * size)
    var column = below
    while column + 1 <= row {
      // Two columns at a time, all left of the four diagonals.
      let isPair = column + 2 <= row + 1
      let c0 = a + column * size + first
      let c1 = isPair ? c0 + size : c0
      var (s00, s10) = (SIMD2<Double>(), SIMD2<Double>())
      var (s20, s30) = (SIMD2<Double>(), SIMD2<Double>())
      var (s01, s11) = (SIMD2<Double>(), SIMD2<Double>())
      var (s21, s31) = (SIMD2<Double>(), SIMD2<Double>())
      var k = 0
      while k + 2 <= width {
        let (x, y) = (load(c0 + k), load(c1 + k))
        let (v0, v1) = (load(r0 + first + k), load(r1 + first + k))
        let (v2, v3) = (load(r2 + first + k), load(r3 + first + k))
        s00 += v0 * x
        s10 += v1 * x
        s20 += v2 * x
        s30 += v3 * x
        s01 += v0 * y
        s11 += v1 * y
        s21 += v2 * y
        s31 += v3 * y
        k += 2
      }
      if k < width {
        let f = first + k
        s00[0] += r0[f] * c0[k]
        s10[0] += r1[f] * c0[k]
        s20[0] += r2[f] * c0[k]
        s30[0] += r3[f] * c0[k]
        s01[0] += r0[f] * c1[k]
        s11[0] += r1[f] * c1[k]
        s21[0] += r2[f] * c1[k]
        s31[0] += r3[f] * c1[k]
      }
      r0[column] -= s00[0] + s00[1]
      r1[column] -= s10[0] + s10[1]
      r2[column] -= s20[0] + s20[1]
      r3[column] -= s30[0] + s30[1]
      if isPair {
        r0[column + 1] -= s01[0] + s01[1]
        r1[column + 1] -= s11[0] + s11[1]
        r2[column + 1] -= s21[0] + s21[1]
        r3[column + 1] -= s31[0] + s31[1]
      }
      column += isPair ? 2 : 1
    }
    for r in row..<row + 4 where column <= r {
      for c in column...r {
        a[r * size + c] -= dot(a + r * size + first, a + c * size + first, width)
      }
    }
  }

  @inline(__always)
  private static func load(_ pointer: UnsafePointer<Double>) -> SIMD2<Double> {
    UnsafeRawPointer(pointer).loadUnaligned(as: SIMD2<Double>.self)
  }

  private static func dot(
    _ x: UnsafePointer<Double>, _ y: UnsafePointer<Double>, _ count: Int
  ) -> Double {
    var sum = SIMD2<Double>()
    var k = 0
    while k + 2 <= count {
      sum += load(x + k) * load(y + k)
      k += 2
    }
    if k < count { sum[0] += x[k] * y[k] }
    return sum[0] + sum[1]
  }

  /// Solves `x·A = b` for rows b in place.
  ///
  /// - Parameter rows: Right sides, `[n, size]`; become the solutions.
  /// - Complexity: O(n · size²), on all threads.
  package func solve(rows: inout [Double]) {
    let size = size
    guard size > 0 else { return }
    let count = rows.count / size
    rows.withUnsafeMutableBufferPointer { rows in
      elements.withUnsafeBufferPointer { elements in
        guard let start = rows.baseAddress, let lower = elements.baseAddress else { return }
        nonisolated(unsafe) let b = start
        nonisolated(unsafe) let l = lower
        // Four right sides share each reading of a row of the factor.
        Parallel.forEachRange((count + 3) / 4, grain: 1) { _, range in
          for quad in range {
            let part = 4 * quad..<min(4 * quad + 4, count)
            for row in 0..<size {
              let factor = l + row * size
              for index in part {
                let x = b + index * size
                x[row] = (x[row] - Self.dot(x, factor, row)) / factor[row]
              }
            }
            for row in stride(from: size - 1, through: 0, by: -1) {
              let factor = l + row * size
              for index in part {
                let x = b + index * size
                let value = x[row] / factor[row]
                x[row] = value
                for k in 0..<row { x[k] -= value * factor[k] }
              }
            }
          }
        }
      }
    }
  }
}
