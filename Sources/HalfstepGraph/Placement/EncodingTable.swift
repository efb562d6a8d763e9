// SPDX-License-Identifier: Apache-2.0
// The encodings of a whole model, by tensor name.

import HalfstepNumerics
import OrderedCollections

/// The encodings of a model by tensor name, in the order in which the graph defines the tensors.
package struct EncodingTable: Hashable, Sendable {
  /// Encodings of tensors that nodes write and of graph inputs.
  package var activations: OrderedDictionary<String, Encoding> = [:]
  /// Encodings of constants.
  package var parameters: OrderedDictionary<String, Encoding> = [:]
  /// Widths of the floating-point format of tensors that stay floating-point at a given precision.
  package var floatBits: OrderedDictionary<String, Int> = [:]
  /// What the file records about how the quantizers were set up.
  package var arguments: QuantizerArguments?
  /// Names of nodes that the user left unquantized.
  package var excludedLayers: [String] = []

  package init() {}

  /// The encoding of a tensor of either kind.
  package subscript(tensor: String) -> Encoding? { activations[tensor] ?? parameters[tensor] }
}

/// How the quantizers of a model were set up; files carry it as `quantizer_args`.
package struct QuantizerArguments: Hashable, Sendable {
  package var activationBits: Int
  package var parameterBits: Int
  package var isSymmetric: Bool
  package var isPerChannel: Bool
  /// Name of the range scheme, such as `min_max`.
  package var scheme: String

  package init(
    activationBits: Int, parameterBits: Int, isSymmetric: Bool, isPerChannel: Bool, scheme: String
  ) {
    self.activationBits = activationBits
    self.parameterBits = parameterBits
    self.isSymmetric = isSymmetric
    self.isPerChannel = isPerChannel
    self.scheme = scheme
  }
}
