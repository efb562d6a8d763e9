// SPDX-License-Identifier: Apache-2.0
import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import OrderedCollections
import TestSupport
import Testing

@Suite struct QuantizationSimulationTests {
  let net = [
    "c = Conv(x, w[4,3,3,3], b[4]) pads=1,1,1,1", "s = Sigmoid(c)",
    "m = MaxPool(s) kernel_shape=2,2",
    "y = Conv(m, v[4,4,1,1])",
  ]

  private func calibrated(
    configuration: RuntimeConfiguration = .everything
  ) throws -> QuantizationSimulation {
    let simulation = try simulate(net, configuration: configuration)
    try simulation.observe(batch(images(4)))
    try simulation.computeEncodings()
    return simulation
  }

  // MARK: Simulation

  @Test func outputsLieOnTheirGrids() throws {
    let simulation = try calibrated()
    let result = try simulation.run(batch(images(2, seed: 9)), extraOutputs: ["c", "s"])
    #expect(Array(result.keys) == ["y", "c", "s"])
    for (name, tensor) in result {
      let encoding = try #require(try simulation.encodings().activations[name])
      for value in try tensor.floats() {
        let code = (Double(value) / Double(encoding.scales[0])).rounded()
        // On the grid up to the rounding of one float product.
        #expect(abs(Double(value) - code * Double(encoding.scales[0])) <= abs(Double(value)) * 1e-6)
        let shifted = Int(code) + Int(encoding.zeroPoints[0])
        #expect(shifted >= encoding.minimumCode && shifted <= encoding.maximumCode)
      }
    }
  }

  @Test func allQuantizersOffIsTheFloatNetwork() throws {
    let simulation = try calibrated()
    for name in simulation.quantizers.keys { try simulation.setEnabled(false, for: name) }
    let data = try batch(images(2))
    let wanted = try #require(try Session(graph: simulation.graph).run(data)["y"]).floats()
    #expect(try #require(try simulation.run(data)["y"]).floats() == wanted)
    #expect(try simulation.encodings().activations.isEmpty)
  }

  @Test func moreBitsGiveLessError() throws {
    let data = try batch(images(4))
    var last = -Double.infinity
    for bits in [4, 8, 12, 16] {
      var options = QuantizationSimulation.Options()
      options.parameterBits = bits
      options.activationBits = bits
      let simulation = try QuantizationSimulation(
        graph: imageGraph(net), configuration: .everything, options: options)
      try simulation.observe(data)
      try simulation.computeEncodings()
      let row = try #require(try simulation.analyzeLayers([data]).rows.last)
      #expect(row.tensor == "y" && row.bits == bits)
      // Four bits are worth 24 dB; a third of that is left for clipping and luck.
      #expect(row.simulated > last + 16)
      last = row.simulated
    }
  }

  // MARK: Tables

  @Test func tableFollowsTheGraph() throws {
    let table = try calibrated().encodings()
    #expect(Array(table.activations.keys) == ["x", "c", "s", "y"])
    #expect(Array(table.parameters.keys) == ["w", "v"])
    #expect(table.arguments?.scheme == "min_max" && table.arguments?.activationBits == 8)
  }

  @Test func tensorsOnAnothersGridAreListedOnRequest() throws {
    let table = try calibrated().encodings(includingPropagated: true)
    #expect(Array(table.activations.keys) == ["x", "c", "s", "m", "y"])
    #expect(table.activations["m"] == table.activations["s"])
  }

  // MARK: Loading

  @Test func loadedEncodingsGiveTheSameSimulation() throws {
    let source = try calibrated()
    let target = try simulate(net)
    let report = try target.load(source.encodings(includingPropagated: true), strict: true)
    #expect(report.ignored == ["m"])
    let data = try batch(images(2))
    #expect(try target.run(data)["y"]?.floats() == source.run(data)["y"]?.floats())
    #expect(try target.encodings() == source.encodings())
  }

  @Test func strictLoadingNamesEveryKindOfMismatch() throws {
    let table = try calibrated().encodings()
    let target = try simulate(net)
    var unknown = table
    unknown.activations["nowhere"] = table.activations["c"]
    expectError(.encodingMismatch, "'nowhere'") { try target.load(unknown, strict: true) }
    var missing = table
    missing.parameters["w"] = nil
    expectError(.encodingMismatch, "'w'") { try target.load(missing, strict: true) }
    var different = table
    different.activations["c"] = try Encoding(
      bits: 4, isSigned: false, isSymmetric: false, scales: [0.1], zeroPoints: [3])
    expectError(.encodingMismatch, "'c'", "bits", "expected 8", "got 4") {
      try target.load(different, strict: true)
    }
    expectError(.invalidState) { _ = try target.encodings() }
  }

  @Test func lenientLoadingReportsAndTurnsOffWhatIsMissing() throws {
    var table = try calibrated().encodings()
    table.activations["nowhere"] = table.activations["c"]
    table.activations["s"] = nil
    table.activations["c"] = try Encoding(
      bits: 4, isSigned: false, isSymmetric: false, scales: [0.1], zeroPoints: [3])
    let target = try simulate(net)
    let report = try target.load(table, strict: false)
    #expect(report.unknown == ["nowhere"] && report.missing == ["s"])
    #expect(report.different.count == 1 && report.different[0].contains("'c', bits"))
    #expect(target.quantizers["s"]?.isEnabled == false)
    #expect(try target.encodings().activations["c"]?.bits == 4)
  }

  @Test func floatEntriesTurnQuantizersOff() throws {
    var table = try calibrated().encodings()
    table.activations["s"] = nil
    table.floatBits = ["s": 16, "m": 16, "nowhere": 16]
    let target = try simulate(net)
    let report = try target.load(table, strict: false)
    #expect(report.different == ["'s', type: expected int, got float16"])
    #expect(report.missing.isEmpty && report.ignored == ["m"] && report.unknown == ["nowhere"])
    #expect(target.quantizers["s"]?.isEnabled == false)
    table.floatBits = ["s": 16]
    expectError(.encodingMismatch, "'s'", "float16") {
      try simulate(net).load(table, strict: true)
    }
  }

  @Test func axisThatFilesOmitComesFromTheNetwork() throws {
    var configuration = RuntimeConfiguration.everything
    configuration.isPerChannel = true
    let lines = ["y = ConvTranspose(x, w[3,4,2,2])"]
    let target = try simulate(lines, configuration: configuration)
    var table = EncodingTable()
    table.parameters["w"] = try Encoding(
      bits: 8, isSigned: true, isSymmetric: true, granularity: .perChannel(axis: 0),
      scales: [0.1, 0.2, 0.3, 0.4], zeroPoints: [0, 0, 0, 0])
    try target.load(table, strict: false)
    #expect(target.quantizers["w"]?.encoding?.granularity == .perChannel(axis: 1))
    table.parameters["w"] = try Encoding(
      bits: 8, isSigned: true, isSymmetric: true, granularity: .perChannel(axis: 0),
      scales: [0.1, 0.2, 0.3, 0.4, 0.5], zeroPoints: [0, 0, 0, 0, 0])
    expectError(.encodingMismatch, "'w'", "5 scales") { try target.load(table, strict: false) }
  }

  @Test func contradictingGridsOfATieGroupAreRefused() throws {
    let target = try simulate(["a = Add(x, k~1)", "y = Concat(a, a) axis=0"], input: [2])
    var table = EncodingTable()
    for (name, scale) in [("a", Float(0.1)), ("y", 0.2)] {
      table.activations[name] = try Encoding(
        bits: 8, isSigned: false, isSymmetric: false, scales: [scale], zeroPoints: [3])
    }
    // Both operands of the Concat are `a`, which nothing else reads, so they share a grid.
    #expect(target.placement.sites["a"]?.tieLeader == "y")
    expectError(.encodingMismatch, "'y'", "a") { try target.load(table, strict: false) }
  }

  // MARK: Control of single quantizers

  @Test func frozenGridsStay() throws {
    let simulation = try calibrated()
    let before = try #require(try simulation.encodings().activations["c"])
    try simulation.setFrozen(true, for: "c")
    try simulation.observe(batch(images(9, seed: 4)))
    try simulation.computeEncodings()
    #expect(try simulation.encodings().activations["c"] == before)
    #expect(try simulation.encodings().activations["x"]?.scales != before.scales)
    expectError(.invalidState, "'c'", "frozen") { try simulation.setBits(4, for: "c") }
    try simulation.setFrozen(false, for: "c")
    try simulation.computeEncodings()
    #expect(try simulation.encodings().activations["c"] != before)
    expectError(.invalidState) { try simulate(net).setFrozen(true, for: "c") }
  }

  @Test func widthOfOneTensorChanges() throws {
    let simulation = try calibrated()
    let before = try simulation.encodings()
    try simulation.setBits(4, for: "c")
    try simulation.setBits(4, for: "w")
    let after = try simulation.encodings()
    #expect(after.activations["c"]?.bits == 4 && after.parameters["w"]?.bits == 4)
    #expect(after.activations["x"] == before.activations["x"])
    // The weight's largest magnitude is at the same place on both grids, 127 and 7 steps out.
    let ratio =
      try #require(after.parameters["w"]?.scales[0])
      / #require(before.parameters["w"]?.scales[0])
    #expect(ratio > 15 && ratio < 19)
    expectError(.invalidArgument, "17") { try simulation.setBits(17, for: "c") }
    expectError(.invalidArgument, "17") { try simulation.setBits(17, for: "w") }
    #expect(try simulation.encodings() == after)
  }

  @Test func rangeOfOneTensorIsHeld() throws {
    let simulation = try calibrated()
    try simulation.setRange(minimum: 0, maximum: 1, for: "s")
    let encoding = try #require(try simulation.encodings().activations["s"])
    #expect(encoding.scales == [Float(1.0 / 255)] && encoding.zeroPoints == [0])
    try simulation.observe(batch(images(5, seed: 8)))
    try simulation.computeEncodings()
    #expect(try simulation.encodings().activations["s"] == encoding)
    expectError(.invalidArgument, "'w'") {
      try simulation.setRange(minimum: 0, maximum: 1, for: "w")
    }
    #expect(throws: HalfstepError.self) {
      try simulation.setRange(minimum: .nan, maximum: 1, for: "s")
    }
    #expect(try simulation.encodings().activations["s"] == encoding)
  }

  @Test func encodingsCanBeSet() throws {
    let simulation = try calibrated()
    let grid = try Encoding(
      bits: 4, isSigned: true, isSymmetric: true, scales: [0.5], zeroPoints: [0])
    for tensor in ["c", "w"] {
      try simulation.setEncoding(grid, for: tensor)
      #expect(try simulation.encodings()[tensor] == grid)
    }
    let perChannel = try Encoding(
      bits: 4, isSigned: true, isSymmetric: true, granularity: .perChannel(axis: 0),
      scales: [1, 1, 1], zeroPoints: [0, 0, 0])
    expectError(.encodingMismatch, "'w'") { try simulation.setEncoding(perChannel, for: "w") }
    expectError(.encodingMismatch, "'c'") { try simulation.setEncoding(perChannel, for: "c") }
    expectError(.unknownName, "'nowhere'") { try simulation.setEncoding(grid, for: "nowhere") }
  }

  @Test func excludedLayersStayFloat() throws {
    var options = QuantizationSimulation.Options()
    options.excludedLayers = ["n0"]
    let simulation = try QuantizationSimulation(
      graph: imageGraph(net), configuration: .everything, options: options)
    try simulation.observe(batch(images(2)))
    try simulation.computeEncodings()
    let table = try simulation.encodings()
    #expect(Array(table.activations.keys) == ["s", "y"] && Array(table.parameters.keys) == ["v"])
    #expect(table.excludedLayers == ["n0"])
  }

  // MARK: Analysis

  @Test func analysisWorkedByHand() throws {
    let simulation = try simulate(["y = Add(x, x)"], input: [2])
    let data = try ["x": Tensor([0.25, 3], shape: [2])]
    try simulation.setEncoding(
      Encoding(bits: 2, isSigned: false, isSymmetric: false, scales: [1], zeroPoints: [0]), for: "x"
    )
    try simulation.setEncoding(
      Encoding(bits: 3, isSigned: false, isSymmetric: false, scales: [1], zeroPoints: [0]), for: "y"
    )
    let rows = try simulation.analyzeLayers([data]).rows
    // x: signal 0.0625 + 9, error 0.25². y: signal 0.25 + 36; simulated 0 + 6, error 0.5²; alone
    // 0.5 rounds to even 0, the same error.
    #expect(rows.map(\.tensor) == ["x", "y"] && rows.map(\.node) == ["input", "n0"])
    #expect(abs(rows[0].simulated - 21.6137) < 1e-3 && abs(rows[0].alone - 21.6137) < 1e-3)
    #expect(abs(rows[1].simulated - 21.6137) < 1e-3 && abs(rows[1].alone - 21.6137) < 1e-3)
    expectError(.invalidArgument) { _ = try simulation.analyzeLayers([]) }
  }
}
