// SPDX-License-Identifier: Apache-2.0
// Declared type and shape of a model's input or output.

import HalfstepGraph
import HalfstepNumerics

/// The declared type and shape of a model's input or output.
public struct TensorInfo: Hashable, Sendable {
  /// One declared extent.
  public enum Dimension: Hashable, Sendable {
    /// A number.
    case fixed(Int)
    /// A name that stands for the same number everywhere in the model.
    case symbolic(String)
    /// Nothing is declared.
    case unknown
  }

  /// Name of the tensor.
  public let name: String
  /// Element type; nil if none is declared.
  public let dataType: DataType?
  /// Extents, outermost first; nil if not even their number is declared.
  public let dimensions: [Dimension]?

  init(_ info: ValueInfo) {
    name = info.name
    dataType = info.dataType
    dimensions = info.dimensions?.map {
      switch $0 {
      case .fixed(let extent): .fixed(extent)
      case .symbolic(let symbol): .symbolic(symbol)
      case .unknown: .unknown
      }
    }
  }
}
