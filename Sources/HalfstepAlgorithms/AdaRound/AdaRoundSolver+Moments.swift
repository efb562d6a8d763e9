// SPDX-License-Identifier: Apache-2.0
// Steps of AdaRound on the moments of all rows, for layers without an activation function.

import HalfstepNumerics

extension AdaRoundSolver {
  /// What the squared error of a layer without an activation function depends on: for each group
  /// `E x·xᵀ` and `E (t − b)·xᵀ` over the rows x and wanted outputs t, and the power of t − b.
  struct OutputMoments {
    let gram: [Float]
    let cross: [Float]
    let power: Double

    /// Sums over all rows: products in float for panels of 1,024 rows, which are added up in `Double`.
    init(_ solver: AdaRoundSolver, _ rows: ReconstructionRows) throws(HalfstepError) {
      let layout = solver.layout
      let (columns, outputs, groups) = (layout.columns, layout.outputsPerGroup, layout.groups)
      var grams = [Double](repeating: 0, count: groups * columns * columns)
      var crosses = [Double](repeating: 0, count: layout.weightCount)
      var (gram, cross) = (grams.map { _ in Float(0) }, crosses.map { _ in Float(0) })
      var power = 0.0
      let bias = solver.loss.bias
      let height = min(1024, rows.count)
      var wanted = [Float](repeating: 0, count: height * layout.outputs)
      for start in stride(from: 0, to: rows.count, by: height) {
        let count = min(height, rows.count - start)
        try rows.rows(start, count) { (inputs) throws(HalfstepError) in
          for row in 0..<count {
            let target = inputs + row * rows.stride + layout.inputStride
            for channel in 0..<layout.outputs {
              let value = target[channel] - bias[channel]
              wanted[row * layout.outputs + channel] = value
              power += Double(value) * Double(value)
            }
          }
          let x = MatrixProduct.Operand(inputs, stride: rows.stride)
          let transposed = MatrixProduct.Operand(inputs, stride: rows.stride, isTransposed: true)
          try gram.withUnsafeMutableBufferPointer { (gram) throws(HalfstepError) in
            guard let gram = gram.baseAddress else { return }
            try MatrixProduct.multiply(
              groups: groups, rows: columns, columns: columns, inner: count, transposed,
              aStep: columns, x, bStep: columns, into: gram, cStride: columns,
              cStep: columns * columns)
          }
          try wanted.withUnsafeBufferPointer { (wanted) throws(HalfstepError) in
            try cross.withUnsafeMutableBufferPointer { (cross) throws(HalfstepError) in
              guard let wanted = wanted.baseAddress, let cross = cross.baseAddress else { return }
              try MatrixProduct.multiply(
                groups: groups, rows: outputs, columns: columns, inner: count,
                .init(wanted, stride: layout.outputs, isTransposed: true), aStep: outputs, x,
                bStep: columns, into: cross, cStride: columns, cStep: outputs * columns)
            }
          }
        }
        for index in gram.indices { grams[index] += Double(gram[index]) }
        for index in cross.indices { crosses[index] += Double(cross[index]) }
      }
      let scale = 1 / Double(max(rows.count, 1))
      self.gram = grams.map { Float($0 * scale) }
      self.cross = crosses.map { Float($0 * scale) }
      self.power = power * scale
    }
  }

  /// Runs all iterations on moments: the gradient of `w·G·wᵀ − 2·w·Cᵀ` is `2·(w·G − C)`.
  ///
  /// - Complexity: O(iterations · weights · columns).
  func solve(
    _ choices: RoundingChoices, moments: OutputMoments, iterations: Int,
    progress: (Double) throws(HalfstepError) -> Void
  ) throws(HalfstepError) -> Result {
    let (columns, outputs) = (layout.columns, layout.outputsPerGroup)
    let soft = try SoftRounding(start: choices.start, step: choices.step, height: choices.height)
    let gradient = try Buffer(soft.paddedCount)
    defer { withExtendedLifetime((gradient, soft)) {} }
    let tenth = max(iterations / 10, 1)
    // The loss costs a pass over the weights: ten times in a tenth tell enough.
    let sampling = max(tenth / 10, 1)
    var (first, last) = ((sum: 0.0, count: 0), (sum: 0.0, count: 0))
    let interval = min(max((1 << 28) / max(layout.weightCount * columns, 1), 1), 256)
    try moments.gram.withUnsafeBufferPointer { (gram) throws(HalfstepError) in
      try moments.cross.withUnsafeBufferPointer { (cross) throws(HalfstepError) in
        guard let gram = gram.baseAddress, let cross = cross.baseAddress else { return }
        for iteration in 0..<iterations {
          if iteration % interval == 0 { try progress(Double(iteration) / Double(iterations)) }
          gradient.start.update(from: cross, count: layout.weightCount)
          try MatrixProduct.multiply(
            groups: layout.groups, rows: outputs, columns: columns, inner: columns,
            .init(soft.weights, stride: columns), aStep: outputs * columns,
            .init(gram, stride: columns), bStep: columns * columns, scale: 2, keep: -2,
            into: gradient.start, cStride: columns, cStep: outputs * columns)
          if iteration % sampling == 0 && (iteration < tenth || iteration >= iterations - tenth) {
            var error = moments.power
            for index in 0..<layout.weightCount {
              let rest = gradient.start[index] / 2 - cross[index]
              error += Double(soft.weights[index]) * Double(rest)
            }
            if iteration < tenth { first = (first.sum + error, first.count + 1) }
            if iteration >= iterations - tenth { last = (last.sum + error, last.count + 1) }
          }
          soft.update(upstream: gradient.start, step(iteration, of: iterations))
        }
      }
    }
    return Result(
      isUp: (0..<layout.weightCount).map { soft.isUp($0) },
      firstLoss: first.sum / Double(max(first.count, 1)),
      lastLoss: last.sum / Double(max(last.count, 1)))
  }

  /// What Adam needs in an iteration.
  func step(_ iteration: Int, of iterations: Int) -> SoftRounding.Step {
    SoftRounding.Step(
      number: iteration + 1, rate: options.rate, regularization: options.regularization,
      beta: SoftRounding.beta(
        iteration: iteration, of: iterations, range: options.beta, warmStart: options.warmStart))
  }
}
