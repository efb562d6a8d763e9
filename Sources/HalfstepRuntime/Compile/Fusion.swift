// SPDX-License-Identifier: Apache-2.0
// Finds chains of nodes that one primitive can compute.

import HalfstepGraph
import HalfstepNumerics

/// Chains of nodes that one primitive can compute, found without knowing shapes.
///
/// A chain starts at a convolution or matrix product and follows the only reader of each result. No
/// tensor that somebody asked for lies inside a chain. A tensor that is only to be rounded to its
/// grid may: the rounding becomes a part of the primitive.
struct Fusion {
  /// Positions of the nodes of each chain of two or more, by the position of its last node.
  private(set) var chains: [Int: [Int]] = [:]
  /// Positions of nodes that run as a part of a chain that ends later.
  private(set) var absorbed: Set<Int> = []

  private static let leaders: Set<String> = ["Conv", "ConvTranspose", "Gemm"]
  private static let followers: Set<String> = [
    "Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Add", "Min",
    "Mul", "BatchNormalization", "Identity",
  ]

  /// Whether operations on a node's result can become a part of the node.
  static func canLead(_ node: Node) -> Bool {
    node.domain.isEmpty && leaders.contains(node.opType) && !(node.outputs.first ?? "").isEmpty
  }

  /// - Parameters:
  ///   - needed: Whether each node contributes to something that was asked for.
  ///   - kept: Tensors that must exist.
  init(_ graph: Graph, _ index: GraphIndex, needed: [Bool], kept: Set<String>) {
    var taken = Set<Int>()
    // Later layers first: where two convolutions meet in an addition, the later one takes it and
    // finds the other's result ready.
    for start in graph.nodes.indices.reversed() {
      let leader = graph.nodes[start]
      guard needed[start], Self.canLead(leader) else { continue }
      var chain = [start]
      var tensor = leader.outputs[0]
      while !tensor.isEmpty, !kept.contains(tensor), !index.outputs.contains(tensor) {
        let next: Int
        if let pair = Self.swish(tensor, graph, index, kept: kept) {
          guard !taken.contains(pair.sigmoid), !taken.contains(pair.product) else { break }
          chain += [pair.sigmoid, pair.product]
          taken.formUnion([pair.sigmoid, pair.product])
          next = pair.product
        } else {
          guard let use = index.soleUse(of: tensor), needed[use.node], !taken.contains(use.node)
          else { break }
          let node = graph.nodes[use.node]
          guard node.domain.isEmpty, Self.followers.contains(node.opType),
            node.outputs.count(where: { !$0.isEmpty }) == 1,
            use.input == 0
              || (["Add", "Min", "Mul"].contains(node.opType) && node.inputs.count == 2)
          else { break }
          chain.append(use.node)
          taken.insert(use.node)
          next = use.node
        }
        tensor = graph.nodes[next].outputs[0]
      }
      guard chain.count > 1, let last = chain.last else { continue }
      chains[last] = chain
      absorbed.formUnion(chain.dropLast())
    }
  }

  /// The nodes of `x · sigmoid(x)` if these two are the only readers of `x`.
  private static func swish(
    _ tensor: String, _ graph: Graph, _ index: GraphIndex, kept: Set<String>
  ) -> (sigmoid: Int, product: Int)? {
    guard let uses = index.uses[tensor], uses.count == 2 else { return nil }
    for (a, b) in [(uses[0], uses[1]), (uses[1], uses[0])] {
      let sigmoid = graph.nodes[a.node]
      let product = graph.nodes[b.node]
      guard sigmoid.isOperator("Sigmoid"), product.isOperator("Mul"), a.input == 0, b.input != nil,
        sigmoid.outputs.count == 1, product.outputs.count == 1, !kept.contains(sigmoid.outputs[0]),
        let use = index.soleUse(of: sigmoid.outputs[0]), use.node == b.node,
        product.inputs.count == 2
      else { continue }
      return (a.node, b.node)
    }
    return nil
  }
}
