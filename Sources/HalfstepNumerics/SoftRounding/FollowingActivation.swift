// SPDX-License-Identifier: Apache-2.0
// Activation functions that belong to the objective of a reconstruction.

/// The activation function behind a layer, through which its error is measured.
package enum FollowingActivation: Hashable, Sendable {
  /// None, or one that mixes channels.
  case identity
  /// Relu, Relu6 and Clip; either end may be infinite.
  case clip(low: Float, high: Float)
  /// LeakyRelu and PRelu: slopes below zero, one for each output channel.
  case slopes([Float])
  case sigmoid
  case tanh
  /// x · clamp(x/6 + 1/2, 0, 1).
  case hardSwish
  /// clamp(slope·x + shift, 0, 1).
  case hardSigmoid(slope: Float, shift: Float)

  /// Relu.
  package static let relu = FollowingActivation.clip(low: 0, high: .infinity)
}

/// Value and derivative of an activation function.
protocol LaneActivation {
  func callAsFunction(_ x: Lanes, channel: Int) -> (value: Lanes, slope: Lanes)
}

struct IdentityLanes: LaneActivation {
  @inline(__always) func callAsFunction(_ x: Lanes, channel: Int) -> (value: Lanes, slope: Lanes) {
    (x, Lanes(repeating: 1))
  }
}

struct ClipLanes: LaneActivation {
  let low: Float
  let high: Float

  @inline(__always) func callAsFunction(_ x: Lanes, channel: Int) -> (value: Lanes, slope: Lanes) {
    let one = Lanes(repeating: 1)
    let inside = (x .> low) .& (x .< high)
    return (
      x.atLeast(Lanes(repeating: low)).atMost(Lanes(repeating: high)),
      Lanes(repeating: 0).replacing(with: one, where: inside)
    )
  }
}

struct SlopeLanes: LaneActivation {
  /// Padded to whole vectors.
  let slopes: UnsafePointer<Float>

  @inline(__always) func callAsFunction(_ x: Lanes, channel: Int) -> (value: Lanes, slope: Lanes) {
    let slope = Lanes(repeating: 1)
      .replacing(with: Lanes(loading: slopes + channel), where: x .<= 0)
    return (x * slope, slope)
  }
}

struct SigmoidLanes: LaneActivation {
  @inline(__always) func callAsFunction(_ x: Lanes, channel: Int) -> (value: Lanes, slope: Lanes) {
    let value = x.logistic
    return (value, value * (1 - value))
  }
}

struct TanhLanes: LaneActivation {
  @inline(__always) func callAsFunction(_ x: Lanes, channel: Int) -> (value: Lanes, slope: Lanes) {
    let value = (x * 2).logistic * 2 - 1
    return (value, 1 - value * value)
  }
}

struct HardSigmoidLanes: LaneActivation {
  let slope: Float
  let shift: Float

  @inline(__always) func callAsFunction(_ x: Lanes, channel: Int) -> (value: Lanes, slope: Lanes) {
    let zero = Lanes(repeating: 0)
    let open = x * slope + shift
    let value = open.atLeast(zero).atMost(Lanes(repeating: 1))
    return (value, zero.replacing(with: Lanes(repeating: slope), where: open .== value))
  }
}

struct HardSwishLanes: LaneActivation {
  @inline(__always) func callAsFunction(_ x: Lanes, channel: Int) -> (value: Lanes, slope: Lanes) {
    let zero = Lanes(repeating: 0)
    let open = x * (1 / 6) + 0.5
    let gate = open.atLeast(zero).atMost(Lanes(repeating: 1))
    let ramp = zero.replacing(with: x * (1 / 6), where: open .== gate)
    return (x * gate, gate + ramp)
  }
}
