// SPDX-License-Identifier: Apache-2.0
// Balances the weight ranges of consecutive layers.

import HalfstepGraph
import HalfstepNumerics

/// Balances the weight ranges of consecutive layers without changing the network's function.
package struct CrossLayerEqualization: Sendable {
  package struct Options: Sendable {
    package var absorbsHighBiases = true
    package var maximumIterations = 50
    package init() {}
  }
  /// The layers that were equalized together and the factors between them.
  package struct EqualizedSet: Sendable {
    /// Node labels in graph order.
    package let layers: [String]
    /// Factors by which each tensor between two layers was divided, `[channels]` each.
    package let factors: [[Float]]
  }
  package struct Report: Sendable {
    package var sets: [EqualizedSet] = []
    package var iterations = 0
    package init() {}
  }

  package var options: Options
  package init(options: Options = Options()) { self.options = options }

  @discardableResult
  package func apply(to graph: inout Graph) throws(HalfstepError) -> Report {
    throw HalfstepError(.internalError, "under construction")
  }
}
