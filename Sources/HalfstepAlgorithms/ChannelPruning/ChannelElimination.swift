// SPDX-License-Identifier: Apache-2.0
// In which order channels go such that what is left explains most.

import HalfstepNumerics

/// In which order channels go such that a combination of those that are left explains most of the sum
/// of all.
///
/// Channel i contributes z_i to the output that reads it. The moments M_ij = Σ z_i·z_j say how much of
/// the sum y = Σ z_i the best combination Σ a_i·z_i of some channels misses. Channels are taken out one
/// by one, always the one that is missed least once the others' coefficients have been fitted anew.
///
/// - Reference: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", 2017, eq. 1
///   (its objective, with elimination instead of the LASSO). arXiv:1707.06168
package struct ChannelElimination {
  /// Channels, the one that goes last first: what is kept is always a first part.
  package let order: [Int]
  /// What is missed when that many channels are kept, `[count + 1]`; of the unit of M.
  package let errors: [Double]

  /// Added to the diagonal, as a share of its mean: channels that depend on each other exactly must not
  /// divide by zero.
  private static let ridge = 1e-7

  /// Eliminates.
  ///
  /// - Parameters:
  ///   - moments: M, `[count, count]`, symmetric and finite.
  ///   - count: Channels.
  /// - Throws: `HalfstepError.numericFailure` if the moments are not those of anything.
  /// - Complexity: O(count³).
  package init(_ moments: [Double], count: Int) throws(HalfstepError) {
    var total = 0.0
    var power = 0.0
    for row in 0..<count {
      power += moments[row * count + row]
      for column in 0..<count { total += moments[row * count + column] }
    }
    total = max(total, 0)
    guard power > 0 else {
      // Nothing contributes: the last ones go first.
      order = Array(0..<count)
      errors = [Double](repeating: 0, count: count + 1)
      return
    }
    var (inverse, coefficients) = try Self.inverse(moments, count, power / Double(count))
    // What is left, at the same places in the matrix.
    var left = Array(0..<count)
    var removed: [Int] = []
    var error = 0.0
    var errors = [0.0]
    while left.count > 1 {
      var (best, least) = (0, Double.infinity)
      for place in left.indices {
        let loss =
          coefficients[place] * coefficients[place] / inverse[place * count + place]
        // Of equals the last goes.
        if loss <= least { (best, least) = (place, loss) }
      }
      error += max(least, 0)
      errors.append(min(error, total))
      removed.append(left[best])
      Self.remove(best, &inverse, &coefficients, left.count, count)
      left[best] = left[left.count - 1]
      left.removeLast()
    }
    errors.append(total)
    order = left + removed.reversed()
    self.errors = errors.reversed()
  }

  /// The inverse of the moments, and the coefficients of the best combination of all.
  private static func inverse(
    _ moments: [Double], _ count: Int, _ mean: Double
  ) throws(HalfstepError) -> (inverse: [Double], coefficients: [Double]) {
    var strength = ridge
    for _ in 0..<6 {
      var matrix = moments
      for row in 0..<count { matrix[row * count + row] += strength * mean }
      do throws(HalfstepError) {
        let factor = try CholeskyFactor(matrix, size: count)
        var identity = [Double](repeating: 0, count: count * count)
        for row in 0..<count { identity[row * count + row] = 1 }
        factor.solve(rows: &identity)
        var coefficients = [Double](repeating: 0, count: count)
        for row in 0..<count {
          for column in 0..<count { coefficients[row] += moments[row * count + column] }
        }
        factor.solve(rows: &coefficients)
        return (identity, coefficients)
      } catch {
        guard error.code == .numericFailure else { throw error }
      }
      strength *= 100
    }
    throw HalfstepError(.numericFailure, "channel pruning: the moments cannot be inverted")
  }

  /// Takes a channel out of the inverse; the last one moves to its place.
  private static func remove(
    _ place: Int, _ inverse: inout [Double], _ coefficients: inout [Double], _ left: Int,
    _ stride: Int
  ) {
    let pivot = inverse[place * stride + place]
    let own = coefficients[place]
    let last = left - 1
    inverse.withUnsafeMutableBufferPointer { buffer in
      guard let start = buffer.baseAddress else { return }
      nonisolated(unsafe) let p = start
      // The column is symmetric to the row, which stays untouched meanwhile.
      let column = Array(UnsafeBufferPointer(start: p + place * stride, count: left))
      column.withUnsafeBufferPointer { column in
        nonisolated(unsafe) let column = column
        Parallel.forEachRange(left, grain: 1 + 65_536 / left) { _, rows in
          for row in rows where row != place {
            let factor = column[row] / pivot
            let target = p + row * stride
            for index in 0..<left { target[index] -= factor * column[index] }
          }
        }
        for row in 0..<left {
          coefficients[row] -= column[row] / pivot * own
        }
      }
      guard place != last else { return }
      for index in 0..<left { p[place * stride + index] = p[last * stride + index] }
      for row in 0..<left { p[row * stride + place] = p[row * stride + last] }
      p[place * stride + place] = p[last * stride + last]
    }
    coefficients[place] = coefficients[last]
  }
}
