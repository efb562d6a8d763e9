// SPDX-License-Identifier: Apache-2.0
// Declared type and shape of a named tensor.

import HalfstepNumerics

/// Declared element type and shape of a named tensor.
package struct ValueInfo: Hashable, Sendable {
  /// One declared extent.
  package enum Dimension: Hashable, Sendable {
    case fixed(Int)
    /// The same symbol stands for the same extent everywhere in the model.
    case symbolic(String)
    case unknown
  }

  package var name: String
  /// Element type; nil if the file declares none or something that is not a dense tensor.
  package var dataType: DataType?
  /// Extents; nil if the rank is not declared.
  package var dimensions: [Dimension]?

  package init(name: String, dataType: DataType?, dimensions: [Dimension]?) {
    self.name = name
    self.dataType = dataType
    self.dimensions = dimensions
  }
}
