// SPDX-License-Identifier: Apache-2.0
import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import TestSupport
import Testing

@Suite struct CalibrationTests {
  let net = [
    "c = Conv(x, w[4,3,3,3], b[4]) pads=1,1,1,1", "r = Relu(c)", "d = Conv(r, v[4,4,1,1])",
    "y = Concat(d, r) axis=1",
  ]
  static let schemes: [RangeScheme] = [.minMax, .sqnr, .mse, .percentile(99.9), .entropy]

  // MARK: Values

  @Test func rangeOfInputWorkedByHand() throws {
    let simulation = try simulate(["y = Add(x, x)"], input: [4])
    try simulation.observe(["x": Tensor([-1, 0, 0.5, 3], shape: [4])])
    try simulation.computeEncodings()
    // Range 4 in 255 steps; zero is 1/(4/255) = 63.75 steps above the minimum, so code 64.
    let input = try #require(try simulation.encodings().activations["x"])
    #expect(input.scales == [Float(4.0 / 255)] && input.zeroPoints == [64] && !input.isSigned)
    let output = try #require(try simulation.encodings().activations["y"])
    #expect(output.scales == [Float(8.0 / 255)] && output.zeroPoints == [64])
  }

  @Test func valuesMayComeFromElsewhere() throws {
    let simulation = try simulate(["y = Add(x, x)"], input: [4])
    let twin = try simulate(["y = Add(x, x)"], input: [4])
    try twin.observe(["x": Tensor([-1, 0, 0.5, 3], shape: [4])])
    try simulation.observe(Tensor([-1, 0, 0.5, 3], shape: [4]), of: "x")
    try simulation.observe(Tensor([-2, 0, 1, 6], shape: [2, 2]), of: "y")
    #expect(try simulation.serializedStatistics() == twin.serializedStatistics())
    expectError(.unknownName, "'z'") { try simulation.observe(Tensor([1], shape: [1]), of: "z") }
    expectError(.nonFiniteValue, "'x'") {
      try simulation.observe(Tensor([.nan], shape: [1]), of: "x")
    }
    #expect(try simulation.serializedStatistics() == twin.serializedStatistics())
  }

  @Test func parameterEncodingFollowsOtherValues() throws {
    let simulation = try simulate(net)
    let weight = try #require(simulation.graph.initializers["v"])
    let before = try #require(simulation.quantizers["v"]?.encoding)
    #expect(try simulation.parameterEncoding(for: weight, of: "v") == before)
    let doubled = try Tensor(weight.floats().map { 2 * $0 }, shape: [4, 4, 1, 1])
    let after = try simulation.parameterEncoding(for: doubled, of: "v")
    #expect(after.scales == before.scales.map { 2 * $0 })  // doubling is exact
    #expect(simulation.quantizers["v"]?.encoding == before)
    expectError(.invalidArgument, "'x'") {
      _ = try simulation.parameterEncoding(for: weight, of: "x")
    }
    expectError(.shapeMismatch, "'v'") {
      _ = try simulation.parameterEncoding(for: Tensor([1], shape: [1]), of: "v")
    }
  }

  @Test func rangesGrowOverBatches() throws {
    let simulation = try simulate(["y = Add(x, x)"], input: [2])
    for values in [[-1, 1], [0, 3], [-0.5, 2]] as [[Float]] {
      try simulation.observe(["x": Tensor(values, shape: [2])])
    }
    try simulation.computeEncodings()
    #expect(try simulation.encodings().activations["x"]?.scales == [Float(4.0 / 255)])
    simulation.resetStatistics()
    expectError(.emptyStatistics, "'x'") { try simulation.computeEncodings() }
  }

  /// While calibrating, weights are rounded and activations are not.
  @Test func activationsAreObservedInFloatBehindRoundedWeights() throws {
    let simulation = try simulate(net)
    let data = try batch(images(3))
    try simulation.observe(data)
    try simulation.computeEncodings()

    var graph = simulation.graph
    for name in ["w", "v"] {
      let weight = try #require(graph.initializers[name])
      graph.initializers[name] = try #require(simulation.quantizers[name]?.encoding)
        .fakeQuantize(weight)
    }
    let outputs = try Session(graph: graph, extraOutputs: ["c"]).run(data)
    let values = try #require(outputs["c"]).floats()
    // `r` shares the grid of `c`, but Relu adds nothing below the minimum or above the maximum.
    var seen = RangeStatistics(keepsHistogram: false)
    values.withUnsafeBufferPointer { seen.observe($0) }
    let spec = QuantizerSpec(bits: 8, isSymmetric: false)
    #expect(simulation.placement.sites["r"]?.tieLeader == "c")
    #expect(
      try simulation.encodings().activations["c"] == seen.encoding(for: spec, scheme: .minMax))
  }

  @Test func constantDataGetsItsGridFromItsValues() throws {
    let simulation = try simulate(["y = Mul(x, k:f-1,3)"], input: [2])
    try simulation.observe(["x": Tensor([1, 1], shape: [2])])
    try simulation.computeEncodings()
    let encoding = try #require(try simulation.encodings().activations["k"])
    #expect(encoding.scales == [Float(4.0 / 255)] && encoding.zeroPoints == [64])
    // Simulated, −1 becomes −64 steps: −64·4/255 = −1.0039.
    let y = try #require(try simulation.run(["x": Tensor([1, 1], shape: [2])])["y"]).floats()
    let grid = try #require(try simulation.encodings().activations["y"])
    let step = Double(grid.scales[0])
    #expect(abs(Double(y[0]) + 64 * 4 / 255) <= step / 2 + 1e-6)
  }

  @Test func tiedTensorsShareOneGridOverAllTheySaw() throws {
    let simulation = try simulate(
      ["a = Add(x, k~1)", "b = Mul(x, j~4)", "y = Concat(a, b) axis=0"], input: [2])
    try simulation.observe(["x": Tensor([-1, 1], shape: [2])])
    try simulation.computeEncodings()
    let table = try simulation.encodings().activations
    #expect(table["a"] == table["y"] && table["b"] == table["y"])
    // a is 0...2, b is −4...4.
    #expect(table["a"]?.scales == [Float(8.0 / 255)])
  }

  // MARK: Statistics as a monoid

  @Test(arguments: schemes)
  func orderBatchesAndSplitsDoNotShow(_ scheme: RangeScheme) throws {
    let all = try images(12)
    let whole = try simulate(net, scheme: scheme)
    try whole.observe(batch(all))
    try whole.computeEncodings()

    // Other order and batch sizes.
    let shuffled = try simulate(net, scheme: scheme)
    let order = [7, 2, 9, 0, 11, 4, 1, 10, 3, 8, 6, 5]
    for range in [0..<5, 5..<6, 6..<9, 9..<12] {
      try shuffled.observe(batch(range.map { all[order[$0]] }))
    }
    try shuffled.computeEncodings()
    #expect(try shuffled.serializedStatistics() == whole.serializedStatistics())
    #expect(try shuffled.encodings() == whole.encodings())

    // Three processes, merged in two orders.
    let parts = try [0..<4, 4..<5, 5..<12].map { range in
      let part = try simulate(net, scheme: scheme)
      for index in range { try part.observe(batch([all[index]])) }
      return try part.serializedStatistics()
    }
    for order in [[0, 1, 2], [2, 0, 1]] {
      let merged = try simulate(net, scheme: scheme)
      for part in order { try merged.mergeStatistics(parts[part]) }
      try merged.computeEncodings()
      #expect(try merged.serializedStatistics() == whole.serializedStatistics())
      #expect(try merged.encodings() == whole.encodings())
    }
  }

  @Test func statisticsOfAnotherNetworkAreRefused() throws {
    let bytes = try simulate(net).serializedStatistics()
    var other = net
    other[1] = "r = Sigmoid(c)"
    expectError(.encodingMismatch, "another network") {
      try simulate(other).mergeStatistics(bytes)
    }
    var configuration = RuntimeConfiguration.everything
    configuration.isPerChannel = true
    expectError(.encodingMismatch, "another configuration") {
      try simulate(net, configuration: configuration).mergeStatistics(bytes)
    }
    expectError(.encodingMismatch, "another") {
      try simulate(net, scheme: .mse).mergeStatistics(bytes)
    }
    var weights = try imageGraph(net)
    weights.initializers["b"] = try Tensor([1, 2, 3, 4], shape: [4])
    let changed = try QuantizationSimulation(graph: weights, configuration: .everything)
    expectError(.encodingMismatch, "other weights") { try changed.mergeStatistics(bytes) }
  }

  @Test func damagedStatisticsAreRefusedAndChangeNothing() throws {
    let simulation = try simulate(["y = Add(x, x)"])
    try simulation.observe(batch(images(1)))
    let bytes = try simulation.serializedStatistics()
    for length in 0..<bytes.count {
      #expect(throws: HalfstepError.self) {
        try simulation.mergeStatistics(Array(bytes[..<length]))
      }
    }
    for index in bytes.indices {
      var damaged = bytes
      damaged[index] ^= 0x10
      #expect(throws: HalfstepError.self) { try simulation.mergeStatistics(damaged) }
    }
    #expect(throws: HalfstepError.self) { try simulation.mergeStatistics(bytes + [0]) }
    #expect(try simulation.serializedStatistics() == bytes)
  }

  // MARK: Errors

  @Test(arguments: [Float.nan, .infinity, -.infinity])
  func nonFiniteDataIsNamedAndLeavesNoTrace(_ value: Float) throws {
    let simulation = try simulate(net)
    try simulation.observe(batch(images(2)))
    let before = try simulation.serializedStatistics()
    var bad = try images(2)
    bad[1][17] = value
    expectError(.nonFiniteValue, "'x'") { try simulation.observe(batch(bad)) }
    #expect(try simulation.serializedStatistics() == before)
    try simulation.observe(batch(images(2)))
  }

  @Test func overflowInsideTheNetworkIsNamed() throws {
    let simulation = try simulate(["a = Exp(x)", "y = Sigmoid(a)"], input: [1])
    expectError(.nonFiniteValue, "'a'") {
      try simulation.observe(["x": Tensor([1000], shape: [1])])
    }
  }

  @Test func wrongInputsLeaveNoTrace() throws {
    let simulation = try simulate(net)
    try simulation.observe(batch(images(2)))
    let before = try simulation.serializedStatistics()
    #expect(throws: HalfstepError.self) {
      try simulation.observe(["x": Tensor([1, 2], shape: [1, 2, 1, 1])])
    }
    #expect(throws: HalfstepError.self) { try simulation.observe([:]) }
    #expect(throws: HalfstepError.self) {
      try simulation.observe(["z": Tensor([1], shape: [1])])
    }
    #expect(try simulation.serializedStatistics() == before)
  }

  @Test(arguments: ["w", "b"]) func nonFiniteWeightsAreNamed(_ name: String) throws {
    var graph = try imageGraph(net)
    var tensor = try #require(graph.initializers[name])
    try tensor.withMutableFloats { (values) throws(HalfstepError) in values[1] = .nan }
    graph.initializers[name] = tensor
    expectError(.nonFiniteValue, "'\(name)'") {
      _ = try QuantizationSimulation(graph: graph, configuration: .everything)
    }
  }

  @Test func missingDataIsNamed() throws {
    let simulation = try simulate(net)
    expectError(.emptyStatistics, "'x'") { try simulation.computeEncodings() }
    expectError(.invalidState, "'x'") { _ = try simulation.encodings() }
    expectError(.invalidState, "'x'") { _ = try simulation.run(batch(images(1))) }
  }
}
