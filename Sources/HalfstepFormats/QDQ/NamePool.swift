// SPDX-License-Identifier: Apache-2.0
// Names that are free in a graph.

import HalfstepGraph
import HalfstepNumerics
import ONNXProto

/// Names that are free in a graph, for edits that need many.
struct NamePool {
  private var taken: Set<String> = []
  private var nodeNames: Set<String> = []
  private var counters: [String: Int] = [:]

  /// Collects the names that a graph and its subgraphs use.
  init(_ graph: Graph) {
    taken.formUnion(graph.initializers.keys)
    taken.formUnion(graph.opaqueInitializers.keys)
    taken.formUnion(graph.inputs.map(\.name))
    taken.formUnion(graph.outputs.map(\.name))
    taken.formUnion(graph.valueInfos.keys)
    for node in graph.nodes {
      taken.formUnion(node.inputs)
      taken.formUnion(node.outputs)
      taken.formUnion(node.capturedInputs)
      nodeNames.insert(node.name)
      for case .opaque(let bytes) in node.attributes.values {
        guard let attribute = try? decodeMessage(bytes, "attribute") as ONNXAttributeProto else {
          continue
        }
        if attribute.hasG { collect(attribute.g) }
        for graph in attribute.graphs { collect(graph) }
      }
    }
  }

  // The depth is bounded by the limit on nested messages that decoding enforces.
  private mutating func collect(_ graph: ONNXGraphProto) {
    taken.formUnion(graph.input.map(\.name))
    taken.formUnion(graph.initializer.map(\.name))
    for node in graph.node {
      taken.formUnion(node.output)
      nodeNames.insert(node.name)
      for attribute in node.attribute {
        if attribute.hasG { collect(attribute.g) }
        for graph in attribute.graphs { collect(graph) }
      }
    }
  }

  /// A tensor name that was free, `stem` if possible; it is taken from now on.
  mutating func tensor(_ stem: String) -> String {
    let name = free(stem, taken)
    taken.insert(name)
    return name
  }

  /// A node name that was free, `stem` if possible; it is taken from now on.
  mutating func node(_ stem: String) -> String {
    let name = free(stem, nodeNames)
    nodeNames.insert(name)
    return name
  }

  private mutating func free(_ stem: String, _ used: Set<String>) -> String {
    if !used.contains(stem) { return stem }
    var number = counters[stem] ?? 1
    while used.contains("\(stem)_\(number)") { number += 1 }
    counters[stem] = number + 1
    return "\(stem)_\(number)"
  }
}
