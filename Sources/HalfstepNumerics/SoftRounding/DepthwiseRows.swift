// SPDX-License-Identifier: Apache-2.0
// Products of depthwise layers, whose channels have a few weights each and nothing in common.

/// Rows of a depthwise layer: for each kernel tap, the inputs of all channels side by side.
package struct DepthwiseRows: Sendable {
  /// Kernel taps.
  package let taps: Int
  /// Channels, up to whole vectors of 16: floats from one tap to the next.
  package let stride: Int

  package init(taps: Int, channels: Int) {
    self.taps = taps
    self.stride = (channels + 15) / 16 * 16
  }

  /// Multiplies rows with weights.
  ///
  /// - Parameters:
  ///   - rows: Inputs, `[taps, stride]` each, `rowStride` floats apart.
  ///   - weights: `[taps, stride]`.
  ///   - result: Receives `[count, stride]`.
  package func multiply(
    _ rows: UnsafePointer<Float>, rowStride: Int, count: Int, _ weights: UnsafePointer<Float>,
    into result: UnsafeMutablePointer<Float>
  ) {
    Parallel.forEachRange(count, grain: max(1, (1 << 14) / max(taps * stride, 1))) { _, range in
      for row in range {
        forward(rows + row * rowStride, weights, result + row * stride)
      }
    }
  }

  /// Sums the gradient of the weights over rows, in order.
  ///
  /// - Parameters:
  ///   - rows: Inputs, `[taps, stride]` each, `rowStride` floats apart.
  ///   - upstream: Gradients of the products, `[count, stride]`.
  ///   - result: Receives `[taps, stride]`.
  package func accumulate(
    _ rows: UnsafePointer<Float>, rowStride: Int, count: Int, _ upstream: UnsafePointer<Float>,
    into result: UnsafeMutablePointer<Float>
  ) {
    Parallel.forEachRange(stride / 16, grain: 1) { _, range in
      for block in range {
        for tap in 0..<taps {
          let column = tap * stride + block * 16
          backward(rows + column, rowStride, count, upstream + block * 16, result + column)
        }
      }
    }
  }

  @inline(never)
  private func forward(
    _ row: UnsafePointer<Float>, _ weights: UnsafePointer<Float>,
    _ result: UnsafeMutablePointer<Float>
  ) {
    var channel = 0
    while channel < stride {
      var sum = Lanes(repeating: 0)
      var index = channel
      for _ in 0..<taps {
        sum += Lanes(loading: row + index) * Lanes(loading: weights + index)
        index &+= stride
      }
      sum.store(to: result + channel)
      channel &+= 16
    }
  }

  @inline(never)
  private func backward(
    _ column: UnsafePointer<Float>, _ rowStride: Int, _ count: Int,
    _ upstream: UnsafePointer<Float>, _ result: UnsafeMutablePointer<Float>
  ) {
    var sum = Lanes(repeating: 0)
    var (input, gradient) = (column, upstream)
    for _ in 0..<count {
      sum += Lanes(loading: input) * Lanes(loading: gradient)
      input += rowStride
      gradient += stride
    }
    sum.store(to: result)
  }
}
