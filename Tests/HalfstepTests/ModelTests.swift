// SPDX-License-Identifier: Apache-2.0
// Models as Swift users hold them.

import Halfstep
import Testing

@Suite struct ModelTests {
  @Test func declaredInputsAndOutputsComeFromTheFile() throws {
    let model = try Fixture.model()
    #expect(model.inputs.map(\.name) == ["input"])
    #expect(model.inputs[0].dataType == .float32)
    #expect(
      model.inputs[0].dimensions == [.symbolic("N"), .fixed(3), .fixed(8), .fixed(8)])
    #expect(model.outputs.map(\.name) == ["output"])
    #expect(model.initializers["stem.weight"]?.shape.dimensions == [8, 3, 3, 3])
  }

  @Test func serializedModelReadsBackTheSame() throws {
    let bytes = try Fixture.model().serialized()
    #expect(try Model(bytes: bytes).serialized() == bytes)
    expectError(.malformedFile) { try Model(bytes: Array(bytes.prefix(bytes.count / 2))) }
    expectError(.fileAccess, naming: "/no/such/file") { try Model(contentsOf: "/no/such/file") }
  }

  @Test func foldingAndEqualizationKeepTheFunctionAndTheOriginal() throws {
    let original = try Fixture.model()
    let before = try original.serialized()
    var model = original
    let folds = try model.foldBatchNorms()
    #expect(folds.map(\.batchNorm) == ["stem_bn", "depthwise_bn", "project_bn"])
    #expect(folds.map(\.layer) == ["stem", "depthwise", "project"])
    let report = try model.equalize()
    #expect(!report.sets.isEmpty && report.iterations >= 1)
    // Copies are values: the original did not change.
    #expect(try original.serialized() == before)

    let data = try Fixture.data()
    let expected = try #require(try original.run(["input": data])["output"]).floats()
    let actual = try #require(try model.run(["input": data])["output"]).floats()
    let range = (expected.max() ?? 0) - (expected.min() ?? 0)
    // As in Tests/CABITests/jobs.c: 4 layers of at most 27 products and 2 roundings of each weight,
    // values in between below 100 times the range: 4 · 29 · 2^-24 · 100.
    for (one, other) in zip(expected, actual) { #expect(abs(one - other) <= 7e-4 * range) }
  }

  @Test func equalizationTellsEachPassAndStopsWhenAsked() throws {
    var model = try Fixture.model()
    try model.foldBatchNorms()
    let before = try model.serialized()
    var passes: [Int] = []
    expectError(.cancelled, naming: "round 1") {
      try model.equalize { completed, total in
        passes.append(completed)
        return total != 50
      }
    }
    #expect(passes == [1])
    #expect(try model.serialized() == before)

    passes = []
    let report = try model.equalize { completed, _ in
      passes.append(completed)
      return true
    }
    #expect(passes == Array(1...report.iterations))
  }

  @Test func inspectionRehearsesWithoutChangingTheModel() throws {
    let model = try Fixture.model()
    let before = try model.serialized()
    let inspection = try model.inspect()
    #expect(try model.serialized() == before)
    #expect(inspection.layers.map(\.name) == ["stem", "depthwise", "project", "classifier"])
    #expect(inspection.layers.map(\.channelAxis) == [0, 0, 0, 0])
    #expect(inspection.folds.count == 3)
    #expect(!inspection.equalizedSets.isEmpty)
  }

  @Test func layerRangesAreThoseOfEachOutputChannel() throws {
    let model = try Fixture.model()
    let layer = try #require(try model.layers().first)
    let weights = try #require(model.initializers["stem.weight"]).floats()
    for channel in 0..<8 {
      let own = weights[(channel * 27)..<((channel + 1) * 27)]
      #expect(layer.channelMinimums[channel] == own.min())
      #expect(layer.channelMaximums[channel] == own.max())
    }
    #expect(layer.minimum == weights.min() && layer.maximum == weights.max())
  }

  @Test func badOptionsAndInputsAreRefusedByName() throws {
    var model = try Fixture.model()
    var options = EqualizationOptions()
    options.maximumIterations = 0
    expectError(.invalidArgument, naming: "iterations") { try model.equalize(options) }
    let data = try Fixture.data()
    expectError(.shapeMismatch, naming: "input") {
      try model.run(["input": try data.reshaped(try Shape([20, 8, 3, 8]))])
    }
    expectError(.unknownName, naming: "nowhere") {
      try model.run(["input": data], extraOutputs: ["nowhere"])
    }
  }

  @Test func constantsCanBeReplacedAndInputsFrozen() throws {
    var model = try Fixture.model()
    let bias = try Tensor([1, 2, 3, 4] as [Float], shape: [4])
    try model.setInitializer("classifier.bias", to: bias)
    #expect(try model.initializers["classifier.bias"]?.floats() == [1, 2, 3, 4])
    expectError(.shapeMismatch, naming: "classifier.bias") {
      try model.setInitializer("classifier.bias", to: try bias.reshaped(try Shape([2, 2])))
    }
    expectError(.typeMismatch) {
      try model.setInitializer("classifier.bias", to: try Tensor([1, 2, 3, 4] as [Int64]))
    }
    expectError(.unknownName, naming: "nothing") {
      try model.setInitializer("nothing", to: bias)
    }
    let data = try Fixture.data()
    let expected = try model.run(["input": data])["output"]?.floats()
    try model.setInitializer("input", to: data)
    #expect(model.inputs.isEmpty)
    #expect(try model.run([:])["output"]?.floats() == expected)
  }

  @Test func constantsCanBeTakenOutAndPutBack() throws {
    var model = try Fixture.model()
    let expected = try model.run(["input": try Fixture.data()])["output"]?.floats()
    let names = model.initializers.names
    var taken: [String: Tensor] = [:]
    for name in names { taken[name] = try model.takeInitializer(name) }
    #expect(model.initializers.isEmpty)
    #expect(Set(model.inputs.map(\.name)) == Set(names + ["input"]))
    // The structure alone: 1 kB a node would be much.
    #expect(try model.serialized().count < 16_384)
    expectError(.unknownName, naming: "classifier.bias") {
      _ = try model.takeInitializer("classifier.bias")
    }
    for (name, value) in taken { try model.setInitializer(name, to: value) }
    #expect(try model.run(["input": try Fixture.data()])["output"]?.floats() == expected)
  }

  @Test func rowsShareMemoryAndCopyWhenWritten() throws {
    let values = (0..<12).map(Float.init)
    var tensor = try Tensor(values, shape: [4, 3])
    let middle = try tensor.rows(1..<3)
    #expect(middle.shape.dimensions == [2, 3])
    #expect(try middle.floats() == Array(values[3..<9]))
    #expect(middle.storage.baseAddress == tensor.storage.baseAddress + 12)
    try tensor.withMutableFloats { (floats) throws(HalfstepError) in floats[3] = -1 }
    #expect(try middle.floats() == Array(values[3..<9]))
    expectError(.invalidArgument) { try tensor.rows(3..<5) }
    expectError(.shapeMismatch) { try Tensor([1], shape: []).rows(0..<1) }
  }
}
