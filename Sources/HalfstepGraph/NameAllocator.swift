// SPDX-License-Identifier: Apache-2.0
// Hands out tensor names that a graph does not use yet.

/// Hands out tensor names that a graph does not use yet: one scan of the graph serves a whole pass.
package struct NameAllocator: Sendable {
  private var taken: Set<String>

  /// Collects the names that a graph uses.
  ///
  /// - Complexity: O(names in the graph).
  package init(_ graph: Graph) {
    taken = Set(graph.initializers.keys)
    taken.formUnion(graph.opaqueInitializers.keys)
    taken.formUnion(graph.inputs.map(\.name))
    taken.formUnion(graph.outputs.map(\.name))
    for node in graph.nodes {
      taken.formUnion(node.outputs)
      taken.formUnion(node.inputs)
      taken.formUnion(node.capturedInputs)
    }
  }

  /// A name made from `stem` that neither the graph nor an earlier call has.
  package mutating func fresh(_ stem: String) -> String {
    if taken.insert(stem).inserted { return stem }
    var number = 1
    while !taken.insert("\(stem)_\(number)").inserted { number += 1 }
    return "\(stem)_\(number)"
  }
}
