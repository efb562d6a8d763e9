// SPDX-License-Identifier: Apache-2.0
// Squared error of a layer's output behind its activation function, with its gradient.

/// Squared error of a layer's output rows behind its activation function.
///
/// The loss of a batch is the mean over rows of the sum over channels of squared differences. Rows are
/// summed in `Float` over one row, then in `Double` in order: the result does not depend on the
/// number of threads.
package struct ReconstructionLoss: Sendable {
  package let activation: FollowingActivation
  /// Output channels.
  package let channels: Int
  /// The same, up to whole vectors of 16: floats from one row to the next.
  package let rowStride: Int
  /// What the layer adds to its product, `[rowStride]`.
  package private(set) var bias: [Float]
  private let slopes: [Float]

  /// Prepares the loss.
  ///
  /// - Parameters:
  ///   - bias: What the layer adds to its product, `[K]`.
  ///   - activation: What follows the layer.
  /// - Throws: `HalfstepError.shapeMismatch` if the activation has another number of slopes.
  package init(bias: [Float], activation: FollowingActivation) throws(HalfstepError) {
    channels = bias.count
    rowStride = (bias.count + 15) / 16 * 16
    let padding = [Float](repeating: 0, count: rowStride - channels)
    self.bias = bias + padding
    self.activation = activation
    if case .slopes(let slopes) = activation {
      guard slopes.count == channels else {
        throw HalfstepError(
          .shapeMismatch, "activation: \(slopes.count) slopes for \(channels) channels")
      }
      self.slopes = slopes + padding
    } else {
      slopes = []
    }
  }

  /// Applies the activation function to one row of `rowStride` floats.
  package func activate(_ row: UnsafeMutablePointer<Float>) {
    visit(ActivateRow(row: row, stride: rowStride))
  }

  /// Computes the error of rows and, in place of the products, the loss's gradient.
  ///
  /// - Parameters:
  ///   - products: The layer's products without bias, `[rows, rowStride]`; become the gradient of
  ///     the loss with respect to themselves if `gradient` is true.
  ///   - targets: What `activate` made of the wanted outputs, rows of `rowStride` floats.
  ///   - targetStride: Floats from one target to the next.
  ///   - rows: Number of rows.
  ///   - gradient: Whether the gradient is wanted.
  /// - Returns: The sum of squared differences over rows and channels.
  package func evaluate(
    _ products: UnsafeMutablePointer<Float>, targets: UnsafePointer<Float>, targetStride: Int,
    rows: Int, gradient: Bool
  ) -> Double {
    var sums = [Double](repeating: 0, count: rows)
    bias.withUnsafeBufferPointer { bias in
      sums.withUnsafeMutableBufferPointer { sums in
        guard let bias = bias.baseAddress, let sums = sums.baseAddress else { return }
        Parallel.forEachRange(rows, grain: max(1, (1 << 14) / max(rowStride, 1))) { _, range in
          visit(
            LossRows(
              products: products, targets: targets, targetStride: targetStride, bias: bias,
              stride: rowStride, sums: sums, rows: range,
              scale: gradient ? 2 / Float(rows) : nil))
        }
      }
    }
    return sums.reduce(0, +)
  }

  /// The same loss with something added to the bias, `[K]`.
  package func shifted(by shift: [Float]) -> ReconstructionLoss {
    var copy = self
    for channel in 0..<channels { copy.bias[channel] += shift[channel] }
    return copy
  }

  /// Adds up, for each channel, what one step of Newton's method for its bias needs.
  ///
  /// - Parameters:
  ///   - products: As in `evaluate`; unchanged.
  ///   - slopes: Receives sums of differences times slopes, `[rowStride]`.
  ///   - curvatures: Receives sums of squared slopes, `[rowStride]`.
  package func addBiasSums(
    _ products: UnsafePointer<Float>, targets: UnsafePointer<Float>, targetStride: Int, rows: Int,
    slopes: UnsafeMutablePointer<Float>, curvatures: UnsafeMutablePointer<Float>
  ) {
    bias.withUnsafeBufferPointer { bias in
      guard let bias = bias.baseAddress else { return }
      visit(
        BiasRows(
          products: products, targets: targets, targetStride: targetStride, bias: bias,
          stride: rowStride, rows: rows, slopes: slopes, curvatures: curvatures))
    }
  }

  private func visit(_ visitor: some ActivationVisitor) {
    slopes.withUnsafeBufferPointer { slopes in
      switch activation {
      case .identity: visitor.run(IdentityLanes())
      case .clip(let low, let high): visitor.run(ClipLanes(low: low, high: high))
      case .slopes: if let slopes = slopes.baseAddress { visitor.run(SlopeLanes(slopes: slopes)) }
      case .sigmoid: visitor.run(SigmoidLanes())
      case .tanh: visitor.run(TanhLanes())
      case .hardSwish: visitor.run(HardSwishLanes())
      case .hardSigmoid(let slope, let shift):
        visitor.run(HardSigmoidLanes(slope: slope, shift: shift))
      }
    }
  }
}

/// Work that is compiled once for each activation function.
private protocol ActivationVisitor {
  func run<Function: LaneActivation>(_ function: Function)
}

private struct ActivateRow: ActivationVisitor {
  let row: UnsafeMutablePointer<Float>
  let stride: Int

  func run<Function: LaneActivation>(_ function: Function) {
    var channel = 0
    while channel < stride {
      function(Lanes(loading: row + channel), channel: channel).value.store(to: row + channel)
      channel &+= 16
    }
  }
}

private struct BiasRows: ActivationVisitor {
  let products: UnsafePointer<Float>
  let targets: UnsafePointer<Float>
  let targetStride: Int
  let bias: UnsafePointer<Float>
  let stride: Int
  let rows: Int
  let slopes: UnsafeMutablePointer<Float>
  let curvatures: UnsafeMutablePointer<Float>

  func run<Function: LaneActivation>(_ function: Function) {
    for channel in Swift.stride(from: 0, to: stride, by: 16) {
      var sum = Lanes(loading: slopes + channel)
      var curvature = Lanes(loading: curvatures + channel)
      let own = Lanes(loading: bias + channel)
      for row in 0..<rows {
        let product = Lanes(loading: products + row * stride + channel) + own
        let (value, slope) = function(product, channel: channel)
        sum += (value - Lanes(loading: targets + row * targetStride + channel)) * slope
        curvature += slope * slope
      }
      sum.store(to: slopes + channel)
      curvature.store(to: curvatures + channel)
    }
  }
}

private struct LossRows: ActivationVisitor {
  let products: UnsafeMutablePointer<Float>
  let targets: UnsafePointer<Float>
  let targetStride: Int
  let bias: UnsafePointer<Float>
  let stride: Int
  let sums: UnsafeMutablePointer<Double>
  let rows: Range<Int>
  /// Two over the number of rows of the batch; nil if no gradient is wanted.
  let scale: Float?

  func run<Function: LaneActivation>(_ function: Function) {
    for index in rows {
      let row = products + index * stride
      let target = targets + index * targetStride
      var sum = Lanes(repeating: 0)
      var channel = 0
      while channel < stride {
        let product = Lanes(loading: row + channel) + Lanes(loading: bias + channel)
        let (value, slope) = function(product, channel: channel)
        let difference = value - Lanes(loading: target + channel)
        sum += difference * difference
        if let scale { (difference * slope * scale).store(to: row + channel) }
        channel &+= 16
      }
      sums[index] = Double(sum.sum())
    }
  }
}
