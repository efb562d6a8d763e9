// SPDX-License-Identifier: Apache-2.0
// Balances the weight ranges of consecutive layers.

import HalfstepGraph
import HalfstepNumerics

/// Balances the weight ranges of consecutive layers, so that one scale per tensor serves all channels.
///
/// Positive scaling commutes with Relu, LeakyRelu, PRelu, pooling, Concat and a few others: what is
/// divided out of a channel where a layer writes it can be multiplied into the weights that read it.
/// Layers are Conv (with groups, depthwise), ConvTranspose, Gemm and MatMul with constant weights. The
/// factor of a channel is √(r₁/r₂) for the largest weights r₁ that write it and r₂ that read it, so
/// that both become √(r₁·r₂); rounds over all layers repeat this until the factors of no tensor move
/// against each other. Where a batch norm was folded, what a channel is expected to reach counts as a third
/// range: r₁ is then the larger of the weight and β + 3·|γ| (or a Clip's bound), the latter scaled so that
/// the tensor's largest equals its largest weight. A channel that is loud although its weights are small
/// is thus not made louder, which would cost all the others steps of the activation's grid.
///
/// The function stays the same up to float rounding. A Clip from 0 to c, as of Relu6, becomes Relu
/// followed by Min with a constant for each channel, c divided by the channel's factor; before version
/// 8 of ONNX's operators, where Min does not broadcast, such a Clip ends the chain. A channel keeps
/// factor 1 if another operator or the caller reads it, if weights are shared between nodes, or if it is
/// numerically dead: no weight above 2⁻²⁰ of the tensor's largest on either side.
///
/// Absorbing high biases, off by default, is the one step that may change the function: a channel that the folded batch
/// norm puts at mean β and deviation |γ| is taken to stay above c = β − 3·|γ|, and what the tensor's
/// largest value exceeds the other channels' by moves into the next layer's bias, up to c. Inputs below
/// the moved amount come out as if they were it. Where no activation function stands between the layers
/// nothing is lost and all of β moves. Layers with padding do not take a bias in, since the padded zeros
/// would stand for it. A channel's bound falls by the same amount.
///
/// - Reference: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
///   Correction", 2019, §4.1. arXiv:1906.04721
package struct CrossLayerEqualization: Sendable {
  /// The layers that were equalized together and the factors between them.
  package struct EqualizedSet: Sendable {
    /// Node labels in graph order.
    package let layers: [String]
    /// Factors by which each tensor between two layers was divided, `[channels]` each.
    package let factors: [[Float]]
  }

  /// A bias that moved into the next layers.
  package struct AbsorbedBias: Sendable {
    /// The node that lost it.
    package let layer: String
    /// The nodes that took it in.
    package let consumers: [String]
    /// What was subtracted, `[channels]`.
    package let amounts: [Float]
  }

  package struct Report: Sendable {
    package var sets: [EqualizedSet] = []
    /// Rounds made; 1 for AIMET's method.
    package var iterations = 0
    /// Whether factors stopped moving before the rounds ran out.
    package var isConverged = true
    package var absorbedBiases: [AbsorbedBias] = []
    /// Nodes whose clipping became a bound for each channel.
    package var channelBounds: [String] = []
    /// Nodes whose clipping was given up (AIMET's method).
    package var replacedActivations: [String] = []
    package init() {}
  }

  package var options: Options
  package init(options: Options = Options()) { self.options = options }

  /// Equalizes a graph whose batch norms are folded.
  ///
  /// - Parameters:
  ///   - graph: A valid graph; unchanged if an error is thrown.
  ///   - progress: Told how many rounds are done after each; false cancels. Only for `.converged`.
  /// - Returns: What was done.
  /// - Throws: `HalfstepError.nonFiniteValue` naming the node for NaN or infinity in its parameters;
  ///   `.invalidArgument` for an option outside its range; `.cancelled` if `progress` returned false.
  /// - Complexity: O(weights + rounds · kernel slices).
  @discardableResult
  package func apply(
    to graph: inout Graph, progress: ((_ completed: Int) -> Bool)? = nil
  ) throws(HalfstepError) -> Report {
    guard options.maximumIterations >= 1, options.tolerance >= 0, options.largestFactor >= 1 else {
      throw HalfstepError(
        .invalidArgument,
        "equalization: expected 1 or more iterations, a tolerance from 0 and a largest factor from 1,"
          + " got \(options.maximumIterations), \(options.tolerance), \(options.largestFactor)")
    }
    var pass = EqualizationPass(
      graph, scalesAtOnce: options.method != .converged || options.absorbsHighBiases)
    switch options.method {
    case .converged: try pass.equalizeUntilConverged(options, progress)
    case .aimet: try pass.equalizeLikeAIMET(absorbsHighBiases: options.absorbsHighBiases)
    }
    try pass.expectFiniteRest()
    try pass.finish(&graph)
    graph.checkInvariants()
    return pass.report
  }
}
