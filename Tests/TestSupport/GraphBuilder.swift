// SPDX-License-Identifier: Apache-2.0
// Builds small graphs for tests.

import HalfstepGraph
import HalfstepNumerics
import OrderedCollections

/// Builds small graphs, one operator after another.
package struct GraphBuilder {
  package var graph = Graph()

  /// Starts a graph with one float input.
  package init(input: String = "x", shape: [Int], opset: Int = 17) {
    graph.opsetVersions[""] = opset
    graph.inputs = [
      ValueInfo(name: input, dataType: .float32, dimensions: shape.map { .fixed($0) })
    ]
  }

  /// Adds a constant and returns its name.
  @discardableResult
  package mutating func constant(_ name: String, _ values: [Float], _ shape: [Int]) throws -> String
  {
    graph.initializers[name] = try Tensor(values, shape: shape)
    return name
  }

  /// Adds a node named like its output and returns that name.
  @discardableResult
  package mutating func node(
    _ opType: String, _ inputs: [String], _ output: String,
    _ attributes: OrderedDictionary<String, Attribute> = [:]
  ) -> String {
    graph.insert(
      Node(
        name: output, opType: opType, inputs: inputs, outputs: [output], attributes: attributes))
    return output
  }

  /// Adds a batch norm with parameters `[gamma, beta, mean, variance]`.
  @discardableResult
  package mutating func batchNorm(
    _ input: String, _ output: String, _ parameters: [[Float]], epsilon: Float = 1e-5
  ) throws -> String {
    let names = ["gamma", "beta", "mean", "variance"].map { "\(output).\($0)" }
    for (name, values) in zip(names, parameters) { try constant(name, values, [values.count]) }
    return node("BatchNormalization", [input] + names, output, ["epsilon": .float(epsilon)])
  }

  /// Random batch-norm parameters with variances well away from zero.
  package static func randomBatchNorm(
    _ channels: Int, _ random: inout SeededGenerator
  ) -> [[Float]] {
    [
      random.floats(channels, in: 0.2...2), random.floats(channels), random.floats(channels),
      random.floats(channels, in: 0.1...3),
    ]
  }

  /// Ends the graph with outputs and checks it.
  package func finish(_ outputs: String...) throws -> Graph {
    var graph = graph
    graph.outputs = outputs.map { ValueInfo(name: $0, dataType: .float32, dimensions: nil) }
    try graph.validateAndSort()
    return graph
  }
}
