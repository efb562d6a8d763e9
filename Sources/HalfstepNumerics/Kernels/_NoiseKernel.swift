// SPDX-License-Identifier: Apache-2.0
// Squared quantization error of contiguous floats on one grid, without writing the rounded values.

import CVectorKernels

/// Squared errors of values on a grid, in steps squared.
struct GridNoise {
  /// Sum over all values.
  var total: Double
  /// Sum over the values outside the grid's limits, which are part of `total`.
  var clipped: Double
}

/// Sums the squared errors of contiguous floats on a grid.
///
/// Accumulates in float over 1,024 values, then in double. Values must be finite.
@inline(never)
func gridNoise(_ values: UnsafePointer<Float>, count: Int, grid: GridConstants) -> GridNoise {
  let reciprocal = Lanes(repeating: grid.reciprocal)
  let low = Lanes(repeating: grid.low)
  let high = Lanes(repeating: grid.high)
  var result = GridNoise(total: 0, clipped: 0)
  var index = 0
  let usesAVX512 = hsk_has_avx512() != 0
  while index &+ Lanes.width <= count {
    let end = min(index &+ 1024, count)
    var total = Lanes(repeating: 0)
    var clipped = Lanes(repeating: 0)
    if usesAVX512 {
      let whole = (end &- index) & ~(Lanes.width &- 1)
      withUnsafeMutableBytes(of: &total) { total in
        withUnsafeMutableBytes(of: &clipped) { clipped in
          hsk_grid_noise(
            values + index, whole,
            hsk_noise_grid(reciprocal: grid.reciprocal, low: grid.low, high: grid.high),
            total.baseAddress?.assumingMemoryBound(to: Float.self),
            clipped.baseAddress?.assumingMemoryBound(to: Float.self))
        }
      }
      index &+= whole
    }
    while index &+ Lanes.width <= end {
      let scaled = Lanes(loading: values + index) * reciprocal
      let inside = scaled.atLeast(low).atMost(high)
      let error = scaled - inside.roundedToEven
      let beyond = scaled - inside
      total += error * error
      clipped += beyond * beyond
      index &+= Lanes.width
    }
    result.total += Double(total.sum())
    result.clipped += Double(clipped.sum())
  }
  while index < count {
    let scaled = values[index] * grid.reciprocal
    let inside = min(max(scaled, grid.low), grid.high)
    let error = scaled - ((inside + roundingMagic) - roundingMagic)
    let beyond = scaled - inside
    result.total += Double(error * error)
    result.clipped += Double(beyond * beyond)
    index &+= 1
  }
  return result
}

/// Moves the element that belongs at `position` in ascending order to that position.
///
/// Elements before it are not larger, elements after it not smaller. Values must be finite.
///
/// - Complexity: O(count) on average; the pivots are medians of three, without randomness.
func select(_ values: UnsafeMutablePointer<Float>, count: Int, position: Int) -> Float {
  var low = 0
  var high = count - 1
  while low < high {
    let middle = low + (high - low) / 2
    let (a, b, c) = (values[low], values[middle], values[high])
    let pivot = max(min(a, b), min(max(a, b), c))
    var left = low
    var right = high
    while left <= right {
      while values[left] < pivot { left += 1 }
      while values[right] > pivot { right -= 1 }
      if left <= right {
        (values[left], values[right]) = (values[right], values[left])
        left += 1
        right -= 1
      }
    }
    if position <= right {
      high = right
    } else if position >= left {
      low = left
    } else {
      break
    }
  }
  return values[position]
}
