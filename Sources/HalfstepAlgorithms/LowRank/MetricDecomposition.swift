// SPDX-License-Identifier: Apache-2.0
// Factors of a layer's weight that are best for the inputs it was seen to have.

import HalfstepNumerics

/// Factors of a layer's weight, of any rank, in the metric of its input's second moments.
///
/// The weight is a matrix M, `[A, K·S]`: A parts of an input row, each with S shifts that stay with the
/// second layer, and K outputs. The first factor V comes from the singular vectors of `Lᵀ·M·(I ⊗ T)`,
/// where L·Lᵀ and T·Tᵀ are the input's moments summed over shifts and over parts. Given V, the second
/// factor is the least-squares answer for the full moments; a Cholesky factorization in which ranks
/// follow one another holds the answers for all of them. Everything in `Double`.
///
/// - Reference: Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and
///   Detection", 2015, §3, arXiv:1505.06798, for the objective and for the target that makes up for
///   the layers before.
struct MetricDecomposition {
  /// The first factor of the largest rank, `[A, ranks]`.
  let first: Matrix
  /// Cholesky factor of the moments between the two layers, `[ranks·S, ranks·S]`.
  private let factor: Matrix
  /// What the factor makes of the right side, `[ranks·S, K]`.
  private let solved: Matrix
  /// Length of the target.
  private let total: Double
  private let shifts: Int

  /// Decomposes.
  ///
  /// - Parameters:
  ///   - matrix: M, `[A, K·S]`, shifts fastest in its columns.
  ///   - moments: Of the layer's input, one group of A·S columns, shifts fastest.
  ///   - shifts: S.
  ///   - ranks: Largest rank that is wanted, 1...min(A, K·S).
  ///   - isCentered: Whether a bias takes the means.
  ///   - shrinkage: Added to the diagonal of the moments, as a share of its mean.
  ///   - plain: First factor to use instead of the metric's, `[A, ranks]`.
  /// - Returns: nil if the moments are too flat to be inverted.
  /// - Throws: `HalfstepError.internalError` if the extents do not fit each other.
  /// - Complexity: O((A·S)²·ranks + (ranks·S)³).
  init?(
    _ matrix: Matrix, _ moments: GramStatistics, shifts: Int, ranks: Int, isCentered: Bool,
    shrinkage: Double, plain: Matrix? = nil
  ) throws(HalfstepError) {
    // All come from one layer, so that no caller's data decides this.
    guard shifts > 0, moments.columns == matrix.rows * shifts, matrix.columns % shifts == 0,
      (1...max(min(matrix.rows, matrix.columns), 1)).contains(ranks)
    else {
      throw HalfstepError(
        .internalError,
        "matrix [\(matrix.rows), \(matrix.columns)] of \(shifts) shifts: moments of "
          + "\(moments.columns) columns, \(ranks) ranks")
    }
    let parts = Moments(
      statistics: moments, shifts: shifts, isCentered: isCentered, shrinkage: shrinkage)
    guard parts.ridge > 0, let sums = parts.overShifts.choleskyFactor() else { return nil }
    let right = parts.rightSide(matrix)
    if let plain {
      first = plain
    } else {
      guard let across = parts.overParts.choleskyFactor() else { return nil }
      // Without shifts the target itself can be decomposed, with what the layers before changed.
      let whitened =
        shifts == 1
        ? sums.solvedTriangular(right, isTransposed: false)
        : Self.mixed(Matrix.product(sums, transposed: true, matrix), across)
      let vectors = try SingularDecomposition(whitened).factors(rank: ranks, .right).left
      first = sums.solvedTriangular(vectors, isTransposed: true)
    }
    guard let factor = parts.between(first).choleskyFactor() else { return nil }
    let wanted = Self.interleaved(Matrix.product(first, transposed: true, right), shifts)
    self.factor = factor
    solved = factor.solvedTriangular(wanted, isTransposed: false)
    self.shifts = shifts
    // Without differences the right side is G·w, and this is w·G·w.
    total = zip(right.values, matrix.values).reduce(0) { $0 + $1.0 * $1.1 }
    guard solved.values.allSatisfy(\.isFinite) else { return nil }
  }

  /// The share of the output's power that each rank loses, `[ranks + 1]` from rank 0; means something
  /// only if the inputs had no differences.
  var lostShares: [Double] {
    var rest = total
    var result = [1.0]
    for rank in 0..<first.columns {
      for column in 0..<solved.columns {
        for row in rank * shifts..<(rank + 1) * shifts {
          rest -= solved[row, column] * solved[row, column]
        }
      }
      result.append(total > 0 ? max(0, rest / total) : 0)
    }
    return result
  }

  /// The factors of a rank.
  ///
  /// - Parameters:
  ///   - rank: 1...ranks.
  ///   - split: How lengths are shared between the factors.
  /// - Returns: Left factor, `[A, rank]`, and the transpose of the right one, `[K·S, rank]`.
  func factors(
    rank: Int, _ split: SingularDecomposition.Split
  ) -> (left: Matrix, rightTransposed: Matrix) {
    let (height, outputs) = (rank * shifts, solved.columns)
    var leading = Matrix(rows: height, columns: outputs)
    for column in 0..<outputs {
      for row in 0..<height { leading.values[column * height + row] = solved[row, column] }
    }
    let second = factor.solvedTriangular(leading, isTransposed: true)
    var left = Matrix(rows: first.rows, columns: rank)
    var right = Matrix(rows: outputs * shifts, columns: rank)
    for index in 0..<rank {
      var (a, b) = (0.0, 0.0)
      for row in 0..<first.rows { a += first[row, index] * first[row, index] }
      for output in 0..<outputs {
        for shift in 0..<shifts {
          let value = second[index * shifts + shift, output]
          right[output * shifts + shift, index] = value
          b += value * value
        }
      }
      let scale: Double
      switch split {
      case .even: scale = a > 0 && b > 0 ? (b / a).squareRoot().squareRoot() : 1
      case .right: scale = a > 0 ? 1 / a.squareRoot() : 1
      }
      for row in 0..<first.rows { left[row, index] = first[row, index] * scale }
      for row in 0..<right.rows { right[row, index] /= scale }
    }
    return (left, right)
  }

  // MARK: Helpers

  /// Multiplies the shifts of each output by a matrix.
  private static func mixed(_ matrix: Matrix, _ factor: Matrix) -> Matrix {
    let shifts = factor.rows
    var result = Matrix(rows: matrix.rows, columns: matrix.columns)
    for output in 0..<matrix.columns / shifts {
      for to in 0..<shifts {
        let target = (output * shifts + to) * matrix.rows
        for from in to..<shifts {
          let source = (output * shifts + from) * matrix.rows
          let weight = factor[from, to]
          for row in 0..<matrix.rows {
            result.values[target + row] += weight * matrix.values[source + row]
          }
        }
      }
    }
    return result
  }

  /// `[ranks, K·S]` as `[ranks·S, K]`.
  private static func interleaved(_ matrix: Matrix, _ shifts: Int) -> Matrix {
    var result = Matrix(rows: matrix.rows * shifts, columns: matrix.columns / shifts)
    for output in 0..<result.columns {
      for shift in 0..<shifts {
        for rank in 0..<matrix.rows {
          result[rank * shifts + shift, output] = matrix[rank, output * shifts + shift]
        }
      }
    }
    return result
  }
}

/// Second moments of a layer's input, cut by shifts.
private struct Moments {
  let statistics: GramStatistics
  let shifts: Int
  let isCentered: Bool
  /// What is added to the diagonal.
  let ridge: Double
  /// The mean of the parts that belong to one shift.
  let overShifts: Matrix
  /// The mean over parts, `[S, S]`.
  let overParts: Matrix

  init(statistics: GramStatistics, shifts: Int, isCentered: Bool, shrinkage: Double) {
    self.statistics = statistics
    self.shifts = shifts
    self.isCentered = isCentered
    let extent = statistics.columns / shifts
    var sum = Matrix(rows: extent, columns: extent)
    var parts = Matrix(rows: shifts, columns: shifts)
    for p in 0..<shifts {
      for q in 0...p {
        let part = statistics.gramPart(group: 0, step: shifts, p, q, isCentered: isCentered)
        var trace = 0.0
        for index in 0..<extent { trace += part[index, index] }
        parts[p, q] = trace / Double(extent)
        parts[q, p] = parts[p, q]
        guard p == q else { continue }
        for index in sum.values.indices { sum.values[index] += part.values[index] / Double(shifts) }
      }
    }
    var mean = 0.0
    for shift in 0..<shifts { mean += parts[shift, shift] / Double(shifts) }
    ridge = shrinkage * mean
    for index in 0..<extent { sum[index, index] += ridge }
    for shift in 0..<shifts { parts[shift, shift] += ridge }
    overShifts = sum
    overParts = parts
  }

  private func part(_ p: Int, _ q: Int) -> Matrix {
    var part = statistics.gramPart(group: 0, step: shifts, p, q, isCentered: isCentered)
    if p == q { for index in 0..<part.rows { part[index, index] += ridge } }
    return part
  }

  /// (G + Dᵀ)·w for every output, `[A, K·S]`.
  func rightSide(_ matrix: Matrix) -> Matrix {
    let outputs = matrix.columns / shifts
    var result = Matrix(rows: matrix.rows, columns: matrix.columns)
    let columns = (0..<shifts).map { shift in
      var columns = Matrix(rows: matrix.rows, columns: outputs)
      for output in 0..<outputs {
        for row in 0..<matrix.rows {
          columns[row, output] = matrix[row, output * shifts + shift]
        }
      }
      return columns
    }
    var sums = [Matrix?](repeating: nil, count: shifts)
    sums.withUnsafeMutableBufferPointer { sums in
      nonisolated(unsafe) let sums = sums
      Parallel.forEachRange(shifts, grain: 1) { _, range in
        for p in range {
          var sum = Matrix(rows: matrix.rows, columns: outputs)
          for q in 0..<shifts {
            var moments = part(p, q)
            // Row p of Dᵀ is column p of D.
            let cross = statistics.crossPart(
              group: 0, step: shifts, q, p, isCentered: isCentered)
            if let cross {
              for row in 0..<moments.rows {
                for column in 0..<moments.columns { moments[row, column] += cross[column, row] }
              }
            }
            let product = Matrix.product(moments, columns[q])
            for index in sum.values.indices { sum.values[index] += product.values[index] }
          }
          sums[p] = sum
        }
      }
    }
    for (p, sum) in sums.enumerated() {
      guard let sum else { continue }
      for output in 0..<outputs {
        for row in 0..<matrix.rows { result[row, output * shifts + p] = sum[row, output] }
      }
    }
    return result
  }

  /// Moments of what a first layer hands on, `[ranks·S, ranks·S]`, shifts fastest.
  func between(_ first: Matrix) -> Matrix {
    let ranks = first.columns
    var result = Matrix(rows: ranks * shifts, columns: ranks * shifts)
    let pairs = (0..<shifts).flatMap { p in (0...p).map { (p, $0) } }
    result.values.withUnsafeMutableBufferPointer { values in
      nonisolated(unsafe) let values = values
      Parallel.forEachRange(pairs.count, grain: 1) { _, range in
        for (p, q) in pairs[range] {
          let product = Matrix.product(
            first, transposed: true, Matrix.product(part(p, q), first))
          for column in 0..<ranks {
            for row in 0..<ranks {
              let (a, b) = (row * shifts + p, column * shifts + q)
              let value = product.values[column * ranks + row]
              values[b * ranks * shifts + a] = value
              values[a * ranks * shifts + b] = value
            }
          }
        }
      }
    }
    return result
  }
}
