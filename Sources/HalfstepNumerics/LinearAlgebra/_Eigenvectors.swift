// SPDX-License-Identifier: Apache-2.0
// LAPACK's eigenvectors of symmetric matrices, in either precision.

import CLAPACK

/// The scalars in which LAPACK finds eigenvectors.
protocol EigenScalar: BinaryFloatingPoint {
  /// `xSYTRD`: a symmetric matrix becomes tridiagonal.
  static var reduction: EigenRoutines<Self>.Reduction { get }
  /// `xSTEDC`: eigenvectors of a tridiagonal matrix by divide and conquer.
  static var division: EigenRoutines<Self>.Division { get }
  /// `xORMTR`: vectors of the tridiagonal matrix become those of the symmetric one.
  static var rotation: EigenRoutines<Self>.Rotation { get }
}

/// How the routines of a precision are called.
enum EigenRoutines<Scalar> {
  typealias Text = UnsafePointer<CChar>?
  typealias Count = UnsafePointer<Int32>?
  typealias Values = UnsafeMutablePointer<Scalar>?
  typealias Reduction = (
    Text, Count, Values, Count, Values, Values, Values, Values, Count, UnsafeMutablePointer<Int32>?,
    UInt
  ) -> Void
  typealias Division = (
    Text, Count, Values, Values, Values, Count, Values, Count, UnsafeMutablePointer<Int32>?, Count,
    UnsafeMutablePointer<Int32>?, UInt
  ) -> Void
  typealias Rotation = (
    Text, Text, Text, Count, Count, UnsafePointer<Scalar>?, Count, UnsafePointer<Scalar>?, Values,
    Count, Values, Count, UnsafeMutablePointer<Int32>?, UInt, UInt, UInt
  ) -> Void
}

extension Double: EigenScalar {
  static var reduction: EigenRoutines<Double>.Reduction { dsytrd_ }
  static var division: EigenRoutines<Double>.Division { dstedc_ }
  static var rotation: EigenRoutines<Double>.Rotation { dormtr_ }
}

extension Float: EigenScalar {
  static var reduction: EigenRoutines<Float>.Reduction { ssytrd_ }
  static var division: EigenRoutines<Float>.Division { sstedc_ }
  static var rotation: EigenRoutines<Float>.Rotation { sormtr_ }
}

extension EigenScalar {
  /// The largest eigenvalues of a symmetric matrix and their vectors.
  ///
  /// Divide and conquer finds all vectors of the tridiagonal matrix, faster and with better right
  /// angles than other ways find a quarter of them; only those that are wanted are turned back.
  ///
  /// - Parameters:
  ///   - a: `[rows, rows]`, of which the lower triangle is read and destroyed; finite.
  ///   - count: 1...rows.
  /// - Returns: As `Matrix.largestEigenpairs`.
  /// - Throws: `HalfstepError.numericFailure` if LAPACK does not converge.
  static func largestEigenpairs(
    _ a: inout [Self], rows: Int, _ count: Int
  ) throws(HalfstepError) -> (values: [Self], vectors: [Self]) {
    var (n, wanted, info) = (Int32(rows), Int32(count), Int32(0))
    var diagonal = [Self](repeating: 0, count: rows)
    var (beside, factors) = (diagonal, diagonal)
    var vectors = [Self](repeating: 0, count: rows * rows)
    var (workSize, integerSize): (Int32, Int32) = (-1, -1)
    var work: [Self] = [0]
    var integers: [Int32] = [0]
    let first = (rows - count) * rows
    // The first round asks for sizes.
    for isQuery in [true, false] {
      var sizes: [Self] = []
      reduction("L", &n, &a, &n, &diagonal, &beside, &factors, &work, &workSize, &info, 1)
      sizes.append(work[0])
      if info == 0 {
        division(
          "I", &n, &diagonal, &beside, &vectors, &n, &work, &workSize, &integers, &integerSize,
          &info, 1)
        sizes.append(work[0])
      }
      if info == 0 {
        vectors.withUnsafeMutableBufferPointer { vectors in
          let leading = vectors.baseAddress.map { $0 + first }
          rotation(
            "L", "L", "N", &n, &wanted, a, &n, factors, leading, &n, &work, &workSize, &info, 1, 1,
            1)
        }
        sizes.append(work[0])
      }
      guard info == 0 else {
        throw HalfstepError(
          .numericFailure, "eigenvalues of a matrix of \(rows): LAPACK says \(info)")
      }
      guard isQuery else { break }
      // Floats do not hold every size.
      workSize = Int32((sizes.max() ?? 1) * 1.001) + 1
      integerSize = integers[0]
      work = [Self](repeating: 0, count: Int(workSize))
      integers = [Int32](repeating: 0, count: Int(integerSize))
    }
    // LAPACK counts upward.
    var result = [Self](repeating: 0, count: rows * count)
    for column in 0..<count {
      let source = (rows - 1 - column) * rows
      var peak = source
      for row in source..<source + rows where vectors[row].magnitude > vectors[peak].magnitude {
        peak = row
      }
      let sign: Self = vectors[peak] < 0 ? -1 : 1
      for row in 0..<rows { result[column * rows + row] = sign * vectors[source + row] }
    }
    return (diagonal[first / rows..<rows].reversed(), result)
  }
}
