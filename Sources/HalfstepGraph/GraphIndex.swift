// SPDX-License-Identifier: Apache-2.0
// Who writes and who reads each tensor of a graph.

/// Who writes and who reads each tensor: a snapshot that an edit of the graph makes stale.
package struct GraphIndex: Sendable {
  /// A place where a tensor is read.
  package struct Use: Hashable, Sendable {
    /// Position of the reading node.
    package let node: Int
    /// Which of its inputs; nil if one of its subgraphs reads the tensor.
    package let input: Int?
  }

  /// Position of the node that writes a tensor.
  package let producers: [String: Int]
  /// Places where a tensor is read, in node order.
  package let uses: [String: [Use]]
  /// Names of the graph's outputs.
  package let outputs: Set<String>

  package init(_ graph: Graph) {
    var producers: [String: Int] = [:]
    var uses: [String: [Use]] = [:]
    for (position, node) in graph.nodes.enumerated() {
      for output in node.outputs where !output.isEmpty { producers[output] = position }
      for (index, input) in node.inputs.enumerated() where !input.isEmpty {
        uses[input, default: []].append(Use(node: position, input: index))
      }
      for name in node.capturedInputs {
        uses[name, default: []].append(Use(node: position, input: nil))
      }
    }
    self.producers = producers
    self.uses = uses
    self.outputs = Set(graph.outputs.map(\.name))
  }

  /// The one place that reads a tensor, or nil if there are others or it is a graph output.
  package func soleUse(of tensor: String) -> Use? {
    guard !outputs.contains(tensor), let all = uses[tensor], all.count == 1 else { return nil }
    return all[0].input == nil ? nil : all[0]
  }
}
