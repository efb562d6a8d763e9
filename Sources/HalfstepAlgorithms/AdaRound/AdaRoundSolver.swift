// SPDX-License-Identifier: Apache-2.0
// Learns for each weight of a layer whether it is rounded down or up.

import HalfstepNumerics

/// Where the weights of a layer may go: two neighboring grid points each.
package struct RoundingChoices: Sendable {
  /// Lower grid points in tensor units, in the order of `RowLayout`.
  package var start: [Float]
  /// Distance to the upper grid points; 0 at the grid's ends.
  package var step: [Float]
  /// Where each weight lies at first, 0...1 of a step.
  package var height: [Float]

  package init(start: [Float], step: [Float], height: [Float]) {
    self.start = start
    self.step = step
    self.height = height
  }
}

/// Learns for each weight of a layer whether it is rounded down or up.
///
/// Without an activation function the loss is a quadratic form of the rows' moments, so that each step
/// may see all rows at a cost that does not depend on how many they are; that is done where it is the
/// cheaper way.
///
/// Minimizes the squared error of the layer's output behind its activation function on rows drawn
/// from all over the calibration data; the weights are snapped to the grid at the end. The result
/// does not depend on the number of threads, nor on whether rows are in memory or in a file.
///
/// - Reference: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020.
///   arXiv:2004.10568
package struct AdaRoundSolver {
  package let options: AdaRoundOptions
  package let layout: RowLayout
  package private(set) var loss: ReconstructionLoss

  /// - Throws: `HalfstepError.invalidArgument` for options out of range; `.shapeMismatch` unless the
  ///   loss is over the layout's output channels.
  package init(
    _ options: AdaRoundOptions, layout: RowLayout, loss: ReconstructionLoss
  ) throws(HalfstepError) {
    try options.validate()
    guard loss.channels == layout.outputs else {
      throw HalfstepError(
        .shapeMismatch, "AdaRound: \(loss.channels) channels in the loss, \(layout.outputs) outputs"
      )
    }
    self.options = options
    self.layout = layout
    self.loss = loss
  }

  /// What the solver learned.
  package struct Result: Sendable {
    /// Whether each weight goes to its upper grid point, in the order of `RowLayout`.
    package let isUp: [Bool]
    /// Mean loss over the first and last tenth of the iterations, with soft weights.
    package let firstLoss: Double
    package let lastLoss: Double
  }

  /// Whether steps work on the moments of all rows: exact without an activation function, and cheaper
  /// than a batch of rows if the layer's rows are no longer than two batches.
  package var usesMoments: Bool {
    loss.activation == .identity && !layout.isDepthwise && layout.columns <= 2 * options.batchRows
  }

  /// Runs all iterations.
  ///
  /// - Parameters:
  ///   - choices: Where the weights may go, `layout.weightCount` of them.
  ///   - rows: What to learn from; finished, 1 row or more.
  ///   - iterations: Steps, 1 or more.
  ///   - progress: Told the share that is done, now and then; throws to stop.
  /// - Throws: `HalfstepError.emptyStatistics` without rows; `.shapeMismatch` for choices of another
  ///   count; `.fileAccess`, `.outOfMemory`; what `progress` throws.
  /// - Complexity: O(iterations · batch rows · weights).
  package func solve(
    _ choices: RoundingChoices, rows: ReconstructionRows, iterations: Int,
    progress: (Double) throws(HalfstepError) -> Void
  ) throws(HalfstepError) -> Result {
    guard rows.count > 0 else {
      throw HalfstepError(.emptyStatistics, "AdaRound: no rows to learn from")
    }
    guard choices.start.count == layout.weightCount, rows.layout == layout else {
      throw HalfstepError(
        .shapeMismatch,
        "AdaRound: expected \(layout.weightCount) weights, got \(choices.start.count)")
    }
    let soft = try SoftRounding(start: choices.start, step: choices.step, height: choices.height)
    if usesMoments {
      return try solve(
        choices, moments: try OutputMoments(self, rows), iterations: iterations, progress: progress)
    }
    let batch = min(options.batchRows, rows.count)
    let products = try Buffer(batch * layout.outputStride)
    let gradient = try Buffer(soft.paddedCount)
    defer { withExtendedLifetime((products, gradient, soft)) {} }
    var random = RowGenerator(seed: options.seed, 2)
    let tenth = max(iterations / 10, 1)
    var (first, last) = (0.0, 0.0)
    // A report for about every 2²⁸ multiplications.
    let work = max(batch * layout.outputs * layout.columns, 1)
    let interval = min(max((1 << 28) / work, 1), 256)
    for iteration in 0..<iterations {
      if iteration % interval == 0 { try progress(Double(iteration) / Double(iterations)) }
      let start = Int(random.next() % UInt64(rows.count - batch + 1))
      let error = try rows.rows(start, batch) { (inputs) throws(HalfstepError) in
        try multiply(inputs, batch, soft.weights, into: products.start)
        let error = loss.evaluate(
          products.start, targets: inputs + layout.inputStride, targetStride: rows.stride,
          rows: batch, gradient: true)
        try accumulate(inputs, batch, products.start, into: gradient.start)
        return error / Double(batch)
      }
      soft.update(upstream: gradient.start, step(iteration, of: iterations))
      if iteration < tenth { first += error / Double(tenth) }
      if iteration >= iterations - tenth { last += error / Double(tenth) }
    }
    return Result(
      isUp: (0..<layout.weightCount).map { soft.isUp($0) }, firstLoss: first, lastLoss: last)
  }

  /// Mean loss of given weights over rows.
  ///
  /// - Parameters:
  ///   - weights: In the order of `RowLayout`, `layout.weightCount` of them.
  ///   - rows: Finished rows.
  /// - Returns: Mean over rows of the sum over channels of squared differences; 0 without rows.
  /// - Throws: `HalfstepError.shapeMismatch`, `.fileAccess`, `.outOfMemory`.
  package func error(of weights: [Float], rows: ReconstructionRows) throws(HalfstepError) -> Double
  {
    guard weights.count == layout.weightCount, rows.layout == layout else {
      throw HalfstepError(
        .shapeMismatch, "AdaRound: expected \(layout.weightCount) weights, got \(weights.count)")
    }
    if rows.count == 0 { return 0 }
    let batch = min(1024, rows.count)
    let products = try Buffer(batch * layout.outputStride)
    let copy = try Buffer(weights.count)
    defer { withExtendedLifetime((products, copy)) {} }
    weights.withUnsafeBufferPointer { source in
      if let source = source.baseAddress { copy.start.update(from: source, count: weights.count) }
    }
    var sum = 0.0
    for start in stride(from: 0, to: rows.count, by: batch) {
      let count = min(batch, rows.count - start)
      sum += try rows.rows(start, count) { (inputs) throws(HalfstepError) in
        try multiply(inputs, count, UnsafePointer(copy.start), into: products.start)
        return loss.evaluate(
          products.start, targets: inputs + layout.inputStride, targetStride: rows.stride,
          rows: count, gradient: false)
      }
    }
    return sum / Double(rows.count)
  }

  /// Gradient of the mean loss with respect to the weights.
  package func gradient(
    at weights: [Float], rows: ReconstructionRows
  ) throws(HalfstepError) -> [Float] {
    var total = [Float](repeating: 0, count: weights.count)
    if rows.count == 0 { return total }
    let batch = min(1024, rows.count)
    let products = try Buffer(batch * layout.outputStride)
    let copy = try Buffer(weights.count)
    let gradient = try Buffer(weights.count)
    defer { withExtendedLifetime((products, copy, gradient)) {} }
    for index in weights.indices { copy.start[index] = weights[index] }
    for start in stride(from: 0, to: rows.count, by: batch) {
      let count = min(batch, rows.count - start)
      try rows.rows(start, count) { (inputs) throws(HalfstepError) in
        try multiply(inputs, count, UnsafePointer(copy.start), into: products.start)
        _ = loss.evaluate(
          products.start, targets: inputs + layout.inputStride, targetStride: rows.stride,
          rows: count, gradient: true)
        try accumulate(inputs, count, products.start, into: gradient.start)
      }
      let share = Float(count) / Float(rows.count)
      for index in total.indices { total[index] += share * gradient.start[index] }
    }
    return total
  }

  /// Moves the bias to where the loss of given weights is least, by some steps of Newton's method.
  ///
  /// - Returns: What the bias changes by, `[K]`.
  package mutating func refitBias(
    _ weights: [Float], rows: ReconstructionRows, steps: Int = 4
  ) throws(HalfstepError) -> [Float] {
    var total = [Float](repeating: 0, count: layout.outputs)
    if rows.count == 0 { return total }
    let batch = min(1024, rows.count)
    let products = try Buffer(batch * layout.outputStride)
    let copy = try Buffer(weights.count)
    let sums = try Buffer(2 * layout.outputStride)
    defer { withExtendedLifetime((products, copy, sums)) {} }
    for index in weights.indices { copy.start[index] = weights[index] }
    for _ in 0..<steps {
      for index in 0..<2 * layout.outputStride { sums.start[index] = 0 }
      for start in stride(from: 0, to: rows.count, by: batch) {
        let count = min(batch, rows.count - start)
        try rows.rows(start, count) { (inputs) throws(HalfstepError) in
          try multiply(inputs, count, UnsafePointer(copy.start), into: products.start)
          loss.addBiasSums(
            UnsafePointer(products.start), targets: inputs + layout.inputStride,
            targetStride: rows.stride, rows: count, slopes: sums.start,
            curvatures: sums.start + layout.outputStride)
        }
      }
      // A channel that is hardly ever in the function's open part stays where it is.
      let step = (0..<layout.outputs).map { channel -> Float in
        let curvature = sums.start[layout.outputStride + channel]
        guard curvature > 0.01 * Float(rows.count) else { return 0 }
        return -sums.start[channel] / curvature
      }
      for channel in step.indices { total[channel] += step[channel] }
      loss = loss.shifted(by: step)
    }
    return total
  }

  // MARK: - Products

  /// The layer's products without bias, `[count, outputStride]`.
  private func multiply(
    _ inputs: UnsafePointer<Float>, _ count: Int, _ weights: UnsafePointer<Float>,
    into products: UnsafeMutablePointer<Float>
  ) throws(HalfstepError) {
    let stride = layout.inputStride + layout.outputStride
    if layout.isDepthwise {
      DepthwiseRows(taps: layout.columns, channels: layout.outputs).multiply(
        inputs, rowStride: stride, count: count, weights, into: products)
      return
    }
    let (columns, outputs) = (layout.columns, layout.outputsPerGroup)
    try MatrixProduct.multiply(
      groups: layout.groups, rows: count, columns: outputs, inner: columns,
      .init(inputs, stride: stride), aStep: columns,
      .init(weights, stride: columns, isTransposed: true), bStep: outputs * columns,
      into: products, cStride: layout.outputStride, cStep: outputs)
  }

  /// The gradient of the weights, in their order.
  private func accumulate(
    _ inputs: UnsafePointer<Float>, _ count: Int, _ upstream: UnsafePointer<Float>,
    into gradient: UnsafeMutablePointer<Float>
  ) throws(HalfstepError) {
    let stride = layout.inputStride + layout.outputStride
    if layout.isDepthwise {
      DepthwiseRows(taps: layout.columns, channels: layout.outputs).accumulate(
        inputs, rowStride: stride, count: count, upstream, into: gradient)
      return
    }
    let (columns, outputs) = (layout.columns, layout.outputsPerGroup)
    try MatrixProduct.multiply(
      groups: layout.groups, rows: outputs, columns: columns, inner: count,
      .init(upstream, stride: layout.outputStride, isTransposed: true), aStep: outputs,
      .init(inputs, stride: stride), bStep: columns,
      into: gradient, cStride: columns, cStep: outputs * columns)
  }

  /// Floats that begin as zeros.
  final class Buffer {
    private let storage: TensorStorage
    let start: UnsafeMutablePointer<Float>

    init(_ count: Int) throws(HalfstepError) {
      storage = try TensorStorage(byteCount: count * MemoryLayout<Float>.stride)
      start = storage.baseAddress.bindMemory(to: Float.self, capacity: max(count, 1))
      start.initialize(repeating: 0, count: count)
    }
  }
}
