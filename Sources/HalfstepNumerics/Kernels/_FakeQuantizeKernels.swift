// SPDX-License-Identifier: Apache-2.0
// Fake quantization of contiguous floats: one grid for all of them, or one grid for each lane.

/// What fake quantization needs to know of one group.
struct GridConstants {
  /// `1 / scale`, as a float.
  let reciprocal: Float
  let scale: Float
  /// Lowest and highest code, less the zero point.
  let low: Float
  let high: Float
}

/// Rounds `count` values to one grid; `source` and `result` may be the same.
///
/// The chain is multiply by the reciprocal, clamp, round half to even, multiply by the scale: clamping
/// to integers first is the same as clamping the rounded value. NaN becomes the lowest grid value.
/// Grids wider than 2²² codes take another path.
@inline(never)
func fakeQuantizeRun(
  _ source: UnsafePointer<Float>, _ result: UnsafeMutablePointer<Float>, count: Int,
  grid: GridConstants
) {
  let reciprocal = Lanes(repeating: grid.reciprocal)
  let scale = Lanes(repeating: grid.scale)
  let low = Lanes(repeating: grid.low)
  let high = Lanes(repeating: grid.high)
  var index = 0
  while index &+ Lanes.width <= count {
    let scaled = Lanes(loading: source + index) * reciprocal
    let rounded = scaled.atLeast(low).atMost(high).roundedToEven
    (rounded * scale).store(to: result + index)
    index &+= Lanes.width
  }
  while index < count {
    result[index] = fakeQuantizeOne(source[index], grid)
    index &+= 1
  }
}

/// The same for one value.
@inline(__always)
func fakeQuantizeOne(_ value: Float, _ grid: GridConstants) -> Float {
  let scaled = value * grid.reciprocal
  let floored = scaled > grid.low ? scaled : grid.low
  let clamped = floored < grid.high ? floored : grid.high
  return ((clamped + roundingMagic) - roundingMagic) * grid.scale
}

/// Rounds values to a grid whose codes do not fit the fast path (32-bit biases).
func fakeQuantizeWide(
  _ source: UnsafePointer<Float>, _ result: UnsafeMutablePointer<Float>, count: Int,
  grid: GridConstants
) {
  for index in 0..<count {
    let scaled = source[index] * grid.reciprocal
    // Adding zero makes a negative zero positive, as on the fast path.
    let rounded = scaled.rounded(.toNearestOrEven) + 0
    let floored = rounded > grid.low ? rounded : grid.low
    result[index] = (floored < grid.high ? floored : grid.high) * grid.scale
  }
}

/// Grid constants of every element of a row, for rows in which neighbors differ in group.
struct LaneConstants {
  var reciprocals: [Float]
  var scales: [Float]
  var lows: [Float]
  var highs: [Float]

  init(layout: GroupLayout, pattern: Int, grids: [GridConstants]) {
    let count = layout.rowLength
    reciprocals = []
    scales = []
    lows = []
    highs = []
    reciprocals.reserveCapacity(count)
    scales.reserveCapacity(count)
    lows.reserveCapacity(count)
    highs.reserveCapacity(count)
    for lane in 0..<count {
      let grid = grids[layout.group(pattern: pattern, lane: lane)]
      reciprocals.append(grid.reciprocal)
      scales.append(grid.scale)
      lows.append(grid.low)
      highs.append(grid.high)
    }
  }

  /// Rounds one row; `source` and `result` may be the same.
  @inline(never)
  func fakeQuantizeRow(
    _ source: UnsafePointer<Float>, _ result: UnsafeMutablePointer<Float>
  ) {
    let count = scales.count
    reciprocals.withUnsafeBufferPointer { reciprocals in
      scales.withUnsafeBufferPointer { scales in
        lows.withUnsafeBufferPointer { lows in
          highs.withUnsafeBufferPointer { highs in
            guard let reciprocal = reciprocals.baseAddress, let scale = scales.baseAddress,
              let low = lows.baseAddress, let high = highs.baseAddress
            else { return }
            var index = 0
            while index &+ Lanes.width <= count {
              let scaled = Lanes(loading: source + index) * Lanes(loading: reciprocal + index)
              let rounded = scaled.atLeast(Lanes(loading: low + index))
                .atMost(Lanes(loading: high + index)).roundedToEven
              (rounded * Lanes(loading: scale + index)).store(to: result + index)
              index &+= Lanes.width
            }
            while index < count {
              let grid = GridConstants(
                reciprocal: reciprocal[index], scale: scale[index], low: low[index],
                high: high[index])
              result[index] = fakeQuantizeOne(source[index], grid)
              index &+= 1
            }
          }
        }
      }
    }
  }
}
