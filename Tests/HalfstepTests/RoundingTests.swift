// SPDX-License-Identifier: Apache-2.0
// Rounding and bias correction of whole models.

import Halfstep
import HalfstepNumerics
import Testing

@Suite(.serialized) struct RoundingTests {
  private func folded() throws -> Model {
    var model = try Fixture.model()
    try model.foldBatchNorms()
    return model
  }

  /// Signal over noise of a simulation's outputs.
  private func ratio(_ model: Model, _ float: Model, bits: Int) throws -> Double {
    let data = ["input": try Fixture.data()]
    let simulation = try QuantizationSimModel(model, parameterBits: bits)
    try simulation.computeEncodings(data: data)
    let wanted = try #require(try float.run(data)["output"]).floats()
    let got = try #require(try simulation.run(data)["output"]).floats()
    var (signal, noise) = (0.0, 0.0)
    for (a, b) in zip(wanted, got) {
      signal += Double(a) * Double(a)
      noise += Double(a - b) * Double(a - b)
    }
    return signal / noise
  }

  @Test func roundingBeatsNearestAndKeepsItsGrids() throws {
    let float = try folded()
    var model = float
    let report = try model.adaround(data: ["input": Fixture.data()])
    #expect(report.layers.count == 4)
    #expect(report.layers.map(\.name).first == "stem")
    for layer in report.layers {
      #expect(layer.bits == 4)
      #expect(layer.noiseAfter <= layer.noiseBefore)
    }
    #expect(report.layers.contains { $0.kept.hasPrefix("gram") })
    // Four-bit weights at the default of eight bits: the simulation takes the grids of the model.
    let rounded = try ratio(model, float, bits: 8)
    #expect(RoundingOptions().maximumBytes == 64 << 20)
    let nearest = try ratio(float, float, bits: 4)
    #expect(rounded > nearest)
    let simulation = try QuantizationSimModel(model)
    let weight = try simulation.encoding(of: "stem.weight")
    #expect(weight.bits == 4)
    // A weight that was changed since then is on no grid and gets a new one.
    let values = try #require(model.initializers["stem.weight"])
    try model.setInitializer(
      "stem.weight",
      to: Tensor(try values.floats().map { $0 * 1.1 + 0.001 }, shape: values.shape.dimensions))
    #expect(try QuantizationSimModel(model).encoding(of: "stem.weight").bits == 8)
  }

  @Test(arguments: ["default", "default_per_channel"])
  func threadsDoNotMatter(_ configuration: String) throws {
    let before = Parallel.maximumThreads
    defer { Parallel.setMaximumThreads(before) }
    var results: [[UInt8]] = []
    for threads in [1, 2] {
      Parallel.setMaximumThreads(threads)
      var model = try folded()
      var options = RoundingOptions()
      options.configuration = configuration
      try model.adaround(data: ["input": Fixture.data()], options: options)
      results.append(try model.serialized())
    }
    #expect(results[0] == results[1])
  }

  @Test func widthOfAnExcludedLayerIsRefused() throws {
    let data = ["input": try Fixture.data()]
    for withData in [true, false] {
      for method in [RoundingMethod.auto, .gram] {
        var model = try folded()
        let before = try model.serialized()
        var options = RoundingOptions()
        options.method = method
        options.layerBits = ["stem": 8]
        options.excludedLayers = ["stem"]
        let error = try #require(throws: HalfstepError.self) {
          try model.adaround(data: withData ? data : nil, options: options)
        }
        #expect(error.code == .invalidArgument && error.node == "stem")
        #expect(error.message.contains("layer 'stem' is excluded"))
        #expect(try model.serialized() == before)
      }
    }
  }

  @Test func constantsAreCheckedForTheMethodThatHasThem() throws {
    var options = RoundingOptions()
    try options.validate()
    options.candidates = 0
    options.warmStart = 1
    try options.validate()
    for method in [RoundingMethod.sequentialMSE, .gradient] {
      options.method = method
      #expect(throws: HalfstepError.self) { try options.validate() }
    }
    options.method = .gram
    options.maximumRows = 0
    #expect(throws: HalfstepError.self) { try options.validate() }
  }

  @Test func biasCorrectionChangesBiasesOnly() throws {
    let float = try folded()
    var model = float
    var options = RoundingOptions()
    options.parameterBits = 4
    try model.correctBiases(data: ["input": Fixture.data()], options: options)
    var changed = 0
    for (name, tensor) in float.initializers {
      let after = try #require(model.initializers[name]).floats()
      if name.hasSuffix("weight") {
        #expect(try tensor.floats() == after, "\(name)")
      } else if try tensor.floats() != after {
        changed += 1
      }
    }
    #expect(changed > 0)
    #expect(try ratio(model, float, bits: 4) > ratio(float, float, bits: 4))
  }

  @Test func failuresLeaveTheModel() throws {
    var model = try folded()
    let before = try model.serialized()
    let data = ["input": try Fixture.data()]
    var options = RoundingOptions()
    expectError(.cancelled) { try model.adaround(data: data) { done, _ in done < 2 } }
    expectError(.emptyStatistics) {
      try model.adaround(data: ["input": Tensor([Float](), shape: [0, 3, 8, 8])])
    }
    var values = try data["input"]!.floats()
    values[5] = .infinity
    let broken = try Tensor(values, shape: [20, 3, 8, 8])
    expectError(.nonFiniteValue, naming: "input") { try model.adaround(data: ["input": broken]) }
    expectError(.unknownName, naming: "x") { try model.adaround(data: ["x": broken]) }
    options.parameterBits = 1
    expectError(.invalidArgument, naming: "parameter bits") {
      try model.adaround(data: data, options: options)
    }
    options = RoundingOptions()
    options.excludedLayers = ["nobody"]
    expectError(.unknownName, naming: "nobody") {
      try model.adaround(data: data, options: options)
    }
    #expect(try model.serialized() == before)
  }
}
