// SPDX-License-Identifier: Apache-2.0
// Singular values and vectors of a matrix, by the eigenvectors of its smaller Gram matrix.

import HalfstepNumerics

/// Singular values and vectors of a matrix A, `[rows, columns]`, from which factors of any rank come.
///
/// Eigenvectors of A·Aᵀ or Aᵀ·A, whichever is smaller, in `Double`: for float weights the smallest
/// singular values come out as exactly as from an SVD in float. The first of the largest components of
/// a left vector is positive.
package struct SingularDecomposition: Sendable {
  /// Singular values in falling order, `[min(rows, columns)]`.
  package let values: [Double]
  /// Left vectors if there are at most as many rows as columns, else A times the right vectors.
  private let left: Matrix
  /// Right vectors, `[columns, k]`, or Aᵀ times the left vectors.
  private let right: Matrix
  private let basisIsLeft: Bool

  /// Decomposes a matrix.
  ///
  /// - Throws: `HalfstepError.numericFailure` for NaN or infinity, or if LAPACK does not converge.
  /// - Complexity: O(rows · columns · min(rows, columns)).
  package init(_ matrix: Matrix) throws(HalfstepError) {
    basisIsLeft = matrix.rows <= matrix.columns
    let size = min(matrix.rows, matrix.columns)
    let basis = try matrix.gram(transposed: !basisIsLeft).largestEigenpairs(size).vectors
    var image = Matrix.product(matrix, transposed: basisIsLeft, basis)
    var aligned = basis
    if !basisIsLeft {
      for column in 0..<size where Self.peakIsNegative(image, column) {
        Self.negate(&image, column)
        Self.negate(&aligned, column)
      }
    }
    var values: [Double] = []
    for column in 0..<size {
      var sum = 0.0
      for row in 0..<image.rows { sum += image[row, column] * image[row, column] }
      values.append(sum.squareRoot())
    }
    // The order is that of the eigenvalues; lengths differ from it by rounding only.
    for index in values.indices.dropFirst() {
      values[index] = min(values[index], values[index - 1])
    }
    self.values = values
    left = basisIsLeft ? aligned : image
    right = basisIsLeft ? image : aligned
  }

  private static func peakIsNegative(_ matrix: Matrix, _ column: Int) -> Bool {
    var peak = 0.0
    for row in 0..<matrix.rows where matrix[row, column].magnitude > peak.magnitude {
      peak = matrix[row, column]
    }
    return peak < 0
  }

  private static func negate(_ matrix: inout Matrix, _ column: Int) {
    for row in 0..<matrix.rows { matrix[row, column].negate() }
  }

  /// How the singular values are shared between the factors.
  package enum Split: Sendable {
    /// √S to each factor.
    case even
    /// All of S to the right factor; the left one has orthonormal columns.
    case right
  }

  /// The best approximation of a rank as a product.
  ///
  /// - Parameters:
  ///   - rank: 1...min(rows, columns).
  ///   - split: Which factor gets the singular values.
  /// - Returns: Left factor, `[rows, rank]`, and the transpose of the right one, `[columns, rank]`.
  package func factors(rank: Int, _ split: Split) -> (left: Matrix, rightTransposed: Matrix) {
    var a = Matrix(rows: left.rows, columns: rank)
    var b = Matrix(rows: right.rows, columns: rank)
    // Below this a singular value is rounding noise, and its vectors mean nothing.
    let floor = (values.first ?? 0) * 1e-14
    for column in 0..<rank {
      let value = values[column]
      guard value > floor else { continue }
      let (leftScale, rightScale): (Double, Double)
      switch split {
      case .even: (leftScale, rightScale) = (value.squareRoot(), value.squareRoot())
      case .right: (leftScale, rightScale) = (1, value)
      }
      // One of the two already carries the singular value.
      let (p, q) = basisIsLeft ? (leftScale, rightScale / value) : (leftScale / value, rightScale)
      for row in 0..<a.rows { a[row, column] = left[row, column] * p }
      for row in 0..<b.rows { b[row, column] = right[row, column] * q }
    }
    return (a, b)
  }

  /// The share of the matrix's squared length that each rank loses, `[k + 1]` for ranks 0...k.
  package var lostShares: [Double] {
    var tail = 0.0
    var result = [0.0]
    for value in values.reversed() {
      tail += value * value
      result.append(tail)
    }
    result.reverse()
    let all = result[0]
    return all > 0 ? result.map { $0 / all } : result
  }
}
