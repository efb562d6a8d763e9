// SPDX-License-Identifier: Apache-2.0
// Layers seen alike: layouts, factors and responses by channel; constants and names of a graph.

import HalfstepGraph
import HalfstepNumerics
import TestSupport
import Testing

@Suite struct LinearLayerTests {
  /// A graph with one layer from `x` to `y`.
  private func graph(
    _ opType: String, _ shape: [Int], _ attributes: [(String, Int64)] = []
  ) throws -> Graph {
    var b = GraphBuilder(shape: [1, 4, 4, 4])
    let count = shape.reduce(1, *)
    try b.constant("w", (0..<count).map { Float($0 + 1) }, shape)
    b.node(opType, ["x", "w"], "y")
    b.graph.update(at: 0) { node in
      for (key, value) in attributes { node.attributes[key] = .int(value) }
    }
    return try b.finish("y")
  }

  /// An operator, its weight's shape and attributes, and the element of output 1 and input 0 in group 0
  /// (first kernel position), counted from 1.
  struct Case: Sendable {
    let opType: String
    let shape: [Int]
    let attributes: [(String, Int64)]
    let channels: (outputs: Int, inputs: Int)
    let element: Float
  }

  @Test(arguments: [
    Case(
      opType: "Conv", shape: [6, 2, 1, 2], attributes: [("group", 2)], channels: (6, 4), element: 5),
    Case(
      opType: "ConvTranspose", shape: [4, 3, 1, 2], attributes: [("group", 2)], channels: (6, 4),
      element: 3),
    Case(opType: "Gemm", shape: [2, 3], attributes: [], channels: (3, 2), element: 2),
    Case(opType: "Gemm", shape: [2, 3], attributes: [("transB", 1)], channels: (2, 3), element: 4),
    Case(opType: "MatMul", shape: [2, 3], attributes: [], channels: (3, 2), element: 2),
  ]) func channelsAreFoundInMemory(_ example: Case) throws {
    let graph = try graph(example.opType, example.shape, example.attributes)
    let index = GraphIndex(graph)
    let layer = try #require(LinearLayer(graph, at: 0, index))
    #expect(layer.outputChannels == example.channels.outputs)
    #expect(layer.inputChannels == example.channels.inputs)
    let weight = try layer.weight(in: graph, index)
    // Only what connects output 1 with input 0 keeps its value.
    var outputs = [Double](repeating: 0, count: layer.outputChannels)
    var inputs = [Double](repeating: 0, count: layer.inputChannels)
    outputs[1] = 1
    inputs[0] = 1
    let picked = try layer.layout.scaled(weight, outputFactors: outputs, inputFactors: inputs)
    let kept = try picked.floats().filter { $0 != 0 }
    #expect(kept.first == example.element)
    #expect(kept.count == layer.layout.spatial)
    #expect(
      try layer.layout.response(weight, to: inputs)[1] == Double(kept.reduce(0, +)))
    let slices = try layer.layout.sliceMagnitudes(picked)
    #expect(slices.max() == kept.last)
    #expect(slices.count { $0 > 0 } == 1)
  }

  @Test func whatIsNoLayerIsRefused() throws {
    // Groups that do not divide the channels; a weight of wrong rank; a computed weight; a domain.
    var graphs = [try graph("Conv", [5, 2, 1, 1], [("group", 2)]), try graph("Gemm", [2, 2, 2])]
    var b = GraphBuilder(shape: [1, 1, 2, 2])
    b.node("Relu", ["x"], "w")
    b.node("MatMul", ["x", "w"], "y")
    graphs.append(try b.finish("y"))
    var foreign = try graph("Conv", [2, 4, 1, 1])
    foreign.update(at: 0) { $0.domain = "elsewhere" }
    graphs.append(foreign)
    for graph in graphs {
      let position = graph.nodes.count - 1
      #expect(LinearLayer(graph, at: position, GraphIndex(graph)) == nil)
    }
  }

  @Test func constantsAreFoundThroughIdentityAndConstantNodes() throws {
    var b = GraphBuilder(shape: [1, 2])
    b.node("Constant", [], "c", ["value": .tensor(try Tensor([3], shape: []))])
    b.node("Identity", ["c"], "same")
    b.node("Add", ["x", "same"], "y")
    var graph = try b.finish("y")
    let index = GraphIndex(graph)
    #expect(graph.constantScalar("same", index) == 3)
    #expect(graph.constant("y", index) == nil)
    // A value that is not an initializer of its own gets a fresh name; what is unused goes.
    var names = NameAllocator(graph)
    graph.replaceConstant(
      at: 2, input: 1, with: try Tensor([4], shape: []), index, stem: "y", names: &names)
    #expect(graph.nodes[2].inputs == ["x", "y_1"])
    graph.update(at: 1) { $0.outputs = ["unused"] }
    graph.removeNodes { $0.opType == "Identity" }
    graph.removeUnusedConstants()
    #expect(graph.nodes.map(\.opType) == ["Add"])
  }

  @Test func ranksFollowFromOperators() throws {
    var b = GraphBuilder(shape: [1, 4, 4, 4])
    try b.constant("w", [1, 1, 1, 1], [1, 4, 1, 1])
    try b.constant("m", [1, 2], [1, 2])
    try b.constant("v", [1, 2], [2])
    b.node("Conv", ["x", "w"], "conv")
    b.node("Relu", ["conv"], "relu")
    b.node("Flatten", ["relu"], "flat")
    b.node("MatMul", ["flat", "m"], "product")
    b.node("Add", ["v", "product"], "sum")
    b.node("Shape", ["sum"], "y")
    let graph = try b.finish("y")
    let index = GraphIndex(graph)
    for (tensor, rank) in [("x", 4), ("relu", 4), ("flat", 2), ("sum", 2), ("y", nil)]
      as [(String, Int?)]
    {
      #expect(graph.rank(of: tensor, index) == rank)
    }
  }
}
