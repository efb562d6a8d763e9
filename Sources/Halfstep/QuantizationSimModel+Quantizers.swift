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
  /// Width, symmetry and granularity that are asked for.
  public let spec: QuantizerSpec
  /// Tensor whose grid this one shares, or its own name.
  public let tiedTo: String
  /// Whether it takes part; a disabled one passes values through.
  public let isEnabled: Bool
  /// Whether its grid may not change.
  public let isFrozen: Bool
  /// The grid; nil until it is known.
  public let encoding: Encoding?

  init(_ tensor: String, _ quantizer: QuantizationSimulation.Quantizer) {
    self.tensor = tensor
    isParameter = quantizer.site.role == .parameter
    spec = quantizer.site.spec
    tiedTo = quantizer.site.tieLeader
    isEnabled = quantizer.isEnabled
    isFrozen = quantizer.isFrozen
    encoding = quantizer.encoding
  }
}

extension QuantizationSimModel {
  /// Quantizers in the order in which the graph defines the tensors.
  public var quantizers: [Quantizer] {
    simulation.quantizers.map { Quantizer($0.key, $0.value) }
  }

  /// The quantizer of a tensor.
  ///
  /// - Parameter tensor: A tensor that has a quantizer.
  /// - Throws: `HalfstepError.unknownName`.
  public func quantizer(of tensor: String) throws(HalfstepError) -> Quantizer {
    guard let quantizer = simulation.quantizers[tensor] else {
      throw HalfstepError(.unknownName, "tensor '\(tensor)' has no quantizer")
    }
    return Quantizer(tensor, quantizer)
  }

  /// The grid that a parameter would get if it held other values; nothing changes.
  ///
  /// - Parameters:
  ///   - values: Of the parameter's shape, float32.
  ///   - tensor: A parameter that has a quantizer.
  /// - Throws: `HalfstepError.unknownName` if the tensor has no quantizer; `.invalidArgument` if it is
  ///   no parameter; `.shapeMismatch`; `.typeMismatch` unless float32; `.nonFiniteValue`.
  public func parameterEncoding(
    for values: Tensor, of tensor: String
  ) throws(HalfstepError) -> Encoding {
    try simulation.parameterEncoding(for: values, of: tensor)
  }

  /// The grid of a tensor.
  ///
  /// - Parameter tensor: A tensor that has a quantizer.
  /// - Throws: `HalfstepError.unknownName`; `.invalidState` before there are encodings.
  public func encoding(of tensor: String) throws(HalfstepError) -> Encoding {
    guard let encoding = try quantizer(of: tensor).encoding else {
      throw HalfstepError(
        .invalidState, "tensor '\(tensor)' has no encoding yet; compute encodings first")
    }
    return encoding
  }

  // MARK: Control

  /// Turns a quantizer on or off; one that comes on keeps its grid, if it has one.
  ///
  /// - Throws: `HalfstepError.unknownName` if the tensor has no quantizer.
  public func setEnabled(_ isEnabled: Bool, for tensor: String) throws(HalfstepError) {
    try simulation.setEnabled(isEnabled, for: tensor)
  }

  /// Keeps a grid as it is, or lets go of it; tensors that share a grid go together.
  ///
  /// - Throws: `HalfstepError.unknownName`; `.invalidState` if there is no grid to keep.
  public func setFrozen(_ isFrozen: Bool, for tensor: String) throws(HalfstepError) {
    try simulation.setFrozen(isFrozen, for: tensor)
  }

  /// Gives a tensor a grid; tensors that share a grid all get it.
  ///
  /// - Throws: `HalfstepError.unknownName`; `.invalidState` if frozen; `.encodingMismatch` if the
  ///   grid cannot belong to the tensor.
  public func setEncoding(_ encoding: Encoding, for tensor: String) throws(HalfstepError) {
    try simulation.setEncoding(encoding, for: tensor)
  }

  /// Changes what a quantizer is asked to be, and chooses its grid anew.
  ///
  /// A computed tensor that has seen no data is left without a grid until encodings are computed.
  ///
  /// - Parameters:
  ///   - spec: Width 2...16, symmetry, granularity.
  ///   - tensor: A tensor that has a quantizer; those that share its grid change with it.
  /// - Throws: `HalfstepError.unknownName`; `.invalidState` if frozen; `.invalidArgument` for a
  ///   width or granularity that does not fit.
  public func setSpec(_ spec: QuantizerSpec, for tensor: String) throws(HalfstepError) {
    try simulation.setSpec(spec, for: tensor)
  }

  /// Holds a computed tensor's grid to bounds.
  ///
  /// - Parameters:
  ///   - minimum: Lower bound; nil leaves that end to the data.
  ///   - maximum: Upper bound; nil leaves that end to the data.
  ///   - tensor: A computed tensor that has a quantizer.
  /// - Throws: `HalfstepError.unknownName`; `.invalidState` if frozen; `.invalidArgument` for a
  ///   constant, or bounds that are not finite or out of order.
  public func setRange(
    minimum: Double?, maximum: Double?, for tensor: String
  ) throws(HalfstepError) {
    try simulation.setRange(minimum: minimum, maximum: maximum, for: tensor)
  }
}
