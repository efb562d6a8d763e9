// SPDX-License-Identifier: Apache-2.0
// A network as a list of operations over named tensors.

import HalfstepNumerics
import OrderedCollections

/// A network: operations over named tensors, in an order in which they can run.
///
/// A value type: an algorithm works on a copy and the caller keeps the original if it fails. Tensors
/// share storage between copies until one of them is written.
package struct Graph: Sendable {
  /// Name from the file.
  package var name: String = ""
  /// Operations in topological order.
  package private(set) var nodes: [Node] = []
  /// Constant tensors by name, in file order.
  package var initializers: OrderedDictionary<String, Tensor> = [:]
  /// Constant tensors that the engine cannot represent (strings, sparse), serialized.
  package var opaqueInitializers: OrderedDictionary<String, [UInt8]> = [:]
  /// Tensors the caller provides. An initializer of the same name is a default value.
  package var inputs: [ValueInfo] = []
  /// Tensors the caller receives.
  package var outputs: [ValueInfo] = []
  /// Declared types of tensors in between.
  package var valueInfos: OrderedDictionary<String, ValueInfo> = [:]
  /// Version of each operator domain in use; ONNX's own domain is the empty string.
  package var opsetVersions: OrderedDictionary<String, Int> = [:]
  /// Batch norms that were folded, by the layer's output tensor; cross-layer equalization absorbs
  /// high biases with them.
  package var foldedBatchNorms: OrderedDictionary<String, FoldedBatchNorm> = [:]
  /// Grids that weights were rounded to, by constant; a simulation uses those that still fit.
  package var weightEncodings: OrderedDictionary<String, Encoding> = [:]
  /// The file's own message without nodes and initializers, so that saving loses nothing.
  package var envelope: [UInt8] = []
  private var nextID = 0

  package init() {}

  /// The version of ONNX's own operators; 0 if the file names none.
  package var opset: Int { opsetVersions[""] ?? 0 }

  // MARK: Editing

  /// Adds a node at the end, or before the node at `position`, and returns its identifier.
  @discardableResult
  package mutating func insert(_ node: Node, at position: Int? = nil) -> Int {
    var node = node
    node.id = nextID
    nextID += 1
    nodes.insert(node, at: position ?? nodes.count)
    return node.id
  }

  /// Position of a node in `nodes`, or nil if it is gone.
  package func position(of id: Int) -> Int? { nodes.firstIndex { $0.id == id } }

  /// Changes a node in place; its identifier stays.
  package mutating func update(at position: Int, _ body: (inout Node) -> Void) {
    let id = nodes[position].id
    body(&nodes[position])
    nodes[position].id = id
  }

  /// Removes the node at a position. Its outputs must have no uses left.
  package mutating func remove(at position: Int) { nodes.remove(at: position) }

  /// Removes every node for which the predicate holds.
  package mutating func removeNodes(where predicate: (Node) -> Bool) {
    nodes.removeAll(where: predicate)
  }

  /// Makes every node that reads `old` read `new`. Graph outputs and subgraphs keep the old name.
  package mutating func redirectUses(of old: String, to new: String) {
    for position in nodes.indices where nodes[position].inputs.contains(old) {
      for index in nodes[position].inputs.indices where nodes[position].inputs[index] == old {
        nodes[position].inputs[index] = new
      }
    }
  }

  /// Replaces the order of the nodes; `Graph+Validation` sorts with it.
  mutating func reorder(_ positions: [Int]) { nodes = positions.map { nodes[$0] } }

  /// A tensor name that is not in use, made from `stem`.
  package func freshName(_ stem: String) -> String {
    var taken = Set(initializers.keys).union(opaqueInitializers.keys).union(inputs.map(\.name))
    for node in nodes {
      taken.formUnion(node.outputs)
      taken.formUnion(node.inputs)
      taken.formUnion(node.capturedInputs)
    }
    if !taken.contains(stem) { return stem }
    var number = 1
    while taken.contains("\(stem)_\(number)") { number += 1 }
    return "\(stem)_\(number)"
  }

  /// Removes initializers that nothing reads and that are not graph inputs or outputs.
  package mutating func removeUnusedInitializers() {
    var used = Set(outputs.map(\.name)).union(inputs.map(\.name))
    for node in nodes {
      used.formUnion(node.inputs)
      used.formUnion(node.capturedInputs)
    }
    initializers.removeAll { !used.contains($0.key) }
  }
}

/// Scale and shift of a batch norm after folding, `[K]` each: the layer's output has roughly this
/// mean (`beta`) and standard deviation (`|gamma|`) in each channel.
package struct FoldedBatchNorm: Sendable {
  package var gamma: [Float]
  package var beta: [Float]

  package init(gamma: [Float], beta: [Float]) {
    self.gamma = gamma
    self.beta = beta
  }
}
