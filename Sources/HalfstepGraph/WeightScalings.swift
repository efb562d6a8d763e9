// SPDX-License-Identifier: Apache-2.0
// Scalings of weights that wait until nothing can fail any more, so that they need no second copy.

import HalfstepNumerics

/// Scalings that a pass has decided on and that are done in the weights' own memory at its end.
///
/// A pass that scaled at once would hold every weight twice, since it may still fail and the graph has
/// to stay as it was.
package struct WeightScalings: Sendable {
  private struct Item: Sendable {
    let name: String
    let layout: WeightLayout
    let outputs: [Double]?
    let inputs: [Double]?
  }
  private var items: [Item] = []
  private var names: Set<String> = []

  package init() {}

  /// Notes that a layer's weight is to be scaled, or returns false if that has to be done at once: a
  /// weight that others read, that is scaled already, or whose products may not be finite.
  ///
  /// - Throws: `HalfstepError.typeMismatch` unless the weight is float32.
  package mutating func add(
    _ layer: LinearLayer, in graph: Graph, _ index: GraphIndex, outputFactors: [Double]?,
    inputFactors: [Double]?
  ) throws(HalfstepError) -> Bool {
    guard let name = graph.nodes[layer.node].input(1), let weight = graph.initializers[name],
      !names.contains(name), !index.outputs.contains(name), index.uses[name]?.count == 1,
      try layer.layout.staysFinite(
        weight, outputFactors: outputFactors, inputFactors: inputFactors)
    else { return false }
    names.insert(name)
    items.append(
      Item(name: name, layout: layer.layout, outputs: outputFactors, inputs: inputFactors))
    return true
  }

  /// The layer's weight as it will be; with a scaling that waits, a copy.
  package func weight(
    of layer: LinearLayer, in graph: Graph, _ index: GraphIndex
  ) throws(HalfstepError) -> Tensor {
    let weight = try layer.weight(in: graph, index)
    guard let name = graph.nodes[layer.node].input(1), names.contains(name),
      let item = items.first(where: { $0.name == name })
    else { return weight }
    return try item.layout.scaled(weight, outputFactors: item.outputs, inputFactors: item.inputs)
  }

  /// Forgets the scaling of a layer's weight, which is about to be replaced.
  package mutating func remove(_ layer: LinearLayer, in graph: Graph) {
    guard let name = graph.nodes[layer.node].input(1), names.remove(name) != nil else { return }
    items.removeAll { $0.name == name }
  }

  /// Replaces a graph by what a pass has made of it, and scales.
  ///
  /// - Parameters:
  ///   - graph: The graph that the pass began with; unchanged if an error is thrown.
  ///   - result: What the pass has made of it; nobody else should hold it. Empty afterwards.
  /// - Throws: `HalfstepError.outOfMemory` for weights that others hold as well.
  package func finish(
    _ graph: inout Graph, with result: inout Graph
  ) throws(HalfstepError) {
    var before = graph
    let nothing = try Tensor([], shape: [0])
    for item in items { before.initializers[item.name] = nothing }
    graph = result
    result = Graph()
    do throws(HalfstepError) {
      for item in items { try graph.initializers[item.name]?.makeUnique() }
    } catch {
      for item in items { before.initializers[item.name] = graph.initializers[item.name] }
      graph = before
      throw error
    }
    for item in items {
      guard var weight = graph.initializers[item.name] else { continue }
      // One owner at a time, so that nothing is copied.
      graph.initializers[item.name] = nothing
      try item.layout.scale(&weight, outputFactors: item.outputs, inputFactors: item.inputs)
      graph.initializers[item.name] = weight
    }
  }
}
