// SPDX-License-Identifier: Apache-2.0
// Which tensors cost a simulation how much.

import HalfstepAlgorithms
import HalfstepNumerics

/// What quantization costs one tensor.
public struct LayerNoise: Hashable, Sendable {
  /// Name of the tensor.
  public let tensor: String
  /// Node that writes the tensor, or reads the parameter; "input" for an input of the network.
  public let node: String
  /// Whether the tensor is a constant, not computed.
  public let isParameter: Bool
  /// Width of its codes.
  public let bits: Int
  /// Signal-to-noise ratio against float with everything before it quantized, in dB; for a parameter
  /// that of its own rounding. Infinite without any error.
  public let simulated: Double
  /// Signal-to-noise ratio with nothing but this tensor quantized, in dB.
  public let alone: Double
}

extension QuantizationSimModel {
  /// Compares the simulation with the float network, tensor by tensor.
  ///
  /// All quantized tensors of a batch are held at the same time, so use small batches.
  ///
  /// - Parameter batches: Inputs by name, one dictionary a batch; at least one.
  /// - Returns: One entry a quantized tensor, in graph order.
  /// - Throws: `HalfstepError.invalidArgument` without a batch; `.invalidState` before there are
  ///   encodings; an input is missing, unknown, or of the wrong type or shape.
  public func analyzeLayers(
    _ batches: [[String: Tensor]]
  ) throws(HalfstepError) -> [LayerNoise] {
    try simulation.analyzeLayers(batches).rows.map {
      LayerNoise(
        tensor: $0.tensor, node: $0.node, isParameter: $0.role == .parameter, bits: $0.bits,
        simulated: $0.simulated, alone: $0.alone)
    }
  }
}
