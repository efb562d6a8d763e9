// SPDX-License-Identifier: Apache-2.0
// Tests of low-rank layers that are split for their inputs.

import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import TestSupport
import Testing

@Suite struct DataAwareTests {
  private let net = [
    "a = Conv(x, w[8,3,3,3]) strides=2,2 pads=1,1,1,1", "r = Relu(a)",
    "c = Conv(r, v[8,8,1,2], b[8]) dilations=1,2", "d = Conv(c, u[8,1,3,3]) group=8 pads=1,1,1,1",
    "e = Conv(d, t[6,8,1,1], s[6])", "f = Flatten(e)", "g = MatMul(f, k[48,10])",
    "y = Gemm(g, h[5,10], i[5]) transB=1",
  ]

  /// Pictures whose neighbors and channels resemble each other, as those of cameras do.
  private func pictures(_ count: Int, seed: UInt64) throws -> Tensor {
    var random = SeededGenerator(seed: seed)
    var values: [Float] = []
    for _ in 0..<count {
      let noise = random.floats(3 * 64)
      let base = random.floats(64)
      for channel in 0..<3 {
        for position in 0..<64 {
          let (row, column) = (position / 8, position % 8)
          let smooth =
            base[row / 2 * 16 + column / 2 * 2] + base[row / 4 * 32 + column / 4 * 4]
          values.append(smooth + 0.2 * noise[channel * 64 + position])
        }
      }
    }
    return try Tensor(values, shape: [count, 3, 8, 8])
  }

  private func make(
    _ scheme: CompressionScheme, lines: [String]? = nil, shape: [Int] = [-1, 3, 8, 8]
  ) throws -> Compressor {
    var options = CompressionOptions()
    options.scheme = scheme
    return try Compressor(try TextGraph.make(lines ?? net, inputs: [("x", shape)]), options)
  }

  private func output(_ graph: Graph, _ x: Tensor) throws -> [Float] {
    try #require(try Session(graph: graph).run(["x": x])["y"]).floats()
  }

  private func noise(_ a: [Float], _ b: [Float]) -> Double {
    var (noise, signal) = (0.0, 0.0)
    for (a, b) in zip(a, b) {
      noise += Double((a - b) * (a - b))
      signal += Double(a * a)
    }
    return noise / signal
  }

  @Test(arguments: [CompressionScheme.weightSVD, .spatialSVD])
  func neverWorseThanPlainOnHeldOutRowsAndBetterOnNewPictures(
    _ scheme: CompressionScheme
  ) throws {
    var aware = try make(scheme)
    let plain = aware
    try aware.calibrate([["x": try pictures(48, seed: 1)]])
    let sizes = try plain.layers.indices.map { try plain.units($0, ratio: 0.6) }
    let result = try aware.compress(units: sizes)
    let reports = result.report.layers.filter { $0.units != nil }
    #expect(reports.count == plain.layers.count)
    for layer in reports {
      let noise = try #require(layer.noise)
      #expect(noise.kept <= noise.plain)
    }
    #expect(reports.contains { ($0.noise?.kept ?? 1) < 0.9 * ($0.noise?.plain ?? 0) })
    let other = try plain.compress(units: sizes)
    #expect(other.report.layers.allSatisfy { $0.noise == nil })
    #expect(other.report.after == result.report.after)
    let x = try pictures(32, seed: 2)
    let expected = try output(plain.graph, x)
    let before = noise(expected, try output(other.graph, x))
    let after = noise(expected, try output(result.graph, x))
    #expect(after < before)
  }

  // x has two channels that are always equal: any weight is the same as one that reads their sum.
  // One rank is then all a product with two inputs needs, while the weight itself has rank two.
  @Test func equalChannelsNeedOneRank() throws {
    let lines = ["y = Gemm(x, w[4,2], b[4]) transB=1"]
    var aware = try make(.weightSVD, lines: lines, shape: [-1, 2])
    let graph = aware.graph
    var random = SeededGenerator(seed: 5)
    let x = try Tensor(random.floats(64).flatMap { [$0, $0] }, shape: [64, 2])
    try aware.calibrate([["x": x]])
    let result = try aware.compress(units: [1])
    let expected = try output(graph, x)
    // The ridge of 1 % of the moments' mean diagonal shrinks nothing of a line that passes through
    // both channels but turns it: its share of the error is of the order of 0.01².
    #expect(noise(expected, try output(result.graph, x)) < 1e-4)
    let plain = try Compressor(graph, aware.options).compress(units: [1])
    #expect(noise(expected, try output(plain.graph, x)) > 1e-3)
    let curve = try aware.errorCurves()[0]
    // 4·2 weights, a rank costs 4 + 2: one is all that is cheaper than the layer.
    #expect(curve.count == 2 && curve[0] == 1 && curve[1] < 1e-2)
  }

  @Test(arguments: [CompressionScheme.weightSVD, .spatialSVD])
  func fullRankReproducesTheFunction(_ scheme: CompressionScheme) throws {
    var compressor = try make(scheme)
    let x = try pictures(24, seed: 3)
    try compressor.calibrate([["x": x]])
    let result = try compressor.compress(units: compressor.layers.map(\.maximumUnits))
    let expected = try output(compressor.graph, x)
    let actual = try output(result.graph, x)
    // As without data: factors are rounded to float; biases take what that does to means.
    let range = expected.map(abs).max() ?? 0
    for (a, b) in zip(expected, actual) { #expect(abs(a - b) <= 1e-4 * range) }
    #expect(range > 0)
  }

  @Test(arguments: [CompressionScheme.weightSVD, .spatialSVD], [true, false])
  func whatIsKeptOfALayerDecidesNothing(_ scheme: CompressionScheme, _ hasData: Bool) throws {
    var known = try make(scheme)
    if hasData { try known.calibrate([["x": try pictures(24, seed: 6)]]) }
    func sizes(_ position: Int, _ size: Int) -> [Int?] {
      known.layers.indices.map { $0 == position ? size : nil }
    }
    for position in known.layers.indices.reversed() {
      for size in 1...min(known.layers[position].maximumUnits, 4) {
        // The third call for a layer finds what the first one left.
        let a = try known.compress(units: sizes(position, size))
        var fresh = try make(scheme)
        if hasData { try fresh.calibrate([["x": try pictures(24, seed: 6)]]) }
        let b = try fresh.compress(units: sizes(position, size))
        #expect(a.report.layers == b.report.layers)
        for (name, value) in b.graph.initializers where value.dataType == .float32 {
          #expect(try value.floats() == a.graph.initializers[name]?.floats())
        }
      }
    }
    guard hasData else { return }
    // Other data makes what was kept worthless.
    try known.calibrate([["x": try pictures(24, seed: 7)]])
    var fresh = try make(scheme)
    try fresh.calibrate([["x": try pictures(24, seed: 7)]])
    let (a, b) = (
      try known.compress(units: sizes(0, 1)), try fresh.compress(units: sizes(0, 1))
    )
    #expect(a.report.layers == b.report.layers)
  }

  @Test func resultDoesNotDependOnBatchesOrThreads() throws {
    let x = try pictures(24, seed: 4)
    var first = try make(.spatialSVD)
    try first.calibrate([["x": x]])
    var second = first
    let rows = try x.floats()
    try second.calibrate(
      try (0..<8).map { part in
        ["x": try Tensor(Array(rows[part * 576..<(part + 1) * 576]), shape: [3, 3, 8, 8])]
      })
    let sizes = try first.select(target: 0.7)
    let threads = Parallel.maximumThreads
    Parallel.setMaximumThreads(1)
    defer { Parallel.setMaximumThreads(threads) }
    #expect(try second.select(target: 0.7) == sizes)
    let a = try first.compress(units: sizes).graph
    let b = try second.compress(units: sizes).graph
    #expect(a.initializers.keys.sorted() == b.initializers.keys.sorted())
    for (name, value) in a.initializers where value.dataType == .float32 {
      #expect(try value.floats() == b.initializers[name]?.floats())
    }
  }

  @Test func curvesFallAndTheAutomaticChoiceUsesThem() throws {
    var compressor = try make(.weightSVD)
    let plain = try compressor.errorCurves()
    try compressor.calibrate([["x": try pictures(48, seed: 6)]])
    let curves = try compressor.errorCurves()
    #expect(curves.count == compressor.layers.count && curves != plain)
    for (curve, layer) in zip(curves, compressor.layers) {
      #expect(curve[0] == 1 && curve.count <= layer.maximumUnits + 1)
      #expect(zip(curve, curve.dropFirst()).allSatisfy { $0 >= $1 && $1 >= 0 })
    }
    let sizes = try compressor.select(target: 0.7)
    #expect(compressor.ratio(compressor.cost(units: sizes)) <= 0.7)
  }

  @Test func constantsOfAPairAreNamed() throws {
    var compressor = try make(.weightSVD)
    try compressor.calibrate([["x": try pictures(24, seed: 7)]])
    let sizes = try compressor.layers.indices.map { try compressor.units($0, ratio: 0.5) }
    let result = try compressor.compress(units: sizes)
    for layer in result.report.layers {
      guard layer.units != nil else {
        #expect(layer.pair == nil)
        continue
      }
      let pair = try #require(layer.pair)
      let first = try #require(result.graph.nodes.first { $0.inputs.contains(pair.firstWeight) })
      let second = try #require(result.graph.nodes.first { $0.inputs.contains(pair.secondWeight) })
      #expect(first.input(2) == nil && second.input(0) == first.outputs[0])
      #expect(second.input(2) == pair.bias)
      if let bias = pair.bias { #expect(result.graph.initializers[bias] != nil) }
    }
    // A product without bias becomes one with, since its input is a matrix.
    let product = try #require(result.report.layers.first { $0.operatorType == "MatMul" }?.pair)
    #expect(product.bias != nil)
  }

  @Test func deadInputsFallBackToThePlainFactors() throws {
    var compressor = try make(.spatialSVD)
    let plain = try compressor.compress(units: [2, 2, 2])
    let zeros = try Tensor([Float](repeating: 0, count: 8 * 192), shape: [8, 3, 8, 8])
    try compressor.calibrate([["x": zeros]])
    let result = try compressor.compress(units: [2, 2, 2])
    #expect(
      try result.graph.initializers["w.0.weight"]?.floats()
        == plain.graph.initializers["w.0.weight"]?.floats())
    #expect(try compressor.errorCurves()[0].first == 1)
  }

  // As PyTorch's exporter writes a Flatten behind an open batch: the shape of an early tensor, read
  // two layers later. Walks must compute it where it is read.
  @Test func shapesComputedFromTensorsAreNoObstacle() throws {
    let head = ["a = Conv(x, w[8,3,3,3]) strides=2,2 pads=1,1,1,1", "r = Relu(a)"]
    let tail = ["c = Conv(r, v[8,8,3,3], b[8]) pads=1,1,1,1"]
    let product = ["y = Gemm(f, k[5,128]) transB=1"]
    let shapes = [
      "h = Shape(a)", "n = Slice(h, from:0, to:1)", "q = Concat(n, rest:-1) axis=0",
      "f = Reshape(c, q)",
    ]
    var computed = try make(.weightSVD, lines: head + tail + shapes + product)
    var direct = try make(.weightSVD, lines: head + tail + ["f = Flatten(c)"] + product)
    let x = try pictures(17, seed: 11)
    try computed.calibrate([["x": x]])
    try direct.calibrate([["x": x]])
    let sizes = try direct.select(target: 0.6)
    #expect(try computed.select(target: 0.6) == sizes)
    let a = try output(try computed.compress(units: sizes).graph, x)
    #expect(try output(try direct.compress(units: sizes).graph, x) == a)
  }

  @Test func dataThatDoesNotFitIsRefusedAndTheOldDataStays() throws {
    var compressor = try make(.spatialSVD)
    try compressor.calibrate([["x": try pictures(8, seed: 8)]])
    let sizes = try compressor.select(target: 0.8)
    expectError(.emptyStatistics) { try compressor.calibrate([]) }
    expectError(.unknownName, "'z'") {
      try compressor.calibrate([["z": try self.pictures(1, seed: 1)]])
    }
    var nan = try pictures(4, seed: 9).floats()
    nan[5] = .nan
    expectError(.nonFiniteValue) {
      try compressor.calibrate([["x": try Tensor(nan, shape: [4, 3, 8, 8])]])
    }
    #expect(try compressor.select(target: 0.8) == sizes)
    try compressor.calibrate([["x": try Tensor([Float](repeating: 1, count: 64), shape: [4, 16])]])
    #expect(throws: HalfstepError.self) { try compressor.errorCurves() }
    expectError(.cancelled) {
      try compressor.calibrate([["x": try self.pictures(8, seed: 8)]])
      _ = try compressor.compress(units: [1, 1, nil]) { _ throws(HalfstepError) in
        throw HalfstepError(.cancelled, "stopped")
      }
    }
  }
}
