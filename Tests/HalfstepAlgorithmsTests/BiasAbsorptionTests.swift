// SPDX-License-Identifier: Apache-2.0
// High-bias absorption, which trades exactness below β − 3·|γ| for smaller activation ranges.

import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics
import TestSupport
import Testing

@Suite struct BiasAbsorptionTests {
  private func floats(_ graph: Graph, _ name: String) throws -> [Float] {
    try #require(graph.initializers[name]).floats()
  }

  /// Absorption is on; factors come from the weights alone, so that cases stay easy to work by hand.
  private let options: CrossLayerEqualization.Options = {
    var options = CrossLayerEqualization.Options()
    options.absorbsHighBiases = true
    options.weighsActivations = false
    return options
  }()

  /// x → convolution to two channels, bias (20, 1) → `activations` → convolution to one channel. The
  /// weights are balanced, so that only absorption changes anything.
  private func graph(
    _ activations: [String], gamma: [Float] = [-1, 1], beta: [Float] = [10, 2],
    attributes: Attribute = .ints([0, 0, 0, 0])
  ) throws -> Graph {
    var b = GraphBuilder(shape: [1, 1, 4, 4])
    try b.constant("w1", [1, 1], [2, 1, 1, 1])
    try b.constant("b1", [20, 1], [2])
    b.node("Conv", ["x", "w1", "b1"], "conv")
    var tensor = "conv"
    for activation in activations {
      var inputs = [tensor]
      if activation == "Clip" {
        inputs += [try b.constant("low", [0], []), try b.constant("high", [8], [])]
      }
      tensor = b.node(activation, inputs, "act.\(activation)")
    }
    try b.constant("w2", [0.5, 1, 0.25, 0.5], [1, 2, 2, 1])
    try b.constant("b2", [3], [1])
    b.node("Conv", [tensor, "w2", "b2"], "y", ["pads": attributes])
    b.graph.foldedBatchNorms["conv"] = FoldedBatchNorm(gamma: gamma, beta: beta)
    return try b.finish("y")
  }

  @Test(arguments: [CrossLayerEqualization.Options.Method.converged, .aimet])
  func absorptionWorkedByHand(_ method: CrossLayerEqualization.Options.Method) throws {
    // AIMET: c = max(0, β − 3·|γ|) = (7, 0). b₁ − c = (13, 1). The kernel's sum for channel 0 is
    // 0.5 + 1 = 1.5, so b₂ grows by 1.5·7 = 10.5. Ours is the same here: channel 0 reaches 10 + 3 = 13
    // and can come down to 13 − 7 = 6, channel 1 reaches 5, so that all 7 are worth moving.
    var options = options
    options.method = method
    var graph = try graph(["Relu"])
    // Weights that read both channels alike, so that every factor is 1.
    graph.initializers["w2"] = try Tensor([0.5, 1, 1, 0.5], shape: [1, 2, 2, 1])
    let report = try CrossLayerEqualization(options: options).apply(to: &graph)
    #expect(try floats(graph, "b1") == [13, 1])
    #expect(try floats(graph, "b2") == [13.5])
    #expect(report.absorbedBiases.count == 1)
    #expect(report.absorbedBiases[0].layer == "conv")
    #expect(report.absorbedBiases[0].consumers == ["y"])
    #expect(report.absorbedBiases[0].amounts == [7, 0])
    #expect(graph.foldedBatchNorms["conv"]?.beta == [3, 2])
  }

  @Test func noMoreMovesThanTheLargestValueNeeds() throws {
    // Channel 1 reaches 6 + 3·2 = 12, with c = 0. Channel 0 reaches 13 and needs to give up 1 of its 7.
    var graph = try graph(["Relu"], gamma: [-1, 2], beta: [10, 6])
    graph.initializers["w2"] = try Tensor([0.5, 1, 1, 0.5], shape: [1, 2, 2, 1])
    let report = try CrossLayerEqualization(options: options).apply(to: &graph)
    #expect(report.absorbedBiases.map(\.amounts) == [[1, 0]])
    #expect(try floats(graph, "b2") == [4.5])
  }

  @Test func recordFollowsTheFactors() throws {
    // s = √(1/0.5) = √2 for channel 1 alone.
    var options = options
    options.absorbsHighBiases = false
    var graph = try graph(["Relu"])
    try CrossLayerEqualization(options: options).apply(to: &graph)
    let root = Float(2.0.squareRoot())
    #expect(graph.foldedBatchNorms["conv"]?.gamma == [-1, 1 / root])
    #expect(graph.foldedBatchNorms["conv"]?.beta == [10, 2 / root])
    #expect(try floats(graph, "b2") == [3])
  }

  @Test func boundMovesWithTheBias() throws {
    // Channel 0 stays in 7...8 and can come down to 1; channel 1 reaches min(2 + 3, 8)/√2 = 3.54 with
    // c = 0, so channel 0 gives up 8 − 3.54 and keeps that bound. The bound of channel 1 is 8/√2.
    var graph = try graph(["Clip"])
    try CrossLayerEqualization(options: options).apply(to: &graph)
    #expect(graph.nodes.map(\.opType) == ["Conv", "Relu", "Min", "Conv"])
    let bound = try floats(graph, graph.nodes[2].inputs[1])
    expectClose(bound[0], Float(5 / 2.0.squareRoot()), ulps: 4)
    expectClose(bound[1], Float(8 / 2.0.squareRoot()), ulps: 4)
  }

  @Test func saturatedChannelMovesAsAConstant() throws {
    // β − 3·|γ| = 17 is above the bound 8: the channel is the constant 8. Both channels are, so all moves.
    var graph = try graph(["Clip"], beta: [20, 20])
    let report = try CrossLayerEqualization(options: options).apply(to: &graph)
    let root = Float(2.0.squareRoot())
    expectClose(report.absorbedBiases[0].amounts[0], 8, ulps: 2)
    expectClose(report.absorbedBiases[0].amounts[1], 8 / root, ulps: 4)
    #expect(try floats(graph, graph.nodes[2].inputs[1]) == [0, 0])
  }

  @Test(arguments: [["Relu"], ["Clip"], []]) func inputsAboveTheAmountSeeNoChange(
    _ activations: [String]
  ) throws {
    // With x in −10...10 the first channel lies in 10...30, above c = 7 (without activation: c = 10);
    // the second is not absorbed, or, without activation, exactly.
    let before = try graph(activations)
    var after = before
    try CrossLayerEqualization(options: options).apply(to: &after)
    var random = SeededGenerator(seed: 3)
    let x = ReferenceEvaluator.Array64(
      [1, 1, 4, 4], random.floats(16, in: -10...10).map(Double.init))
    let a = try #require(try ReferenceEvaluator.run(before, ["x": x])["y"])
    let b = try #require(try ReferenceEvaluator.run(after, ["x": x])["y"])
    // Sums of magnitude below 2⁶ with a few parameters rounded by 2⁻²⁴ of themselves.
    for (u, v) in zip(a.values, b.values) { #expect(abs(u - v) <= 0x1p-16) }
    #expect(try floats(after, "b2") != [3])
  }

  @Test func whatWouldNotBeExactIsLeftAlone() throws {
    var cases = [
      try graph(["Relu"], attributes: .ints([0, 0, 1, 0])),  // padded zeros are not c
      try graph(["LeakyRelu"]),
      try graph(["Relu"], beta: [1, 2]),  // nothing above 0
    ]
    var unrecorded = try graph(["Relu"])
    unrecorded.foldedBatchNorms = [:]
    cases.append(unrecorded)
    for var graph in cases {
      let report = try CrossLayerEqualization(options: options).apply(to: &graph)
      #expect(report.absorbedBiases.isEmpty)
      #expect(try floats(graph, "b2") == [3])
    }
  }
}
