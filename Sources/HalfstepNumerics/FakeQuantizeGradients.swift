// SPDX-License-Identifier: Apache-2.0
// Backward pass of fake quantization: straight-through, and range learning.

/// Gradients of a loss through the grid of a fake quantization.
package struct GridGradients: Sendable {
  /// Gradient of each group's scale, the zero point held fixed.
  package let scale: [Double]
  /// Gradient of each group's lowest grid value through a shift of the whole grid.
  package let shift: [Double]

  /// Gradients of the ends of each group's range, which range learning trains.
  ///
  /// With N steps, `s = (maximum − minimum)/N`. An asymmetric grid also shifts with
  /// `minimum/s`, whose rounding is passed straight through; a symmetric one keeps its zero point.
  ///
  /// - Parameters:
  ///   - encoding: The encoding that the gradients were taken at.
  ///   - minimums: Lower ends as trained, one a group; by default the grid's own.
  /// - Returns: Gradients of the lower and of the upper ends.
  /// - Throws: `HalfstepError.shapeMismatch` if the number of ends is not the number of groups.
  /// - Reference: Esser et al., "Learned Step Size Quantization", 2019, arXiv:1902.08153, and Bhalgat et
  ///   al., "LSQ+", 2020, arXiv:2004.09576, expressed in the ends of the range.
  package func ends(
    of encoding: Encoding, minimums: [Float]? = nil
  ) throws(HalfstepError) -> (minimum: [Double], maximum: [Double]) {
    guard encoding.scales.count == scale.count, (minimums?.count ?? scale.count) == scale.count
    else {
      throw HalfstepError(
        .shapeMismatch,
        "range gradients: expected \(scale.count) groups, got \(minimums?.count ?? 0) minimums and "
          + "\(encoding.scales.count) scales")
    }
    let steps = Double(encoding.maximumCode - encoding.minimumCode)
    var lower: [Double] = []
    var upper: [Double] = []
    for group in scale.indices {
      var low = -scale[group] / steps
      var high = scale[group] / steps
      if !encoding.isSymmetric {
        let step = Double(encoding.scales[group])
        // A trained end on the wrong side of zero acts as 0, as `spanning` takes it.
        let minimum = min(
          minimums.map { Double($0[group]) } ?? encoding.minimum(group: group), 0)
        let slope = minimum / (step * step * steps)
        low += shift[group] * (1 / step + slope)
        high -= shift[group] * slope
      }
      lower.append(low)
      upper.append(high)
    }
    return (lower, upper)
  }
}

/// Gradients of a loss through fake quantization.
package struct FakeQuantizeGradients: Sendable {
  /// Gradient of the input, the input's shape: the upstream gradient inside the grid, 0 outside.
  package let input: Tensor
  /// Gradients of the grid.
  package let grid: GridGradients
}

extension Encoding {
  /// Carries a gradient back through `fakeQuantize(_:)`.
  ///
  /// A value is inside if its rounded quotient is a code of the grid before clamping. The input's
  /// gradient is the upstream one inside and 0 outside (straight-through). The scale's is
  /// `Σ g·(round(x/s) − x/s)` inside and `Σ g·(code − zeroPoint)` of the end code outside. NaN counts as
  /// below the grid. The sums do not depend on the number of threads.
  ///
  /// - Parameters:
  ///   - tensor: The input that was quantized, float32.
  ///   - upstream: Gradient of the output, float32, same shape.
  /// - Returns: Gradients of the input and of each group's scale and shift.
  /// - Throws: `HalfstepError.shapeMismatch` if the shapes differ or do not fit the scales;
  ///   `.typeMismatch` unless float32; `.invalidArgument` for an axis outside the shape or 32-bit codes;
  ///   `.outOfMemory`.
  /// - Complexity: O(elements); two reads, one write.
  package func fakeQuantizeGradients(
    of tensor: Tensor, upstream: Tensor
  ) throws(HalfstepError) -> FakeQuantizeGradients {
    guard tensor.shape == upstream.shape else {
      throw HalfstepError(
        .shapeMismatch, "upstream gradient: expected \(tensor.shape), got \(upstream.shape)")
    }
    let layout = try layout(for: tensor.shape)
    var result = try Tensor(uninitialized: .float32, shape: tensor.shape)
    let grid = try tensor.withFloats { (values) throws(HalfstepError) in
      try upstream.withFloats { (gradients) throws(HalfstepError) in
        try result.withMutableFloats { (output) throws(HalfstepError) in
          try fakeQuantizeGradients(
            of: values, upstream: gradients, into: output, layout: layout)
        }
      }
    }
    return FakeQuantizeGradients(input: result, grid: grid)
  }

  /// Carries a gradient back through `fakeQuantize(_:)`, into memory of the caller.
  ///
  /// - Parameters:
  ///   - values: The input that was quantized, `layout.elementCount` elements.
  ///   - upstream: Gradient of the output, as many.
  ///   - result: Room for as many; may be `upstream`.
  ///   - layout: What `layout(for:)` made.
  /// - Returns: Gradients of each group's scale and shift.
  /// - Throws: `HalfstepError.invalidArgument` for 32-bit codes.
  package func fakeQuantizeGradients(
    of values: UnsafeBufferPointer<Float>, upstream: UnsafeBufferPointer<Float>,
    into result: UnsafeMutableBufferPointer<Float>, layout: GroupLayout
  ) throws(HalfstepError) -> GridGradients {
    guard bits <= 16 else {
      throw HalfstepError(.invalidArgument, "gradients of \(bits)-bit quantization")
    }
    guard min(values.count, upstream.count, result.count) >= layout.elementCount else {
      throw HalfstepError(
        .shapeMismatch, "gradients: \(layout.elementCount) values expected, fewer given")
    }
    var sums = [GradientSums](repeating: GradientSums(), count: scales.count)
    if let source = values.baseAddress, let gradient = upstream.baseAddress,
      let target = result.baseAddress, layout.elementCount > 0
    {
      sums = gradientSums(source, gradient, target, layout)
    }
    var scale: [Double] = []
    var shift: [Double] = []
    for (group, sum) in sums.enumerated() {
      let grid = gridConstants(group: group)
      scale.append(
        sum.inside + sum.below * Double(grid.low) + sum.above * Double(grid.high))
      shift.append((sum.below + sum.above) * Double(scales[group]))
    }
    return GridGradients(scale: scale, shift: shift)
  }

  private func gradientSums(
    _ source: UnsafePointer<Float>, _ gradient: UnsafePointer<Float>,
    _ target: UnsafeMutablePointer<Float>, _ layout: GroupLayout
  ) -> [GradientSums] {
    let grids = scales.indices.map { gridConstants(group: $0) }
    var sums = [GradientSums](repeating: GradientSums(), count: scales.count)
    func sum(_ offset: Int, _ count: Int, _ group: Int) -> GradientSums {
      fakeQuantizeGradientRun(
        source + offset, gradient + offset, target + offset, count: count, grid: grids[group])
    }
    // Pieces and their order are fixed by the shape, so that threads do not change the sums.
    let piece = 1 << 15
    var start = 0
    let runs = layout.runCount
    let runsAtOnce = max(1, min(runs, 1 << 12))
    while start < runs {
      var pieces: [GroupLayout.Run] = []
      for index in start..<min(start + runsAtOnce, runs) {
        let run = layout.run(index)
        for offset in stride(from: 0, to: run.count, by: piece) {
          pieces.append(
            GroupLayout.Run(
              offset: run.offset + offset, count: min(piece, run.count - offset),
              group: run.group))
        }
      }
      var partial = [GradientSums](repeating: GradientSums(), count: pieces.count)
      partial.withUnsafeMutableBufferPointer { partial in
        guard let partial = partial.baseAddress else { return }
        let size = max(1, layout.elementCount / max(runs, 1))
        Parallel.forEachRange(pieces.count, grain: max(1, piece / min(size, piece))) { _, range in
          for index in range {
            partial[index] = sum(
              pieces[index].offset, pieces[index].count, pieces[index].group)
          }
        }
      }
      for (part, run) in zip(partial, pieces) { sums[run.group] += part }
      start += runsAtOnce
    }
    return sums
  }
}
