// SPDX-License-Identifier: Apache-2.0
// What cross-layer equalization may do.

extension CrossLayerEqualization {
  /// What cross-layer equalization may do.
  package struct Options: Sendable {
    /// How factors are found.
    package enum Method: Hashable, Sendable {
      /// All layers at once, repeated until no factor moves; the clipping of Relu6 is kept.
      case converged
      /// AIMET's steps: pairs and depthwise triples of convolutions once, in order; Relu6 becomes
      /// Relu, which changes the function where it clipped.
      case aimet
    }

    package var method: Method = .converged
    /// Whether means far above zero move into the next layer's bias, where a batch norm was folded.
    /// This changes the function where inputs are not Gaussian.
    package var absorbsHighBiases = false
    /// Whether a channel's expected values, where a batch norm was folded, count as a third range beside
    /// the weights that write and read it; only for `.converged`.
    package var weighsActivations = true
    /// Whether the layers that write into one residual stream share factors with those that read it;
    /// only for `.converged`.
    package var equalizesResiduals = false
    /// Rounds over all layers at most; only for `.converged`.
    package var maximumIterations = 50
    /// Rounds end when no two factors of a tensor moved against each other by a ratio of more than
    /// one plus this.
    package var tolerance = 1e-2
    /// Factors lie between the inverse of this and this; only for `.converged`.
    package var largestFactor = 1e3

    package init() {}
  }
}
