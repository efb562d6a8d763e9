// SPDX-License-Identifier: Apache-2.0
// Backward pass of fake quantization over contiguous floats that share a grid.

/// Sums that the gradients of a group's grid are made of.
struct GradientSums {
  /// Σ g·(round(x/s) − x/s) over values inside the grid.
  var inside = 0.0
  /// Σ g over values that round below the grid, and above it.
  var below = 0.0
  var above = 0.0

  static func += (left: inout GradientSums, right: GradientSums) {
    left.inside += right.inside
    left.below += right.below
    left.above += right.above
  }
}

/// Writes `g` where the value rounds into the grid and 0 elsewhere, and sums what the grid needs.
///
/// `result` may be `upstream`. NaN values count as below the grid. Sums are accumulated in float over
/// 1,024 values, then in double.
@inline(never)
func fakeQuantizeGradientRun(
  _ source: UnsafePointer<Float>, _ upstream: UnsafePointer<Float>,
  _ result: UnsafeMutablePointer<Float>, count: Int, grid: GridConstants
) -> GradientSums {
  // One step beyond the grid is enough to see that a value rounds outside.
  let floor = Lanes(repeating: grid.low - 1)
  let ceiling = Lanes(repeating: grid.high + 1)
  let zero = Lanes(repeating: 0)
  var sums = GradientSums()
  var index = 0
  while index &+ Lanes.width <= count {
    let end = min(index &+ 1024, count)
    var inside = zero
    var below = zero
    var above = zero
    while index &+ Lanes.width <= end {
      let scaled = (Lanes(loading: source + index) * grid.reciprocal).atLeast(floor)
        .atMost(ceiling)
      let rounded = scaled.roundedToEven
      let gradient = Lanes(loading: upstream + index)
      let isBelow = rounded .< grid.low
      let isAbove = rounded .> grid.high
      let passed = gradient.replacing(with: zero, where: isBelow .| isAbove)
      passed.store(to: result + index)
      inside += passed * (rounded - scaled)
      below += zero.replacing(with: gradient, where: isBelow)
      above += zero.replacing(with: gradient, where: isAbove)
      index &+= Lanes.width
    }
    sums.inside += Double(inside.sum())
    sums.below += Double(below.sum())
    sums.above += Double(above.sum())
  }
  while index < count {
    let product = source[index] * grid.reciprocal
    let floored = product > grid.low - 1 ? product : grid.low - 1
    let scaled = floored < grid.high + 1 ? floored : grid.high + 1
    let rounded = (scaled + roundingMagic) - roundingMagic
    let gradient = upstream[index]
    if rounded < grid.low {
      sums.below += Double(gradient)
      result[index] = 0
    } else if rounded > grid.high {
      sums.above += Double(gradient)
      result[index] = 0
    } else {
      sums.inside += Double(gradient * (rounded - scaled))
      result[index] = gradient
    }
    index &+= 1
  }
  return sums
}
