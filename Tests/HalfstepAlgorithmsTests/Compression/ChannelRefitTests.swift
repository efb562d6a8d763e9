// SPDX-License-Identifier: Apache-2.0
// Tests of channel pruning with data, of its choice of sizes, and of what it refuses.

import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import TestSupport
import Testing

@Suite struct ChannelRefitTests {
  private let net = [
    "a = Conv(x, w[12,3,3,3], b[12]) pads=1,1,1,1", "r = Relu(a)",
    "c = Conv(r, v[12,12,3,3], d[12]) pads=1,1,1,1", "e = Add(c, r)", "f = Relu(e)",
    "g = Conv(f, u[10,12,3,3], h[10]) strides=2,2", "i = Relu(g)", "j = Flatten(i)",
    "y = Gemm(j, t[90,6], s[6])",
  ]

  private func compressor(
    _ lines: [String]? = nil, ignoring: [String] = [], multiplicity: Int = 1,
    importance: ChannelImportance = .reconstruction, reconstructs: Bool = true
  ) throws -> Compressor {
    var options = CompressionOptions()
    options.scheme = .channelPruning
    options.importance = importance
    options.reconstructs = reconstructs
    options.ignoredLayers = ignoring
    options.multiplicity = multiplicity
    return try Compressor(
      try TextGraph.make(lines ?? net, inputs: [("x", [-1, 3, 8, 8])]), options)
  }

  private func pictures(_ count: Int, seed: UInt64) throws -> Tensor {
    var random = SeededGenerator(seed: seed)
    return try Tensor(random.floats(count * 192), shape: [count, 3, 8, 8])
  }

  private func output(_ graph: Graph, _ x: Tensor) throws -> [Float] {
    try #require(try Session(graph: graph).run(["x": x])["y"]).floats()
  }

  private func noise(_ compressor: Compressor, _ graph: Graph, _ x: Tensor) throws -> Double {
    let (a, b) = (try output(compressor.graph, x), try output(graph, x))
    return zip(a, b).reduce(0) { $0 + Double(($1.0 - $1.1) * ($1.0 - $1.1)) }
      / a.reduce(0) { $0 + Double($1 * $1) }
  }

  @Test func reconstructionIsBetterOnNewPictures() throws {
    let data = try pictures(64, seed: 1)
    let fresh = try pictures(32, seed: 2)
    let units: [Int?] = [8, 7]
    var noises: [Double] = []
    for (importance, reconstructs) in [
      (ChannelImportance.magnitude, false), (.magnitude, true), (.reconstruction, true),
    ] {
      var compressor = try compressor(importance: importance, reconstructs: reconstructs)
      if reconstructs { try compressor.calibrate([["x": data]]) }
      let result = try compressor.compress(units: units)
      noises.append(try noise(compressor, result.graph, fresh))
      for layer in result.report.layers {
        guard let noise = layer.noise else { continue }
        #expect(noise.kept <= noise.plain)
      }
      #expect(result.report.layers.contains { $0.noise != nil } == reconstructs)
    }
    // Least squares on 51 pictures of 64 rows a picture takes away most of the noise.
    #expect(noises[1] < 0.6 * noises[0])
    #expect(noises[2] < 0.6 * noises[0])
  }

  @Test func fewRowsNeverMakeItWorseOnHeldOutRows() throws {
    for count in 1...6 {
      var compressor = try compressor()
      try compressor.calibrate([["x": try pictures(count, seed: UInt64(count))]])
      let report = try compressor.compress(units: [6, 5]).report
      for layer in report.layers {
        if let noise = layer.noise { #expect(noise.kept <= noise.plain) }
      }
    }
    // With as many pictures as a layer has inputs and one to judge by, new pictures do not suffer:
    // within a tenth of what is lost anyway.
    let fresh = try pictures(64, seed: 77)
    var few = try compressor(importance: .magnitude)
    try few.calibrate([["x": try pictures(6, seed: 5)]])
    let plain = try compressor(importance: .magnitude, reconstructs: false)
    let kept = try noise(few, few.compress(units: [6, 5]).graph, fresh)
    let lost = try noise(plain, plain.compress(units: [6, 5]).graph, fresh)
    #expect(kept <= 1.1 * lost)
  }

  @Test func threadsAndBatchesDoNotMatter() throws {
    let threads = Parallel.maximumThreads
    defer { Parallel.setMaximumThreads(threads) }
    let data = try pictures(24, seed: 4)
    var seen: [[Float]] = []
    for count in [1, 2] {
      Parallel.setMaximumThreads(count)
      var compressor = try compressor()
      try compressor.calibrate([["x": data]])
      let sizes = try compressor.select(target: 0.5)
      let graph = try compressor.compress(units: sizes).graph
      var all = sizes.map { Float($0 ?? -1) }
      for name in graph.initializers.keys.sorted() {
        if let values = try? graph.initializers[name]?.floats() { all += values }
      }
      seen.append(all)
    }
    #expect(seen[0] == seen[1])
  }

  @Test func automaticChoiceMeetsItsTarget() throws {
    var compressor = try compressor()
    try compressor.calibrate([["x": try pictures(24, seed: 4)]])
    for metric in [0.8, 0.5, 0.3] {
      let sizes = try compressor.select(target: metric)
      let result = try compressor.compress(units: sizes)
      let ratio = compressor.ratio(result.report.after)
      // One channel more would be too many: the largest step is 1/10 of the second unit.
      #expect(ratio <= metric && ratio > metric - 0.12)
    }
    #expect(try compressor.select(target: 1) == [nil, nil])
    expectError(.invalidArgument, "at best") { try compressor.select(target: 0.001) }
    // Every choice there is, against the one that was made.
    let curves = try compressor.errorCurves()
    let sizes = try compressor.select(target: 0.5)
    func error(_ units: [Int]) -> Double { curves[0][units[0]] + curves[1][units[1]] }
    var least = Double.infinity
    for a in 1...12 {
      for b in 1...10 where compressor.ratio(compressor.cost(units: [a, b])) <= 0.5 {
        least = min(least, error([a, b]))
      }
    }
    #expect(error([sizes[0] ?? 12, sizes[1] ?? 10]) <= 1.0001 * least)
  }

  @Test func greedyChoiceCountsCoupledLayersOnce() throws {
    let compressor = try compressor(importance: .magnitude, reconstructs: false)
    // n0 and n2 are one unit: their outputs are added.
    #expect(compressor.layers.map(\.name) == ["n0", "n5"])
    #expect(try compressor.position(of: "v") == 0)
    #expect(try compressor.position(of: "n2") == 0)
    let curve = GreedySelection.Curve(ratios: [0.25, 0.5, 0.75], scores: [0.1, 0.5, 0.9])
    let sizes = try compressor.select(
      target: 0.5, curves: [curve, curve], usesMonotonicFit: false)
    #expect(sizes.count == 2)
    #expect(compressor.ratio(compressor.cost(units: sizes)) <= 0.55)
  }

  @Test func multiplicityIsRespected() throws {
    let compressor = try compressor(
      multiplicity: 4, importance: .magnitude, reconstructs: false)
    #expect(try compressor.units(0, ratio: 0.5) == 8)
    #expect(try compressor.units(0, ratio: 0.01) == 4)
    #expect(try compressor.units(1, ratio: 0.9) == 10)
    for size in try compressor.select(target: 0.4) {
      if let size { #expect(size % 4 == 0) }
    }
  }

  @Test func blockersAreNamedAndTheRestIsPruned() throws {
    let compressor = try compressor(
      [
        "a = Conv(x, w[6,3,1,1])", "n = LRN(a) size=3", "b = Conv(n, v[8,6,1,1])", "r = Relu(b)",
        "c = Conv(r, u[4,8,1,1])", "d = Conv(c, u2[1,4,1,1])", "y = Sigmoid(d)",
        "e = Conv(r, t[5,8,1,1])", "y2 = Neg(e)", "z = Conv(x, w2[3,3,1,1])",
        "z1 = Conv(z, w2)",
      ], importance: .magnitude, reconstructs: false)
    #expect(compressor.layers.map(\.name) == ["n2", "n4"])
    let reasons = Dictionary(
      uniqueKeysWithValues: compressor.refusals.map { ($0.layer, $0.reason) })
    #expect(reasons["n0"]?.contains("node 'n1' (LRN)") == true)
    #expect(reasons["n5"]?.contains("output 'y'") == true)
    #expect(reasons["n7"]?.contains("output 'y2'") == true)
    #expect(reasons["n9"]?.contains("shares its weight") == true)
    expectError(.unsupportedOperator, "LRN") { try compressor.position(of: "n0") }
    let result = try compressor.compress(units: [4, 2])
    #expect(result.graph.initializers["v"]?.shape.dimensions == [4, 6, 1, 1])
    #expect(result.graph.initializers["w"]?.shape.dimensions == [6, 3, 1, 1])
  }

  @Test func ignoredLayersStay() throws {
    // n2 reads and writes the first unit.
    let compressor = try compressor(ignoring: ["n2"], importance: .magnitude, reconstructs: false)
    #expect(compressor.layers.map(\.name) == ["n5"])
    #expect(!compressor.refusals.contains { $0.layer == "n2" })
    expectError(.unsupportedOperator, "ignored") { try compressor.position(of: "n2") }
  }

  @Test func dataIsAskedForWhereItIsNeeded() throws {
    let byData = try compressor(reconstructs: false)
    expectError(.emptyStatistics, "calibration") { try byData.compress(units: [6, nil]) }
    expectError(.emptyStatistics, "calibration") { try byData.select(target: 0.5) }
    expectError(.emptyStatistics, "calibration") { _ = try byData.errorCurves() }
    let fitted = try compressor(importance: .magnitude)
    expectError(.emptyStatistics, "calibration") { try fitted.compress(units: [6, nil]) }
    #expect(try fitted.select(target: 0.5).count == 2)
    // Nothing to do needs nothing.
    _ = try byData.compress(units: [nil, nil])
  }

  @Test func badInputIsRefused() throws {
    var plain = try compressor()
    expectError(.invalidArgument, "1...12") { try plain.compress(units: [13, nil]) }
    expectError(.invalidArgument, "1...12") { try plain.compress(units: [0, nil]) }
    expectError(.invalidArgument, "expected 2") { try plain.compress(units: [1]) }
    expectError(.invalidArgument, "above 0") { try plain.units(0, ratio: -1) }
    expectError(.unknownName) { try plain.calibrate([["z": try self.pictures(1, seed: 1)]]) }
    expectError(.emptyStatistics) { try plain.calibrate([]) }
    try plain.calibrate([["x": try pictures(5, seed: 1)]])
    expectError(.cancelled) {
      try plain.compress(units: [6, nil]) { share throws(HalfstepError) in
        if share > 0.4 { throw HalfstepError(.cancelled, "stopped") }
      }
    }
    _ = try plain.compress(units: [6, nil])
    // Layers that read a part of a unit each must not be left without any.
    let split = try compressor(
      [
        "a = Conv(x, w[6,3,1,1])", "b, c = Split(a, z:3,3) axis=1", "d = Conv(b, v[2,3,1,1])",
        "e = Conv(c, u[2,3,1,1])", "y = Add(d, e)",
      ], importance: .magnitude, reconstructs: false)
    expectError(.invalidArgument, "at least 2") { try split.compress(units: [1]) }
    #expect(try split.compress(units: [2]).graph.initializers["w"]?.shape.dimensions[0] == 2)
  }

  @Test func nonFiniteWeightsAreNamed() throws {
    var graph = try TextGraph.make(net)
    graph.initializers["v"] = try Tensor(
      [Float](repeating: .nan, count: 12 * 108), shape: [12, 12, 3, 3])
    var options = CompressionOptions()
    options.scheme = .channelPruning
    options.importance = .magnitude
    options.reconstructs = false
    let compressor = try Compressor(graph, options)
    expectError(.nonFiniteValue, "'n2'") { try compressor.compress(units: [6, nil]) }
  }
}
