// SPDX-License-Identifier: Apache-2.0
// Rounds values to a grid and back.

extension Encoding {
  /// Rounds values to the grid and back: `scale · clamp(round(x · (1/scale)))`, half to even.
  ///
  /// The quotient is one float product with the float reciprocal of the scale, as in
  /// `torch.fake_quantize` and as oneDNN's fused chain computes it. Zeros come out positive. NaN
  /// becomes the lowest grid value; infinities become the ends of the grid.
  ///
  /// - Parameter tensor: Values, float32, any shape that the granularity's axes fit.
  /// - Returns: A new tensor of the same shape.
  /// - Throws: `HalfstepError.typeMismatch` unless float32; `.shapeMismatch` if the number of groups
  ///   is not the number of scales; `.invalidArgument` for an axis outside the shape; `.outOfMemory`.
  /// - Complexity: O(elements); one read, one write.
  package func fakeQuantize(_ tensor: Tensor) throws(HalfstepError) -> Tensor {
    var result = try Tensor(uninitialized: .float32, shape: tensor.shape)
    let layout = try layout(for: tensor.shape)
    try tensor.withFloats { (source) throws(HalfstepError) in
      try result.withMutableFloats { (target) throws(HalfstepError) in
        if let from = source.baseAddress, let to = target.baseAddress {
          fakeQuantize(from, into: to, layout: layout)
        }
      }
    }
    return result
  }

  /// Rounds values to the grid in place; see `fakeQuantize(_:)`.
  ///
  /// - Throws: As `fakeQuantize(_:)`; the tensor is then unchanged.
  package func fakeQuantize(inPlace tensor: inout Tensor) throws(HalfstepError) {
    let layout = try layout(for: tensor.shape)
    try tensor.withMutableFloats { (target) throws(HalfstepError) in
      if let to = target.baseAddress { fakeQuantize(UnsafePointer(to), into: to, layout: layout) }
    }
  }

  /// Checks that the encoding fits a tensor's shape and lays out its groups.
  ///
  /// - Throws: `HalfstepError.shapeMismatch` if the number of groups is not the number of scales;
  ///   `.invalidArgument` for an axis outside the shape.
  package func layout(for shape: Shape) throws(HalfstepError) -> GroupLayout {
    let layout = try GroupLayout(granularity, shape: shape)
    guard layout.groupCount == scales.count else {
      throw HalfstepError(
        .shapeMismatch,
        "encoding for tensor \(shape): expected \(layout.groupCount) scales, got \(scales.count)")
    }
    return layout
  }

  /// Rounds values of a layout that `layout(for:)` made; the pointers may be the same.
  ///
  /// - Parameters:
  ///   - source: `layout.elementCount` values.
  ///   - result: Room for as many.
  package func fakeQuantize(
    _ source: UnsafePointer<Float>, into result: UnsafeMutablePointer<Float>, layout: GroupLayout
  ) {
    let grids = (0..<scales.count).map { gridConstants(group: $0) }
    let isWide = bits > 16
    if layout.prefersRows && !isWide {
      let patterns = (0..<layout.patternCount).map {
        LaneConstants(layout: layout, pattern: $0, grids: grids)
      }
      let length = layout.rowLength
      let grain = max(1, Self.grain / max(length, 1))
      Parallel.forEachRange(layout.rowCount, grain: grain) { _, range in
        for row in range {
          let offset = row * length
          patterns[layout.pattern(ofRow: row)].fakeQuantizeRow(
            source + offset, result + offset)
        }
      }
      return
    }
    func quantize(_ offset: Int, _ count: Int, _ grid: GridConstants) {
      let from = source + offset
      if isWide {
        fakeQuantizeWide(from, result + offset, count: count, grid: grid)
      } else {
        fakeQuantizeRun(from, result + offset, count: count, grid: grid)
      }
    }
    let runs = layout.runCount
    if runs >= 4 * Parallel.maximumThreads {
      let grain = max(1, Self.grain / max(layout.elementCount / runs, 1))
      Parallel.forEachRange(runs, grain: grain) { _, range in
        for index in range {
          let run = layout.run(index)
          quantize(run.offset, run.count, grids[run.group])
        }
      }
      return
    }
    for index in 0..<runs {
      let run = layout.run(index)
      Parallel.forEachRange(run.count, grain: Self.grain) { _, range in
        quantize(run.offset + range.lowerBound, range.count, grids[run.group])
      }
    }
  }

  /// Constants of the chain `clamp(round(x · reciprocal), low, high) · scale` for one group.
  ///
  /// The runtime fuses the same numbers into its layers.
  func gridConstants(group: Int) -> GridConstants {
    GridConstants(
      reciprocal: 1 / scales[group], scale: scales[group],
      low: Float(minimumCode - Int(zeroPoints[group])),
      high: Float(maximumCode - Int(zeroPoints[group])))
  }

  /// Elements below which another thread is not worth its start.
  private static var grain: Int { 1 << 15 }
}
