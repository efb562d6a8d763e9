// SPDX-License-Identifier: Apache-2.0
// What an encodings file leaves open is settled with the graph.

import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics
import Testing

@Suite struct EncodingTableGraphTests {
  private func encoding(_ count: Int, _ granularity: Granularity) throws -> Encoding {
    try Encoding(
      bits: 8, isSigned: true, isSymmetric: true, granularity: granularity,
      scales: [Float](repeating: 0.5, count: count),
      zeroPoints: [Int32](repeating: 0, count: count))
  }

  /// One node that reads `x` and the weight `w` of a shape.
  private func graph(
    _ type: String, _ shape: [Int], attribute: String? = nil
  ) throws -> Graph {
    var graph = Graph()
    graph.inputs = [ValueInfo(name: "x", dataType: .float32, dimensions: nil)]
    graph.outputs = [ValueInfo(name: "y", dataType: .float32, dimensions: nil)]
    let count = shape.reduce(1, *)
    graph.initializers["w"] = try Tensor([Float](repeating: 0, count: count), shape: shape)
    var node = Node(opType: type, inputs: ["x", "w"], outputs: ["y"])
    if let attribute { node.attributes[attribute] = .int(1) }
    graph.insert(node)
    return graph
  }

  // Square weights fit either axis, so the operator decides.
  @Test(
    arguments: [
      ("Conv", nil, 0), ("ConvTranspose", nil, 1), ("Gemm", nil, 1), ("Gemm", "transB", 0),
      ("MatMul", nil, 1),
    ] as [(String, String?, Int)])
  func channelsFollowTheOperator(type: String, attribute: String?, axis: Int) throws {
    let graph = try graph(type, [4, 4], attribute: attribute)
    var table = EncodingTable()
    table.parameters["w"] = try encoding(4, .perChannel(axis: 0))
    try table.adapt(to: graph)
    #expect(table.parameters["w"]?.granularity == .perChannel(axis: axis))
    table.parameters["w"] = try encoding(8, .perBlock(channelAxis: 0, axis: 1, size: 2))
    try table.adapt(to: graph)
    #expect(
      table.parameters["w"]?.granularity
        == .perBlock(channelAxis: axis, axis: 1 - axis, size: 2))
  }

  @Test func onlyFittingAxisIsFound() throws {
    var table = EncodingTable()
    table.parameters["w"] = try encoding(5, .perChannel(axis: 0))
    try table.adapt(to: graph("Mul", [2, 3, 5]))
    #expect(table.parameters["w"]?.granularity == .perChannel(axis: 2))
  }

  @Test func kindsFollowTheGraph() throws {
    var table = EncodingTable()
    table.activations["w"] = try encoding(1, .perTensor)
    table.parameters["y"] = try encoding(1, .perTensor)
    table.activations["elsewhere"] = try encoding(1, .perTensor)
    try table.adapt(to: graph("Conv", [2, 2]))
    #expect(Array(table.parameters.keys) == ["w"])
    #expect(Array(table.activations.keys) == ["elsewhere", "y"])
  }

  @Test func scalesThatFitNowhereAreNamed() throws {
    var table = EncodingTable()
    table.parameters["w"] = try encoding(7, .perChannel(axis: 0))
    let graph = try graph("Conv", [2, 3])
    expectFailure(.encodingMismatch, "'w'", "7 scales", "[2, 3]") { try table.adapt(to: graph) }
  }
}
