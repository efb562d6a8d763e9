// SPDX-License-Identifier: Apache-2.0
// One fused pass of AdaRound over its weights: sigmoid, regularizer, Adam, sigmoid.

import CVectorKernels

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// The arrays of a soft rounding.
struct SoftPlanes: @unchecked Sendable {
  // Unchecked: threads work on disjoint ranges.
  let variables: UnsafeMutablePointer<Float>
  let first: UnsafeMutablePointer<Float>
  let second: UnsafeMutablePointer<Float>
  let weights: UnsafeMutablePointer<Float>
  let step: UnsafeMutablePointer<Float>
  let start: UnsafeMutablePointer<Float>
}

/// What the regularizer's gradient is computed from.
struct RegularizerConstants {
  /// 2·λ·β, and the exponent β − 1; 0 and 1 without a regularizer.
  let factor: Float
  let exponent: Float

  init(regularization: Double, beta: Double?) {
    factor = Float(2 * regularization * (beta ?? 0))
    exponent = Float((beta ?? 2) - 1)
  }
}

/// What a step of Adam is computed from.
struct UpdateConstants {
  let regularizer: RegularizerConstants
  /// Rate over the first bias correction.
  let rate: Float
  /// Inverse of the root of the second bias correction.
  let inverseRoot: Float

  init(_ step: SoftRounding.Step) {
    regularizer = RegularizerConstants(regularization: step.regularization, beta: step.beta)
    rate = Float(step.rate / (1 - pow(0.9, Double(step.number))))
    inverseRoot = Float(1 / (1 - pow(0.999, Double(step.number))).squareRoot())
  }
}

/// Heights of the stretched sigmoid before they are clamped.
@inline(__always) private func stretched(_ logistic: Lanes) -> Lanes { logistic * 1.2 - 0.1 }

/// Gradient of loss and regularizer with respect to the variables.
@inline(__always) func softGradient(
  _ variables: Lanes, _ step: Lanes, _ upstream: Lanes, _ push: RegularizerConstants
) -> Lanes {
  let zero = Lanes(repeating: 0)
  let logistic = variables.logistic
  let open = stretched(logistic)
  let height = open.atLeast(zero).atMost(Lanes(repeating: 1))
  let isFlat = open .!= height
  // Where the sigmoid is cut off it is flat: late on, nearly everywhere.
  if all(isFlat) { return zero }
  var gradient = step * upstream
  if push.factor != 0 {
    let centered = height * 2 - 1
    // 10⁻³⁰ to a power of 1 or more is nothing, and has a logarithm.
    let logarithm = centered.magnitudes.atLeast(Lanes(repeating: 1e-30)).logarithmBase2
    let power = (logarithm * push.exponent).exponentialBase2
    gradient -= (power * push.factor).signed(as: centered)
  }
  let slope = logistic * (1 - logistic) * 1.2
  return (gradient * slope).replacing(with: zero, where: isFlat)
}

/// One step of Adam over a range of whole vectors; the same to the bit with and without AVX-512.
@inline(never)
func updateSoftRounding(
  _ planes: SoftPlanes, _ upstream: UnsafePointer<Float>, _ range: Range<Int>,
  _ constants: UpdateConstants, isPortable: Bool
) {
  if !isPortable, hsk_has_avx512() != 0 {
    let first = range.lowerBound
    hsk_update_soft_rounding(
      hsk_soft_planes(
        variables: planes.variables + first, first: planes.first + first,
        second: planes.second + first, weights: planes.weights + first,
        step: planes.step + first, start: planes.start + first),
      upstream + first, range.count,
      hsk_soft_constants(
        factor: constants.regularizer.factor, exponent: constants.regularizer.exponent,
        rate: constants.rate, inverse_root: constants.inverseRoot))
    return
  }
  let zero = Lanes(repeating: 0)
  let one = Lanes(repeating: 1)
  var index = range.lowerBound
  while index < range.upperBound {
    let variables = Lanes(loading: planes.variables + index)
    let step = Lanes(loading: planes.step + index)
    let gradient = softGradient(
      variables, step, Lanes(loading: upstream + index), constants.regularizer)
    let first = Lanes(loading: planes.first + index) * 0.9 + gradient * 0.1
    let second = Lanes(loading: planes.second + index) * 0.999 + gradient * gradient * 0.001
    let moved =
      variables - first * constants.rate / (second.roots * constants.inverseRoot + 1e-8)
    first.store(to: planes.first + index)
    second.store(to: planes.second + index)
    moved.store(to: planes.variables + index)
    let height = stretched(moved.logistic).atLeast(zero).atMost(one)
    (Lanes(loading: planes.start + index) + step * height).store(to: planes.weights + index)
    index &+= 16
  }
}
