// SPDX-License-Identifier: Apache-2.0
// Extremes of every group of a tensor.

/// Smallest and largest value of every group of a tensor.
package struct GroupRanges: Sendable, Hashable {
  /// Smallest value of each group; +∞ for a group without elements.
  package var minimum: [Float]
  /// Largest value of each group; −∞ for a group without elements.
  package var maximum: [Float]

  /// Largest magnitude of each group; 0 for a group without elements.
  package var magnitude: [Float] {
    zip(minimum, maximum).map { max(0, $1, -$0) }
  }
}

extension GroupLayout {
  /// Finds the extremes of every group.
  ///
  /// - Parameter values: Elements of the tensor, `elementCount` of them.
  /// - Throws: `HalfstepError.nonFiniteValue` if a value is NaN or infinite.
  /// - Complexity: O(elements); one read.
  package func ranges(of values: UnsafePointer<Float>) throws(HalfstepError) -> GroupRanges {
    var result = GroupRanges(
      minimum: [Float](repeating: .infinity, count: groupCount),
      maximum: [Float](repeating: -.infinity, count: groupCount))
    var isFinite = true
    func take(_ group: Int, _ extremes: Extremes) {
      isFinite = isFinite && extremes.isFinite
      result.minimum[group] = min(result.minimum[group], extremes.minimum)
      result.maximum[group] = max(result.maximum[group], extremes.maximum)
    }
    if prefersRows {
      for pattern in 0..<patternCount {
        let lanes = laneExtremes(of: values, pattern: pattern)
        for (lane, extremes) in lanes.enumerated() {
          take(group(pattern: pattern, lane: lane), extremes)
        }
      }
    } else {
      for index in 0..<runCount {
        let run = run(index)
        take(run.group, findExtremes(values + run.offset, count: run.count))
      }
    }
    guard isFinite else { throw HalfstepError(.nonFiniteValue, "NaN or infinity") }
    return result
  }

  /// Extremes of each lane over the rows of one pattern.
  private func laneExtremes(of values: UnsafePointer<Float>, pattern: Int) -> [Extremes] {
    let length = rowLength
    var low = [Float](repeating: .infinity, count: length)
    var high = [Float](repeating: -.infinity, count: length)
    var isFinite = true
    for row in 0..<rowCount where self.pattern(ofRow: row) == pattern {
      isFinite = widen(&low, &high, with: values + row * length) && isFinite
    }
    return (0..<length).map { Extremes(minimum: low[$0], maximum: high[$0], isFinite: isFinite) }
  }
}

/// Extends lane-wise extremes by one row; whether all of its values are finite.
@inline(never)
private func widen(
  _ low: inout [Float], _ high: inout [Float], with row: UnsafePointer<Float>
) -> Bool {
  let count = low.count
  return low.withUnsafeMutableBufferPointer { low in
    high.withUnsafeMutableBufferPointer { high in
      guard let low = low.baseAddress, let high = high.baseAddress else { return true }
      // x − x is NaN for exactly the non-finite values.
      var residue = Lanes(repeating: 0)
      var index = 0
      while index &+ Lanes.width <= count {
        let value = Lanes(loading: row + index)
        residue += value - value
        value.atMost(Lanes(loading: low + index)).store(to: low + index)
        value.atLeast(Lanes(loading: high + index)).store(to: high + index)
        index &+= Lanes.width
      }
      var rest: Float = 0
      while index < count {
        let value = row[index]
        rest += value - value
        if value < low[index] { low[index] = value }
        if value > high[index] { high[index] = value }
        index &+= 1
      }
      return residue.sum() + rest == 0
    }
  }
}
