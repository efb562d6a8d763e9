// SPDX-License-Identifier: Apache-2.0
// Decides which tensors get quantizers.

import HalfstepNumerics

extension Placement {
  /// Decides which tensors of a graph get quantizers.
  package static func make(
    for graph: Graph, configuration: RuntimeConfiguration, parameterBits: Int, activationBits: Int
  ) throws(HalfstepError) -> Placement {
    throw HalfstepError(.internalError, "placement: under construction")
  }
}
