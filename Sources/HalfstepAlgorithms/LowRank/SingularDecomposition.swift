// SPDX-License-Identifier: Apache-2.0
// Singular values and vectors of a matrix, by the eigenvectors of its smaller Gram matrix.

import HalfstepNumerics

/// Singular values and vectors of a matrix A, `[rows, columns]`, from which factors of any rank come.
///
/// Eigenvectors of A·Aᵀ or Aᵀ·A, whichever is smaller, in `Double`: for float weights the smallest
/// singular values come out as exactly as from an SVD in float. The first of the largest components of
/// a left vector is positive.
package struct SingularDecomposition: Sendable {
  /// Singular values in falling order, `[min(rows, columns)]`, or as many as were asked for.
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
    try self.init(exact: matrix, min(matrix.rows, matrix.columns))
  }

  /// Decomposes a matrix of floats as far as factors of a rank need it: in floats if these tell the
  /// vectors.
  ///
  /// - Parameters:
  ///   - values: A, column by column, `[columns, rows]`; finite.
  ///   - rank: 1...min(rows, columns); the decomposition has no more singular values.
  /// - Throws: As `init(_:)`.
  /// - Complexity: As `init(_:)`, in a third of its time.
  package init(
    _ values: [Float], rows: Int, columns: Int, rank: Int
  ) throws(HalfstepError) {
    if let found = Matrix.leadingVectors(values, rows: rows, columns: columns, rank) {
      self.init(basis: found.basis, image: found.image, basisIsLeft: rows <= columns)
    } else {
      let matrix = Matrix(rows: rows, columns: columns, values: values.map(Double.init))
      try self.init(exact: matrix, rank)
    }
  }

  private init(exact matrix: Matrix, _ count: Int) throws(HalfstepError) {
    let basisIsLeft = matrix.rows <= matrix.columns
    let basis = try matrix.gram(transposed: !basisIsLeft).largestEigenpairs(count).vectors
    let image = Matrix.product(matrix, transposed: basisIsLeft, basis)
    self.init(basis: basis, image: image, basisIsLeft: basisIsLeft)
  }

  private init(basis: Matrix, image: Matrix, basisIsLeft: Bool) {
    var (basis, image) = (basis, image)
    var values: [Double] = []
    let rows = image.rows
    for column in 0..<image.columns {
      let part = column * rows..<(column + 1) * rows
      if !basisIsLeft, Self.peakIsNegative(image.values[part]) {
        for index in part { image.values[index].negate() }
        for index in column * basis.rows..<(column + 1) * basis.rows {
          basis.values[index].negate()
        }
      }
      let length = image.values[part].reduce(0) { $0 + $1 * $1 }.squareRoot()
      // The order is that of the eigenvalues; lengths differ from it by rounding only.
      values.append(min(length, values.last ?? length))
    }
    self.values = values
    self.basisIsLeft = basisIsLeft
    left = basisIsLeft ? basis : image
    right = basisIsLeft ? image : basis
  }

  private static func peakIsNegative(_ vector: ArraySlice<Double>) -> Bool {
    var peak = 0.0
    for value in vector where value.magnitude > peak.magnitude { peak = value }
    return peak < 0
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
  ///   - rank: 1...`values.count`.
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
      for index in column * a.rows..<(column + 1) * a.rows {
        a.values[index] = left.values[index] * p
      }
      for index in column * b.rows..<(column + 1) * b.rows {
        b.values[index] = right.values[index] * q
      }
    }
    return (a, b)
  }

  /// The share of the matrix's squared length that each rank loses, `[k + 1]` for ranks 0...k, if the
  /// matrix was decomposed as a whole.
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
