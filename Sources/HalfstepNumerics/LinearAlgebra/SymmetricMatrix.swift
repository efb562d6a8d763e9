// SPDX-License-Identifier: Apache-2.0
// Symmetric matrices: products, eigenvectors, Cholesky factors. OpenBLAS does the work.

import CLAPACK
import Synchronization

/// Runs OpenBLAS on one thread at a time, so that results do not depend on the number of threads.
package enum LAPACK {
  /// Largest extent of a matrix: LAPACK counts elements in 32 bits.
  package static let extentLimit = 32_768

  /// Bodies that run, and the threads that OpenBLAS had before the first of them.
  private static let running = Mutex((bodies: 0, threads: Int32(1)))

  /// Has OpenBLAS use one thread for the time of `body`, and of all others that overlap with it.
  package static func onOneThread<R, E: Error>(_ body: () throws(E) -> R) throws(E) -> R {
    running.withLock { state in
      if state.bodies == 0 {
        state.threads = openblas_get_num_threads()
        if state.threads != 1 { openblas_set_num_threads(1) }
      }
      state.bodies += 1
    }
    defer {
      running.withLock { state in
        state.bodies -= 1
        if state.bodies == 0, state.threads != 1 { openblas_set_num_threads(state.threads) }
      }
    }
    return try body()
  }
}

/// A matrix of doubles, column by column.
package struct Matrix: Sendable {
  package let rows: Int
  package let columns: Int
  /// Elements, a column after the other, `[columns, rows]` in row-major terms.
  package var values: [Double]

  /// Creates a matrix of zeros.
  package init(rows: Int, columns: Int) {
    self.rows = rows
    self.columns = columns
    values = [Double](repeating: 0, count: rows * columns)
  }

  /// Creates a matrix from its elements, column by column.
  ///
  /// - Precondition: There are rows · columns of them. No caller's data decides that: callers allocate.
  package init(rows: Int, columns: Int, values: [Double]) {
    precondition(values.count == rows * columns)
    self.rows = rows
    self.columns = columns
    self.values = values
  }

  package subscript(row: Int, column: Int) -> Double {
    get { values[column * rows + row] }
    set { values[column * rows + row] = newValue }
  }

  /// The product of two matrices, either of them transposed if wanted.
  ///
  /// - Precondition: Inner extents agree. Callers multiply a matrix with one made from it.
  /// - Complexity: O(rows · inner · columns).
  package static func product(
    _ a: Matrix, transposed transposeA: Bool = false, _ b: Matrix,
    transposed transposeB: Bool = false
  ) -> Matrix {
    let (m, k) = transposeA ? (a.columns, a.rows) : (a.rows, a.columns)
    let n = transposeB ? b.rows : b.columns
    precondition(k == (transposeB ? b.columns : b.rows))
    var c = Matrix(rows: m, columns: n)
    guard m > 0, n > 0, k > 0 else { return c }
    var (m32, n32, k32) = (Int32(m), Int32(n), Int32(k))
    var (lda, ldb) = (Int32(a.rows), Int32(b.rows))
    var (one, zero) = (1.0, 0.0)
    dgemm_(
      transposeA ? "T" : "N", transposeB ? "T" : "N", &m32, &n32, &k32, &one, a.values, &lda,
      b.values, &ldb, &zero, &c.values, &m32, 1, 1)
    return c
  }

  /// A · Aᵀ, or Aᵀ · A: symmetric and complete.
  ///
  /// - Complexity: O(n² · k).
  package func gram(transposed: Bool = false) -> Matrix {
    let (n, k) = transposed ? (columns, rows) : (rows, columns)
    var c = Matrix(rows: n, columns: n)
    guard n > 0, k > 0 else { return c }
    var (n32, k32, lda) = (Int32(n), Int32(k), Int32(rows))
    var (one, zero) = (1.0, 0.0)
    dsyrk_(
      "L", transposed ? "T" : "N", &n32, &k32, &one, values, &lda, &zero, &c.values, &n32, 1, 1)
    c.mirrorLowerTriangle()
    return c
  }

  /// Copies the lower triangle to the upper one.
  package mutating func mirrorLowerTriangle() {
    let n = rows
    values.withUnsafeMutableBufferPointer { values in
      for column in 0..<n {
        for row in column + 1..<max(n, column + 1) {
          values[row * n + column] = values[column * n + row]
        }
      }
    }
  }

  /// The largest eigenvalues of a symmetric matrix and their vectors.
  ///
  /// The sign of a vector is chosen so that its component of largest magnitude, the first of
  /// several, is positive.
  ///
  /// - Parameter count: How many, 1...rows.
  /// - Returns: Eigenvalues in falling order, `[rows]` of them all if `count` is `rows`, else
  ///   `[count]`; vectors, `[rows, count]`.
  /// - Throws: `HalfstepError.numericFailure` if the matrix holds NaN or infinity, or LAPACK does not
  ///   converge.
  /// - Complexity: O(rows³).
  package func largestEigenpairs(
    _ count: Int
  ) throws(HalfstepError) -> (values: [Double], vectors: Matrix) {
    guard rows == columns, count >= 1, count <= rows else {
      throw HalfstepError(
        .numericFailure, "eigenvalues: \(count) of a matrix of \(rows) by \(columns)")
    }
    guard values.allSatisfy(\.isFinite) else {
      throw HalfstepError(.numericFailure, "eigenvalues: the matrix holds NaN or infinity")
    }
    var a = values
    let found = try Double.largestEigenpairs(&a, rows: rows, count)
    return (found.values, Matrix(rows: rows, columns: count, values: found.vectors))
  }

  /// Solves A · X = B for a symmetric positive definite A.
  ///
  /// - Parameter right: B, `[rows, n]`.
  /// - Returns: X; nil if the matrix is not positive definite.
  /// - Complexity: O(rows³ + rows² · n).
  package func solvedPositiveDefinite(_ right: Matrix) -> Matrix? {
    guard rows == columns, right.rows == rows else { return nil }
    guard rows > 0 else { return right }
    var a = values
    var x = right
    var (n, count, info) = (Int32(rows), Int32(right.columns), Int32(0))
    dpotrf_("L", &n, &a, &n, &info, 1)
    guard info == 0 else { return nil }
    dpotrs_("L", &n, &count, a, &n, &x.values, &n, &info, 1)
    return info == 0 && x.values.allSatisfy(\.isFinite) ? x : nil
  }

  /// The lower triangular L with `L·Lᵀ` equal to a symmetric positive definite matrix; zeros above.
  ///
  /// - Returns: nil if the matrix is not positive definite.
  /// - Complexity: O(rows³).
  package func choleskyFactor() -> Matrix? {
    guard rows == columns, rows > 0 else { return nil }
    var a = self
    var (n, info) = (Int32(rows), Int32(0))
    dpotrf_("L", &n, &a.values, &n, &info, 1)
    guard info == 0 else { return nil }
    for column in 1..<max(rows, 1) {
      for row in 0..<column { a.values[column * rows + row] = 0 }
    }
    return a.values.allSatisfy(\.isFinite) ? a : nil
  }

  /// Solves L · X = B, or Lᵀ · X = B, where L is this matrix's lower triangle, or a leading part of
  /// it.
  ///
  /// - Parameters:
  ///   - right: B, `[k, n]` with k of at most `rows`: the leading k rows and columns are used.
  ///   - isTransposed: Whether Lᵀ stands on the left.
  /// - Precondition: The diagonal has no zeros, as in a factor that `choleskyFactor()` gave.
  /// - Complexity: O(k² · n).
  package func solvedTriangular(_ right: Matrix, isTransposed: Bool) -> Matrix {
    precondition(right.rows <= rows)
    var x = right
    guard x.rows > 0, x.columns > 0 else { return x }
    var (m, n, lda) = (Int32(x.rows), Int32(x.columns), Int32(rows))
    var one = 1.0
    dtrsm_(
      "L", "L", isTransposed ? "T" : "N", "N", &m, &n, &one, values, &lda, &x.values, &m, 1, 1, 1,
      1)
    return x
  }
}
