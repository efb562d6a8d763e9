// SPDX-License-Identifier: Apache-2.0
// Weights whose rounding, down or up, is being learned by gradient descent.

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// Weights between two neighboring grid points, each with a continuous variable that says where.
///
/// A weight is `start + step·h(V)`, where `h(V) = clamp(1.2·σ(V) − 0.1, 0, 1)` and `start` and
/// `start + step` are the grid points below and above. Adam moves V against the gradient of a loss
/// plus the regularizer `λ·Σ(1 − |2h − 1|^β)`, which pushes every h to 0 or 1. Elements are
/// independent of each other, so the result does not depend on the number of threads. Not safe for
/// concurrent use.
///
/// - Reference: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
///   eq. 21-25. arXiv:2004.10568. Kingma and Ba, "Adam", 2015. arXiv:1412.6980
package final class SoftRounding {
  /// How far the ends of the stretched sigmoid lie outside 0...1.
  package static let stretch = 0.1

  /// What one step of Adam needs.
  package struct Step: Sendable {
    /// 1 for the first step.
    package var number: Int
    /// Learning rate.
    package var rate: Double
    /// Weight λ of the regularizer.
    package var regularization: Double
    /// Exponent of the regularizer, at least 1; nil leaves the regularizer out.
    package var beta: Double?

    package init(number: Int, rate: Double, regularization: Double, beta: Double?) {
      self.number = number
      self.rate = rate
      self.regularization = regularization
      self.beta = beta
    }
  }

  /// Number of weights.
  package let count: Int
  /// The same, up to whole vectors of 16; what is beyond `count` has step 0.
  package let paddedCount: Int
  private let storage: TensorStorage
  private let planes: SoftPlanes

  /// Places weights between grid points.
  ///
  /// - Parameters:
  ///   - start: The lower grid point of each weight.
  ///   - step: Distance to the upper one, as many; 0 where the grid ends.
  ///   - height: Where each weight lies at first, as many, 0...1.
  /// - Throws: `HalfstepError.shapeMismatch` if the counts differ; `.outOfMemory`.
  package init(start: [Float], step: [Float], height: [Float]) throws(HalfstepError) {
    guard start.count == step.count, start.count == height.count else {
      throw HalfstepError(
        .shapeMismatch,
        "soft rounding: \(start.count) weights, \(step.count) steps, \(height.count) heights")
    }
    count = start.count
    let padded = (count + 15) / 16 * 16
    paddedCount = padded
    let bytes = 6 * padded * MemoryLayout<Float>.stride
    storage = try TensorStorage(byteCount: bytes)
    let base = storage.baseAddress.bindMemory(to: Float.self, capacity: 6 * padded)
    base.initialize(repeating: 0, count: 6 * padded)
    planes = SoftPlanes(
      variables: base, first: base + padded, second: base + 2 * padded, weights: base + 3 * padded,
      step: base + 4 * padded, start: base + 5 * padded)
    for index in 0..<count {
      planes.start[index] = start[index]
      planes.step[index] = step[index]
      planes.variables[index] = Self.variable(height: height[index])
      planes.weights[index] =
        start[index] + step[index] * Self.height(variable: planes.variables[index])
    }
  }

  /// The weights as they are now, `start + step·h`; `paddedCount` of them, valid while `self` lives.
  package var weights: UnsafePointer<Float> { UnsafePointer(planes.weights) }

  /// Whether a weight is nearer to its upper grid point now.
  package func isUp(_ index: Int) -> Bool { planes.variables[index] >= 0 }

  /// How far each weight is from its lower grid point, 0...1, in steps.
  package var heights: [Float] {
    (0..<count).map { Self.height(variable: planes.variables[$0]) }
  }

  // MARK: - Objective

  /// The variable at which the stretched sigmoid has a given height, 0...1.
  package static func variable(height: Float) -> Float {
    let inside = Double(min(max(height, 0), 1)) + stretch
    return Float(-log((1 + 2 * stretch) / inside - 1))
  }

  /// The stretched sigmoid.
  package static func height(variable: Float) -> Float {
    let logistic = 1 / (1 + exp(-Double(variable)))
    return Float(min(max((1 + 2 * stretch) * logistic - stretch, 0), 1))
  }

  /// Exponent of the regularizer at an iteration: none at first, then a cosine between two values.
  ///
  /// - Parameters:
  ///   - iteration: From 0.
  ///   - iterations: How many there are.
  ///   - range: β when it sets in and at the end.
  ///   - warmStart: Share of the iterations without the regularizer, 0...1.
  package static func beta(
    iteration: Int, of iterations: Int, range: ClosedInterval, warmStart: Double
  ) -> Double? {
    let warm = warmStart * Double(iterations)
    guard Double(iteration) >= warm, Double(iterations) > warm else { return nil }
    let progress = (Double(iteration) - warm) / (Double(iterations) - warm)
    return range.end + 0.5 * (range.start - range.end) * (1 + cos(Double.pi * progress))
  }

  /// Two values between which something moves, in either direction.
  package struct ClosedInterval: Hashable, Sendable {
    package var start: Double
    package var end: Double

    package init(start: Double, end: Double) {
      self.start = start
      self.end = end
    }
  }

  /// The regularizer's sum `Σ(1 − |2h − 1|^β)`, in `Double`.
  package func regularizer(beta: Double) -> Double {
    (0..<count).reduce(0) { sum, index in
      sum + 1 - pow(abs(2 * Double(Self.height(variable: planes.variables[index])) - 1), beta)
    }
  }

  /// Gradient of loss and regularizer with respect to the variables.
  ///
  /// - Parameters:
  ///   - upstream: Gradient of the loss with respect to each weight, `count` of them.
  ///   - regularization: λ.
  ///   - beta: β, or nil without a regularizer.
  /// - Throws: `HalfstepError.shapeMismatch` for another count.
  package func gradient(
    upstream: [Float], regularization: Double, beta: Double?
  ) throws(HalfstepError) -> [Float] {
    guard upstream.count == count else {
      throw HalfstepError(
        .shapeMismatch, "soft rounding: \(upstream.count) gradients for \(count) weights")
    }
    let padded = upstream + [Float](repeating: 0, count: paddedCount - count)
    var result = [Float](repeating: 0, count: paddedCount)
    let push = RegularizerConstants(regularization: regularization, beta: beta)
    padded.withUnsafeBufferPointer { padded in
      result.withUnsafeMutableBufferPointer { result in
        guard let padded = padded.baseAddress, let result = result.baseAddress else { return }
        for index in stride(from: 0, to: paddedCount, by: 16) {
          softGradient(
            Lanes(loading: planes.variables + index), Lanes(loading: planes.step + index),
            Lanes(loading: padded + index), push
          ).store(to: result + index)
        }
      }
    }
    return Array(result[..<count])
  }

  /// Moves the variables one step of Adam and refreshes the weights: one pass over memory.
  ///
  /// - Parameters:
  ///   - upstream: Gradient of the loss with respect to each weight, `paddedCount` of them.
  ///   - parameters: Rate, regularizer and the number of the step.
  ///   - isPortable: Whether AVX-512 stays unused, which changes nothing but the time.
  /// - Complexity: O(weights).
  package func update(
    upstream: UnsafePointer<Float>, _ parameters: Step, isPortable: Bool = false
  ) {
    let constants = UpdateConstants(parameters)
    let planes = planes
    Parallel.forEachRange(paddedCount / 16, grain: 256) { _, range in
      updateSoftRounding(
        planes, upstream, range.lowerBound * 16..<range.upperBound * 16, constants,
        isPortable: isPortable)
    }
    withExtendedLifetime(storage) {}
  }
}
