// SPDX-License-Identifier: Apache-2.0
// Leading singular vectors in single precision, where that is exact enough.

import CLAPACK

extension Matrix {
  /// Least eigenvalue of the Gram matrix over the largest whose vector is taken from floats.
  ///
  /// The Gram matrix in floats is off by some 2⁻²³ of its largest eigenvalue λ, which mixes vectors of
  /// eigenvalues near μ by some 2⁻²³·λ/μ: at most 10⁻⁵ of what is kept changes places with what is
  /// nearly as good, so that the loss is the least to about the square of that.
  private static let leastShare: Float = 0.01

  /// The leading singular vectors on the shorter side of a matrix A of floats, and what A makes of
  /// them.
  ///
  /// Eigenvectors of A·Aᵀ or Aᵀ·A, whichever is smaller, as from `largestEigenpairs`, but in floats: in
  /// half the time.
  ///
  /// - Parameters:
  ///   - values: A, column by column, `[columns, rows]`; finite.
  ///   - count: How many.
  /// - Returns: Vectors, `[min(rows, columns), count]`, and Aᵀ or A times them; nil where floats do not
  ///   tell the vectors, where all of them are wanted, or where LAPACK fails.
  /// - Precondition: There are rows · columns values. No caller's data decides that.
  /// - Complexity: O(rows · columns · min(rows, columns)).
  package static func leadingVectors(
    _ values: [Float], rows: Int, columns: Int, _ count: Int
  ) -> (basis: Matrix, image: Matrix)? {
    precondition(values.count == rows * columns)
    let isLeft = rows <= columns
    let (size, other) = isLeft ? (rows, columns) : (columns, rows)
    guard (1..<max(size, 1)).contains(count) else { return nil }
    var gram = [Float](repeating: 0, count: size * size)
    var (n, m, k, lda) = (Int32(size), Int32(other), Int32(count), Int32(rows))
    var (one, zero) = (Float(1), Float(0))
    ssyrk_(
      "L", isLeft ? "N" : "T", &n, &m, &one, values, &lda, &zero, &gram, &n, 1, 1)
    // Squares may overflow, or lose digits where they are next to nothing.
    let trace = (0..<size).reduce(0) { $0 + gram[$1 * size + $1] }
    guard trace.isFinite, trace > Float(size) * 0x1p-80,
      let found = try? Float.largestEigenpairs(&gram, rows: size, count),
      found.values[count - 1] >= found.values[0] * leastShare
    else { return nil }
    var image = [Float](repeating: 0, count: other * count)
    sgemm_(
      isLeft ? "T" : "N", "N", &m, &k, &n, &one, values, &lda, found.vectors, &n, &zero, &image, &m,
      1, 1)
    return (
      Matrix(rows: size, columns: count, values: found.vectors.map(Double.init)),
      Matrix(rows: other, columns: count, values: image.map(Double.init))
    )
  }
}
