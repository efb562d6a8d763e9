// SPDX-License-Identifier: Apache-2.0
// Folds batch norms into the layers beside them.

import HalfstepGraph
import HalfstepNumerics

/// Folds batch norms into neighboring layers; those left are rewritten as scale and shift.
package struct BatchNormFolding: Sendable {
  /// A fold that was made.
  package struct Fold: Hashable, Sendable {
    package let layer: String
    package let batchNorm: String
    /// Whether the batch norm came before the layer.
    package let isForward: Bool
  }

  package init() {}

  @discardableResult
  package func apply(to graph: inout Graph) throws(HalfstepError) -> [Fold] {
    throw HalfstepError(.internalError, "under construction")
  }
}
