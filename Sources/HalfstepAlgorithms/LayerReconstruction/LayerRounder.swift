// SPDX-License-Identifier: Apache-2.0
// A method that rounds one layer at a time.

import HalfstepGraph
import HalfstepNumerics

/// What a method made of a layer.
package struct LayerRounding: Sendable {
  /// Weights on the encoding's grid, shape of the layer's weight.
  package var weight: Tensor
  /// The grid; of the problem's specification.
  package var encoding: Encoding
  /// The layer's new bias, `[K]`; nil to keep it.
  package var bias: [Float]?
  /// What the report says about how it was found.
  package var note: String
  /// Noise over signal on held-out rows, if it was learned without them what `weight` was then learned
  /// with them; nil to measure it.
  package var heldOutNoise: Double?

  package init(weight: Tensor, encoding: Encoding, bias: [Float]? = nil, note: String) {
    self.weight = weight
    self.encoding = encoding
    self.bias = bias
    self.note = note
  }
}

extension LayerRounding {
  /// Puts weight and bias into a network.
  func put(
    into graph: inout Graph, _ layer: LinearLayer, _ weightName: String, _ index: GraphIndex,
    writesWeight: Bool = true, names: inout NameAllocator
  ) throws(HalfstepError) {
    if writesWeight { graph.setConstant(weightName, to: weight) }
    if let bias { try layer.setBias(bias, in: &graph, index, names: &names) }
  }
}

/// A method that rounds one layer at a time.
///
/// `LayerReconstruction` compares the result with rounding to nearest on rows that were held out and
/// keeps the better.
package protocol LayerRounder {
  /// A text that says all that the result depends on besides the problem, so that results can be kept
  /// for later runs; nil if they cannot.
  var identity: String? { get }

  /// Rounds a layer.
  ///
  /// Must not depend on the number of threads. Call `problem.progress` now and then.
  func round(_ problem: LayerProblem) throws(HalfstepError) -> LayerRounding
}

extension LayerRounder {
  package var identity: String? { nil }
}
