// SPDX-License-Identifier: Apache-2.0
// Folds batch norms into the layers beside them.

import HalfstepGraph
import HalfstepNumerics

/// Folds batch norms into neighboring layers; those left are rewritten as scale and shift.
///
/// First every layer (Conv, ConvTranspose, Gemm, MatMul) takes in the batch norm behind it, in graph
/// order; then the layers take in the batch norms before them that are left. A batch norm is beside a
/// layer if nothing else reads the tensor between them and it is no graph output; before a Gemm or
/// MatMul, a Flatten, Reshape or Squeeze may stand in between. The function stays the same up to
/// float rounding: everything is computed in `Double` and rounded once for each fold.
///
/// Not folded: into a ConvTranspose with groups, except depthwise; forward into a ConvTranspose or
/// into a convolution with padding (which would pad with the wrong value) or groups; training mode;
/// parameters that are computed or not float32. Such a batch norm keeps its operator, with mean 0,
/// variance 1 and its epsilon canceled; one in training mode stays untouched.
///
/// Weights that several nodes share are cloned for the layer that folds. The folded layer takes over
/// the batch norm's output name. A MatMul that needs a bias becomes a Gemm.
package struct BatchNormFolding: Sendable {
  /// A fold that was made.
  package struct Fold: Hashable, Sendable {
    package let layer: String
    package let batchNorm: String
    /// Whether the batch norm came before the layer.
    package let isForward: Bool

    package init(layer: String, batchNorm: String, isForward: Bool) {
      self.layer = layer
      self.batchNorm = batchNorm
      self.isForward = isForward
    }
  }

  package init() {}

  /// Folds every batch norm that can be folded.
  ///
  /// Records scale and shift of those folded into the layer before them in `foldedBatchNorms`.
  ///
  /// - Parameter graph: A valid graph; unchanged if an error is thrown.
  /// - Returns: The folds: backward ones in graph order, then forward ones.
  /// - Throws: `HalfstepError.nonFiniteValue` for NaN, infinity or a negative variance in the
  ///   parameters, or weights that overflow; `.shapeMismatch` for parameters of unequal length. The
  ///   error names the node.
  /// - Complexity: O(nodes + weights).
  @discardableResult
  package func apply(to graph: inout Graph) throws(HalfstepError) -> [Fold] {
    var pass = BatchNormFoldingPass(graph)
    try pass.foldBackward()
    try pass.foldForward()
    try pass.rewriteRemaining()
    let folds = pass.folds
    try pass.finish(&graph)
    graph.checkInvariants()
    return folds
  }
}
