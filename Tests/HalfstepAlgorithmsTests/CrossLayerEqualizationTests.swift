// SPDX-License-Identifier: Apache-2.0
// Cross-layer equalization: hand-worked cases, what takes part, what keeps factor 1, errors.

import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics
import TestSupport
import Testing

@Suite struct CrossLayerEqualizationTests {
  private func floats(_ graph: Graph, _ name: String) throws -> [Float] {
    try #require(graph.initializers[name]).floats()
  }

  /// x → 1×1 convolution to two channels → `activation` → 1×1 convolution to one channel.
  private func pair(
    _ first: [Float], _ second: [Float], bias: [Float] = [16, 2], activation: String = "Relu",
    opset: Int = 17
  ) throws -> GraphBuilder {
    var b = GraphBuilder(shape: [1, 1, 2, 2], opset: opset)
    try b.constant("w1", first, [2, 1, 1, 1])
    try b.constant("b1", bias, [2])
    b.node("Conv", ["x", "w1", "b1"], "conv1")
    if activation == "Clip" {
      try b.constant("low", [0], [])
      try b.constant("high", [6], [])
      b.node("Clip", ["conv1", "low", "high"], "act")
    } else {
      b.node(activation, ["conv1"], "act")
    }
    try b.constant("w2", second, [1, 2, 1, 1])
    b.node("Conv", ["act", "w2"], "y")
    return b
  }

  @Test(arguments: [CrossLayerEqualization.Options.Method.converged, .aimet])
  func pairWorkedByHand(_ method: CrossLayerEqualization.Options.Method) throws {
    // s = √(r₁/r₂) = √(8/2) = 2 and √(0.5/2) = 0.5; W₁ and b₁ are divided, W₂ is multiplied.
    var graph = try pair([-8, 0.5], [2, -2]).finish("y")
    var options = CrossLayerEqualization.Options()
    options.method = method
    let report = try CrossLayerEqualization(options: options).apply(to: &graph)
    #expect(try floats(graph, "w1") == [-4, 1])
    #expect(try floats(graph, "b1") == [8, 4])
    #expect(try floats(graph, "w2") == [4, -1])
    #expect(report.sets.count == 1)
    #expect(report.sets[0].layers == ["conv1", "y"])
    #expect(report.sets[0].factors == [[2, 0.5]])
    #expect(report.isConverged)
    #expect(report.absorbedBiases.isEmpty)
  }

  @Test func clipBecomesABoundForEachChannel() throws {
    var graph = try pair([-8, 0.5], [2, -2], activation: "Clip").finish("y")
    let report = try CrossLayerEqualization().apply(to: &graph)
    #expect(graph.nodes.map(\.opType) == ["Conv", "Relu", "Min", "Conv"])
    #expect(graph.nodes[2].outputs == ["act"])
    let bound = try #require(graph.initializers[graph.nodes[2].inputs[1]])
    #expect(bound.shape.dimensions == [1, 2, 1, 1])
    #expect(try bound.floats() == [3, 12])
    #expect(report.channelBounds == ["act"])
    #expect(report.replacedActivations.isEmpty)
    // Again: nothing is left to balance.
    let before = graph
    let again = try CrossLayerEqualization().apply(to: &graph)
    #expect(again.sets[0].factors == [[1, 1]])
    #expect(try floats(graph, "w1") == floats(before, "w1"))
    #expect(graph.nodes.count == 4)
  }

  @Test(arguments: [
    ("constant", [0, -1], true), ("constant", [-1, 2], true), ("constant", [1, 2, 1], false),
    ("constant", [2, 1], false), ("computed", [], true), ("computed for an addition", [], false),
  ])
  func pixelsAreFlattenedByReshape(_ kind: String, _ target: [Int64], _ isNeighbor: Bool) throws {
    var b = GraphBuilder(shape: [1, 1, 2, 2])
    try b.constant("w1", [-8, 0.5], [2, 1, 1, 1])
    b.node("Conv", ["x", "w1"], "conv")
    b.node("GlobalAveragePool", ["conv"], "pooled")
    if kind == "constant" {
      b.graph.initializers["shape"] = try Tensor(target)
    } else {
      b.graph.initializers["two"] = try Tensor([2] as [Int64])
      b.node("Shape", ["x"], "shape0", ["end": .int(1)])
      b.node("Concat", ["shape0", "two"], "shape", ["axis": .int(0)])
    }
    b.node("Reshape", ["pooled", "shape"], "flat")
    try b.constant("w2", [2, -2], [2, 1])
    let rest = kind == "computed for an addition" ? b.node("Add", ["flat", "flat"], "sum") : "flat"
    if target == [1, 2, 1] {
      b.node("Relu", [rest], "y")
    } else if target == [2, 1] {
      try b.constant("w3", [3], [1, 1])
      b.node("Gemm", [rest, "w3"], "y")
    } else {
      b.node("Gemm", [rest, "w2"], "y")
    }
    var graph = try b.finish("y")
    try CrossLayerEqualization().apply(to: &graph)
    #expect(try floats(graph, "w1") == (isNeighbor ? [-4, 1] : [-8, 0.5]))
  }

  @Test func clipEndsTheChainWhereMinDoesNotBroadcast() throws {
    var b = try pair([-8, 0.5], [2, -2], activation: "Clip", opset: 7)
    b.graph.update(at: 1) { node in
      node.inputs = ["conv1"]
      node.attributes = ["min": .float(0), "max": .float(6)]
    }
    var graph = try b.finish("y")
    let report = try CrossLayerEqualization().apply(to: &graph)
    #expect(report.sets.isEmpty)
    #expect(try floats(graph, "w1") == [-8, 0.5])
  }

  @Test func aimetReplacesRelu6() throws {
    var options = CrossLayerEqualization.Options()
    options.method = .aimet
    var graph = try pair([-8, 0.5], [2, -2], activation: "Clip").finish("y")
    let report = try CrossLayerEqualization(options: options).apply(to: &graph)
    #expect(graph.nodes.map(\.opType) == ["Conv", "Relu", "Conv"])
    #expect(report.replacedActivations == ["act"])
    #expect(try floats(graph, "w2") == [4, -1])
  }

  @Test func aimetTripleWorkedByHand() throws {
    // r = (8, 1, 1): p = ∛8 = 2; s₁₂ = 8/2 = 4, s₂₃ = 2/1 = 2: W₁ = 8/4, W₂ = 1·4/2, W₃ = 1·2.
    // The second channel, r = (0, 1, 1), has p = 0: the factors 0/0 and 0 become 1.
    var b = GraphBuilder(shape: [1, 1, 2, 2])
    try b.constant("w1", [8, 0], [2, 1, 1, 1])
    b.node("Conv", ["x", "w1"], "a")
    try b.constant("w2", [1, 1], [2, 1, 1, 1])
    b.node("Conv", ["a", "w2"], "b", ["group": .int(2)])
    try b.constant("w3", [1, 1], [1, 2, 1, 1])
    b.node("Conv", ["b", "w3"], "y")
    var graph = try b.finish("y")
    var options = CrossLayerEqualization.Options()
    options.method = .aimet
    let report = try CrossLayerEqualization(options: options).apply(to: &graph)
    #expect(report.sets.map(\.layers) == [["a", "b", "y"]])
    #expect(report.sets[0].factors == [[4, 1], [2, 1]])
    for name in ["w1", "w2", "w3"] { #expect(try floats(graph, name)[0] == 2) }
    #expect(try floats(graph, "w2")[1] == 1)
  }

  @Test(
    arguments: [
      ([0, 1], [1, 1]), ([.leastNonzeroMagnitude, 1], [1, 1]), ([1, 1], [0, 1]),
      ([0x1p-21, 1], [1, 1]), ([1, 1], [0x1p-21, 1]), ([0, 1], [0, 1]),
    ] as [([Float], [Float])])
  func deadChannelKeepsFactorOne(_ first: [Float], _ second: [Float]) throws {
    var graph = try pair(first, second).finish("y")
    let report = try CrossLayerEqualization().apply(to: &graph)
    #expect(report.sets[0].factors == [[1, 1]])
    #expect(try floats(graph, "w1") == first)
    #expect(try floats(graph, "w2") == second)
  }

  @Test func factorsStayWithinTheirLimit() throws {
    var options = CrossLayerEqualization.Options()
    options.largestFactor = 4
    var graph = try pair([1024, 1], [1, 1024]).finish("y")
    let report = try CrossLayerEqualization(options: options).apply(to: &graph)
    #expect(report.sets[0].factors == [[4, 0.25]])
  }

  @Test(
    arguments: [
      // Means and activation; expected values a; factors. Weights that write: (8, 0.5), that read: (2, 2).
      // The largest a counts as much as the largest weight, 8: r = max(w, 8·a/max(a)), s = √(r/2). The
      // factors that follow keep that proportion, so that the second round changes nothing.
      ([-6, 3], "Relu", [2, 2]),  // a = (0, 3): r = (8, 8)
      ([-6, 3], "LeakyRelu", [2, 1.4142135]),  // a = (6, 3): r = (8, 4)
      ([100, 3], "Clip", [2, 1.4142135]),  // a = (6, 3), the bound being 6
      ([100, 3], "Relu", [2, 0.5]),  // a = (100, 3): r = (8, 0.5), as without a record
    ] as [([Float], String, [Float])])
  func expectedActivationsCount(_ means: [Float], _ activation: String, _ factors: [Float]) throws {
    var builder = try pair([-8, 0.5], [2, -2], activation: activation)
    builder.graph.foldedBatchNorms["conv1"] = FoldedBatchNorm(gamma: [0, 0], beta: means)
    let before = try builder.finish("y")
    var graph = before
    let report = try CrossLayerEqualization().apply(to: &graph)
    #expect(report.iterations <= 2 && report.isConverged)
    for (one, other) in zip(report.sets[0].factors[0], factors) {
      expectClose(one, other, ulps: 4)
    }
    // Whatever the factors, the function is the same.
    let x = ReferenceEvaluator.Array64([1, 1, 2, 2], [-1, 0.5, 1, 2])
    let a = try #require(try ReferenceEvaluator.run(before, ["x": x])["y"])
    let b = try #require(try ReferenceEvaluator.run(graph, ["x": x])["y"])
    // Values below 2⁷, and each parameter is rounded once to 2⁻²⁴ of itself.
    for (u, v) in zip(a.values, b.values) { #expect(abs(u - v) <= 0x1p-14) }

    var options = CrossLayerEqualization.Options()
    options.weighsActivations = false
    graph = before
    let plain = try CrossLayerEqualization(options: options).apply(to: &graph)
    #expect(plain.sets[0].factors == [[2, 0.5]])
  }

  @Test func chainsEndWhereTheFunctionWouldChange() throws {
    // Another activation function; the tensor is an output; somebody else reads it; a residual.
    let w1: [Float] = [8, 1]
    let w2: [Float] = [1, 1]
    var graphs = [
      try pair(w1, w2, activation: "Sigmoid").finish("y"),
      try pair(w1, w2).finish("y", "act"),
      try pair(w1, w2).finish("y", "conv1"),
    ]
    var b = try pair(w1, w2)
    b.node("Sigmoid", ["act"], "other")
    graphs.append(try b.finish("y", "other"))
    b = try pair(w1, w2)
    b.node("Add", ["act", "conv1"], "sum")
    graphs.append(try b.finish("y", "sum"))
    for var graph in graphs {
      let report = try CrossLayerEqualization().apply(to: &graph)
      #expect(report.sets.isEmpty)
      #expect(try floats(graph, "w1") == w1)
      #expect(try floats(graph, "w2") == w2)
    }
  }

  @Test func sharedWeightTakesNoPart() throws {
    var b = GraphBuilder(shape: [1, 2, 2, 2])
    try b.constant("w", [8, 1, 1, 1], [2, 2, 1, 1])
    b.node("Conv", ["x", "w"], "a")
    b.node("Relu", ["a"], "relu")
    b.node("Conv", ["relu", "w"], "y")
    var graph = try b.finish("y")
    #expect(try CrossLayerEqualization().apply(to: &graph).sets.isEmpty)
    #expect(try floats(graph, "w") == [8, 1, 1, 1])
  }

  @Test func severalReadersShareOneFactor() throws {
    // Both readers have their largest weight on channel 1; relative to it channel 0 has 1/4 and 1/8.
    // The larger share, 1/4, counts; ranges are scaled back by the geometric mean √(4·8) of both.
    var b = GraphBuilder(shape: [1, 1, 2, 2])
    try b.constant("w1", [1, 1], [2, 1, 1, 1])
    b.node("Conv", ["x", "w1"], "a")
    try b.constant("w2", [1, 4], [1, 2, 1, 1])
    try b.constant("w3", [1, 8], [1, 2, 1, 1])
    b.node("Conv", ["a", "w2"], "y")
    b.node("Conv", ["a", "w3"], "z")
    var options = CrossLayerEqualization.Options()
    options.maximumIterations = 1
    var graph = try b.finish("y", "z")
    let report = try CrossLayerEqualization(options: options).apply(to: &graph)
    #expect(report.sets[0].layers == ["a", "y", "z"])
    let mean = Double(32).squareRoot()
    // A logarithm and an exponential lie between: a few units in the last place of a float.
    expectClose(report.sets[0].factors[0][0], Float((4 / mean).squareRoot()), ulps: 4)
    expectClose(report.sets[0].factors[0][1], Float((1 / mean).squareRoot()), ulps: 4)
    #expect(!report.isConverged)
  }

  @Test func notANumberIsNamedAndLeavesTheGraphAlone() throws {
    for (first, second, culprit) in [
      ([8, .nan], [1, 1], "conv1"), ([8, 1], [1, .infinity], "y"),
    ] as [([Float], [Float], String)] {
      for method in [CrossLayerEqualization.Options.Method.converged, .aimet] {
        var options = CrossLayerEqualization.Options()
        options.method = method
        var graph = try pair(first, second, activation: "Clip").finish("y")
        let error = #expect(throws: HalfstepError.self) {
          try CrossLayerEqualization(options: options).apply(to: &graph)
        }
        #expect(error?.code == .nonFiniteValue)
        #expect(error?.node == culprit)
        #expect(graph.nodes.map(\.opType) == ["Conv", "Clip", "Conv"])
        #expect(try floats(graph, "w2")[0] == 1)
      }
    }
    var graph = try pair([8, 1], [1, 1], bias: [1, .nan]).finish("y")
    let error = #expect(throws: HalfstepError.self) {
      try CrossLayerEqualization().apply(to: &graph)
    }
    #expect(error?.message == "node 'conv1' bias: channel 1 is nan")
  }

  @Test(arguments: [CrossLayerEqualization.Options.Method.converged, .aimet])
  func notANumberIsNamedInLayersThatNothingScales(
    method: CrossLayerEqualization.Options.Method
  ) throws {
    let lines = [
      "a = Conv(x, wa[4,3,1,1], ba[4])", "r = Relu(a)", "b = Conv(r, wb[4,4,1,1])",
      "s = Sigmoid(b)", "c = Conv(s, wc[2,4,1,1], bc[2])", "y = Sigmoid(c)",
    ]
    var options = CrossLayerEqualization.Options()
    options.method = method
    var sound = try TextGraph.make(lines)
    try CrossLayerEqualization(options: options).apply(to: &sound)
    for (name, value) in [("wc", Float.nan), ("wc", -.infinity), ("bc", .nan)] {
      var graph = try TextGraph.make(lines)
      let tensor = try #require(graph.initializers[name])
      var values = try tensor.floats()
      values[1] = value
      graph.initializers[name] = try Tensor(values, shape: tensor.shape.dimensions)
      let before = try #require(graph.initializers["wa"]).floats()
      let node = try #require(graph.nodes.first { $0.outputs == ["c"] }).label
      let error = #expect(throws: HalfstepError.self) {
        try CrossLayerEqualization(options: options).apply(to: &graph)
      }
      #expect(error?.code == .nonFiniteValue && error?.node == node)
      #expect(try graph.initializers["wa"]?.floats() == before)
    }
  }

  @Test func optionsAreChecked() throws {
    var wrong = [CrossLayerEqualization.Options](repeating: .init(), count: 4)
    wrong[0].maximumIterations = 0
    wrong[1].tolerance = -1
    wrong[2].largestFactor = 0.5
    wrong[3].tolerance = .nan
    for options in wrong {
      var graph = try pair([8, 1], [1, 1]).finish("y")
      let error = #expect(throws: HalfstepError.self) {
        try CrossLayerEqualization(options: options).apply(to: &graph)
      }
      #expect(error?.code == .invalidArgument)
    }
  }
}
