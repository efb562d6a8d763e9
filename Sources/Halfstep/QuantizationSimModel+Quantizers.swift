// SPDX-License-Identifier: Apache-2.0
// Single quantizers of a simulation.

import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics

/// A tensor that is quantized.
public struct Quantizer: Hashable, Sendable {
  /// Name of the tensor.
  public let tensor: String
  /// Whether the tensor is a constant, not computed.
  public let isParameter: Bool
  /// Width, symmetry and granularity.
  public let spec: QuantizerSpec
  /// Tensor whose grid this one shares, or its own name.
  public let tiedTo: String
}

extension QuantizationSimModel {
  /// Quantizers in the order in which the graph defines the tensors.
  public var quantizers: [Quantizer] {
    simulation.placement.sites.values.map {
      Quantizer(
        tensor: $0.tensor, isParameter: $0.role == .parameter, spec: $0.spec, tiedTo: $0.tieLeader)
    }
  }

  /// Number of quantizers.
  package var quantizerCount: Int { simulation.placement.sites.count }

  /// The grid of a tensor.
  ///
  /// - Parameter tensor: A tensor that has a quantizer.
  /// - Throws: `HalfstepError.unknownName`; `.invalidState` before there are encodings.
  public func encoding(of tensor: String) throws(HalfstepError) -> Encoding {
    guard let encoding = try simulation.encodings()[tensor] else {
      throw HalfstepError(.unknownName, "tensor '\(tensor)' has no quantizer")
    }
    return encoding
  }
}
