// SPDX-License-Identifier: Apache-2.0
// A node's parameter.

import HalfstepNumerics

/// The value of a node's attribute.
package enum Attribute: Sendable {
  case int(Int64)
  case float(Float)
  case string([UInt8])
  case tensor(Tensor)
  case ints([Int64])
  case floats([Float])
  case strings([[UInt8]])
  /// Anything that the engine does not interpret (subgraphs, sparse tensors, types): the serialized
  /// protocol-buffer message, which goes back into the file unchanged.
  case opaque([UInt8])
}
