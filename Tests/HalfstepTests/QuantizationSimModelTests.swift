// SPDX-License-Identifier: Apache-2.0
// Simulations as Swift users hold them.

import Halfstep
import Testing

@Suite struct QuantizationSimModelTests {
  @Test func encodingsDoNotDependOnBatchesOrTheirOrder() throws {
    let simulation = try Fixture.simulation()
    let expected = try simulation.encodings()
    let data = try Fixture.data()
    try simulation.computeEncodings(data: ["input": data], batchSize: 3)
    #expect(try simulation.encodings() == expected)
    let shuffled = try [4, 0, 3, 1, 2].map { ["input": try data.rows(($0 * 4)..<($0 * 4 + 4))] }
    try simulation.computeEncodings(over: shuffled)
    #expect(try simulation.encodings() == expected)
  }

  @Test func cancellationAndBadDataLeaveEverythingAsItWas() throws {
    let simulation = try Fixture.simulation()
    let encodings = try simulation.encodings()
    let statistics = try simulation.serializedStatistics()
    let data = try Fixture.data()
    var calls: [Int] = []
    expectError(.cancelled) {
      try simulation.computeEncodings(data: ["input": data], batchSize: 4) { completed, total in
        #expect(total == 5)
        calls.append(completed)
        return completed < 2
      }
    }
    #expect(calls == [1, 2])
    #expect(try simulation.encodings() == encodings)
    #expect(try simulation.serializedStatistics() == statistics)

    var poisoned = data
    try poisoned.withMutableFloats { (values) throws(HalfstepError) in
      values[values.count - 1] = .nan
    }
    expectError(.nonFiniteValue) { try simulation.computeEncodings(data: ["input": poisoned]) }
    let none: [[String: Tensor]] = []
    expectError(.emptyStatistics) { try simulation.computeEncodings(over: none) }
    expectError(.invalidArgument) {
      try simulation.computeEncodings(data: ["input": data], batchSize: 0)
    }
    expectError(.invalidArgument) { try simulation.computeEncodings(data: [:]) }
    #expect(try simulation.encodings() == encodings)
    #expect(try simulation.serializedStatistics() == statistics)
  }

  @Test func mergedStatisticsEqualThoseOfOneRun() throws {
    let whole = try Fixture.simulation()
    let expected = try whole.encodings()
    let data = try Fixture.data()
    let parts = try [0..<7, 7..<20].map { rows in
      let part = try Fixture.simulation()
      part.resetStatistics()
      try part.observe(["input": try data.rows(rows)])
      return try part.serializedStatistics()
    }
    whole.resetStatistics()
    for part in parts.reversed() { try whole.mergeStatistics(part) }
    try whole.computeEncodings()
    #expect(try whole.encodings() == expected)
    expectError(.malformedFile) { try whole.mergeStatistics([1, 2, 3]) }
  }

  @Test(arguments: EncodingsVersion.allCases)
  func encodingsOfEveryVersionLoadStrictly(version: EncodingsVersion) throws {
    let simulation = try Fixture.simulation()
    let json = try simulation.encodings(version: version)
    #expect(try simulation.loadEncodings(json: json).isEmpty)
  }

  @Test func optionsOutOfRangeAreRefused() throws {
    let model = try Fixture.model()
    expectError(.invalidArgument, naming: "parameter bits") {
      try QuantizationSimModel(model, parameterBits: 1)
    }
    expectError(.invalidArgument, naming: "activation bits") {
      try QuantizationSimModel(model, activationBits: 17)
    }
    expectError(.invalidArgument, naming: "percentile") {
      try QuantizationSimModel(model, scheme: .percentile(.nan))
    }
    #expect(throws: HalfstepError.self) {
      try QuantizationSimModel(model, configuration: "no_such_configuration")
    }
    #expect(QuantizationSimModel.builtInConfigurations.contains("default_per_channel"))
  }

  @Test func singleQuantizersCanBeChanged() throws {
    let simulation = try Fixture.simulation()
    var spec = try simulation.quantizer(of: "depthwise.weight").spec
    #expect(spec.granularity == .perChannel(axis: 0))
    spec.bits = 4
    try simulation.setSpec(spec, for: "depthwise.weight")
    #expect(try simulation.encoding(of: "depthwise.weight").bits == 4)
    try simulation.setFrozen(true, for: "depthwise.weight")
    expectError(.invalidState) { try simulation.setSpec(spec, for: "depthwise.weight") }
    try simulation.setEnabled(false, for: "input")
    #expect(try simulation.quantizer(of: "input").isEnabled == false)
    let text = String(decoding: try simulation.encodings(), as: UTF8.self)
    #expect(!text.contains("\"input\""))
    expectError(.unknownName, naming: "nowhere") { try simulation.encoding(of: "nowhere") }
  }

  @Test func exportRefusesFoldersInThePrefixAndUncalibratedSimulations() throws {
    let simulation = try Fixture.simulation()
    for prefix in ["", "a/b", "../a"] {
      expectError(.invalidArgument) { try simulation.export(to: "/tmp", prefix: prefix) }
    }
    let fresh = try QuantizationSimModel(try Fixture.model())
    expectError(.invalidState) { try fresh.export(to: "/tmp", prefix: "never") }
    expectError(.invalidState) { try fresh.run(["input": try Fixture.data()]) }
  }
}
