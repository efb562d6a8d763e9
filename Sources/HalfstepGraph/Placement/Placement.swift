// SPDX-License-Identifier: Apache-2.0
// Which tensors of a graph get quantizers.

import HalfstepNumerics
import OrderedCollections

/// A tensor that gets a quantizer, and what kind.
package struct QuantizerSite: Hashable, Sendable {
  /// Whether the tensor is computed or constant.
  package enum Role: Hashable, Sendable {
    case activation
    case parameter
  }

  package var tensor: String
  package var role: Role
  package var spec: QuantizerSpec
  /// Bounds that the configuration prescribes instead of the observed ones.
  package var fixedMinimum: Double?
  package var fixedMaximum: Double?
  /// The tensor whose encoding this one shares (its own name, or the leader of its tie group):
  /// statistics of a group are merged before the range is chosen.
  package var tieLeader: String

  package init(tensor: String, role: Role, spec: QuantizerSpec) {
    self.tensor = tensor
    self.role = role
    self.spec = spec
    self.tieLeader = tensor
  }
}

/// The quantizers of a graph, by tensor name, in the order in which the graph defines the tensors.
package struct Placement: Sendable {
  package var sites: OrderedDictionary<String, QuantizerSite> = [:]
  /// Tensors that carry the grid of another one through grid-preserving operators (Reshape, MaxPool,
  /// …): no quantizer of their own, but files list them with the source's encoding.
  package var propagated: OrderedDictionary<String, String> = [:]

  package init() {}
}
