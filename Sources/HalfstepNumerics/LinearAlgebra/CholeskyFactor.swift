// SPDX-License-Identifier: Apache-2.0
// The Cholesky factor of a positive definite matrix, in double precision.

import CLAPACK

/// The lower triangular L with `L·Lᵀ = A`, in double precision and row-major order.
///
/// OpenBLAS factors and multiplies tiles of fixed size, each on one thread and several at once, so that
/// the result does not depend on the number of threads. The upper triangle holds what it held before.
package struct CholeskyFactor: Sendable {
  /// Rows and columns.
  package let size: Int
  /// Elements, `[size, size]`.
  package private(set) var elements: [Double]

  /// The elements, whose memory goes to the caller.
  package consuming func releasedElements() -> [Double] { elements }

  /// Edge of a tile.
  private static let tile = 192
  /// Right sides that are solved together.
  private static let solvedTogether = 64

  /// Factors a matrix of which the lower triangle is read.
  ///
  /// - Parameters:
  ///   - matrix: Elements, `[size, size]`; becomes the factor.
  ///   - size: Rows, 0 or more.
  /// - Throws: `HalfstepError.numericFailure` if a pivot is not positive, or not finite.
  /// - Complexity: O(size³), on all threads.
  package init(_ matrix: consuming [Double], size: Int) throws(HalfstepError) {
    guard matrix.count == size * size, size < Int(Int32.max) else {
      throw HalfstepError(
        .numericFailure, "Cholesky factor: \(matrix.count) elements for \(size) rows")
    }
    self.size = size
    let failed = matrix.withUnsafeMutableBufferPointer { buffer in
      buffer.baseAddress.flatMap { start in
        LAPACK.onOneThread { Tiles(start: start, size: size).factor() }
      }
    }
    if let failed {
      throw HalfstepError(
        .numericFailure, "Cholesky: the matrix is not positive definite at row \(failed)")
    }
    elements = matrix
  }

  /// A matrix in memory, and what is done to its tiles.
  ///
  /// What is row-major here is the transpose to OpenBLAS, which counts columns first: the lower triangle
  /// is its upper one, "U".
  private struct Tiles: @unchecked Sendable {
    let start: UnsafeMutablePointer<Double>
    let size: Int

    /// Factors the matrix in place; returns a row whose pivot is bad, or nil.
    func factor() -> Int? {
      for first in stride(from: 0, to: size, by: tile) {
        let width = min(tile, size - first)
        if let failed = factorDiagonal(first, width) { return failed }
        let below = first + width
        let tiles = (size - below + tile - 1) / tile
        Parallel.forEachRange(tiles, grain: 1) { _, range in
          for index in range { solvePanel(first, width, below + index * tile) }
        }
        // Tiles on and below the diagonal, row by row.
        Parallel.forEachRange(tiles * (tiles + 1) / 2, grain: 1) { _, range in
          for index in range {
            var row = Int((Double(8 * index + 1).squareRoot() - 1) / 2)
            while row * (row + 1) / 2 > index { row -= 1 }
            while (row + 1) * (row + 2) / 2 <= index { row += 1 }
            let column = index - row * (row + 1) / 2
            update(first, width, below + row * tile, below + column * tile)
          }
        }
      }
      return nil
    }

    private func factorDiagonal(_ first: Int, _ width: Int) -> Int? {
      let corner = start + first * size + first
      var (n, lda, info) = (Int32(width), Int32(size), Int32(0))
      dpotrf_("U", &n, corner, &lda, &info, 1)
      if info > 0 { return first + Int(info) - 1 }
      return (0..<width).first { !corner[$0 * size + $0].isFinite }.map { first + $0 }
    }

    /// Solves a tile of the panel below the diagonal tile.
    private func solvePanel(_ first: Int, _ width: Int, _ row: Int) {
      var (m, n, lda) = (Int32(width), Int32(min(tile, size - row)), Int32(size))
      var one = 1.0
      dtrsm_(
        "L", "U", "T", "N", &m, &n, &one, start + first * size + first, &lda,
        start + row * size + first, &lda, 1, 1, 1, 1)
    }

    /// Subtracts the product of two tiles of the panel from a tile behind it.
    private func update(_ first: Int, _ width: Int, _ row: Int, _ column: Int) {
      var (rows, columns) = (Int32(min(tile, size - row)), Int32(min(tile, size - column)))
      var (k, lda) = (Int32(width), Int32(size))
      var (minus, one) = (-1.0, 1.0)
      let target = start + row * size + column
      if row == column {
        dsyrk_(
          "U", "T", &rows, &k, &minus, start + row * size + first, &lda, &one, target, &lda, 1, 1)
      } else {
        dgemm_(
          "T", "N", &columns, &rows, &k, &minus, start + column * size + first, &lda,
          start + row * size + first, &lda, &one, target, &lda, 1, 1)
      }
    }
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
        nonisolated(unsafe) let (b, l) = (start, lower)
        LAPACK.onOneThread {
          let parts = (count + Self.solvedTogether - 1) / Self.solvedTogether
          Parallel.forEachRange(parts, grain: 1) { _, range in
            for part in range {
              let first = part * Self.solvedTogether
              var (n, info) = (Int32(size), Int32(0))
              var sides = Int32(min(Self.solvedTogether, count - first))
              dpotrs_("U", &n, &sides, l, &n, b + first * size, &n, &info, 1)
            }
          }
        }
      }
    }
  }
}
