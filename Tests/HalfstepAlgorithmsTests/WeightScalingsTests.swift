// SPDX-License-Identifier: Apache-2.0
// Folding and equalizing change weights where they are, unless somebody else holds them.

import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics
import TestSupport
import Testing

@Suite struct WeightScalingsTests {
  /// A convolution with a batch norm behind it and another convolution.
  private func network() throws -> Graph {
    var random = SeededGenerator(seed: 3)
    var b = GraphBuilder(shape: [1, 3, 4, 4])
    try b.constant("w1", random.floats(4 * 3), [4, 3, 1, 1])
    b.node("Conv", ["x", "w1"], "conv1")
    try b.batchNorm("conv1", "norm", GraphBuilder.randomBatchNorm(4, &random))
    b.node("Relu", ["norm"], "relu")
    try b.constant("w2", random.floats(2 * 4), [2, 4, 1, 1])
    b.node("Conv", ["relu", "w2"], "conv2")
    return try b.finish("conv2")
  }

  private func address(_ graph: Graph, _ name: String) throws -> UnsafeMutableRawPointer {
    try #require(graph.initializers[name]).storage.baseAddress
  }

  @Test func weightsWithOneOwnerKeepTheirMemory() throws {
    var graph = try network()
    let places = [try address(graph, "w1"), try address(graph, "w2")]
    let before = try #require(graph.initializers["w1"]).floats()
    try BatchNormFolding().apply(to: &graph)
    #expect(try #require(graph.initializers["w1"]).floats() != before)
    try CrossLayerEqualization().apply(to: &graph)
    #expect([try address(graph, "w1"), try address(graph, "w2")] == places)
    #expect(Array(graph.initializers.keys.prefix(2)) == ["w1", "w2"])
  }

  @Test func whoHoldsAWeightKeepsItsValue() throws {
    var graph = try network()
    let held = graph
    let before = try #require(held.initializers["w1"]).floats()
    try BatchNormFolding().apply(to: &graph)
    try CrossLayerEqualization().apply(to: &graph)
    #expect(try #require(held.initializers["w1"]).floats() == before)
    // In place or not, the numbers are the same.
    var alone = try network()
    try BatchNormFolding().apply(to: &alone)
    try CrossLayerEqualization().apply(to: &alone)
    for name in ["w1", "w2"] {
      #expect(
        try #require(alone.initializers[name]).floats()
          == #require(graph.initializers[name]).floats())
    }
  }

  @Test func borrowedWeightsAreNotWritten() throws {
    var graph = try network()
    let owned = try #require(graph.initializers["w1"])
    let before = try owned.floats()
    let storage = TensorStorage(
      borrowing: owned.storage.baseAddress, byteCount: owned.byteCount, release: {})
    graph.initializers["w1"] = try Tensor(.float32, shape: owned.shape, storage: storage)
    try BatchNormFolding().apply(to: &graph)
    #expect(try owned.floats() == before)
    #expect(try #require(graph.initializers["w1"]).floats() != before)
  }

  @Test func anErrorInALaterLayerLeavesEarlierWeightsAlone() throws {
    var graph = try network()
    // The second layer's products overflow: equalization finds out after it has scaled the first.
    graph.initializers["w2"] = try Tensor(
      [Float](repeating: .infinity, count: 8), shape: [2, 4, 1, 1])
    try BatchNormFolding().apply(to: &graph)
    let before = try #require(graph.initializers["w1"]).floats()
    expectError(.nonFiniteValue, "conv2") { try CrossLayerEqualization().apply(to: &graph) }
    #expect(try #require(graph.initializers["w1"]).floats() == before)
  }
}
