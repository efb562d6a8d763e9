// SPDX-License-Identifier: Apache-2.0
// Puts other values into a graph's constants.

import HalfstepGraph
import HalfstepNumerics

extension Graph {
  /// The same graph with other values for some constants, be they initializers or Constant nodes.
  func replacingConstants(_ values: [String: Tensor]) throws(HalfstepError) -> Graph {
    var copy = self
    for (name, value) in values where initializers[name] != nil {
      copy.initializers[name] = value
    }
    for position in nodes.indices where nodes[position].isOperator("Constant") {
      guard let output = nodes[position].outputs.first, let value = values[output] else { continue }
      copy.update(at: position) { $0.attributes = ["value": .tensor(value)] }
    }
    return copy
  }
}
