// SPDX-License-Identifier: Apache-2.0
// Tests of costs, low-rank layers and their ranks.

import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import TestSupport
import Testing

@Suite struct CompressorTests {
  // 3x3 with stride 2 and padding, 1x5 dilated, 1x1, a grouped layer, and a matrix product.
  let net = [
    "a = Conv(x, w[6,3,3,3], b[6]) strides=2,2 pads=1,1,1,1", "r = Relu(a)",
    "c = Conv(r, v[8,6,1,2]) dilations=1,2", "d = Conv(c, u[8,1,3,3]) group=8 pads=1,1,1,1",
    "e = Conv(d, t[4,8,1,1], s[4])", "f = Flatten(e)", "y = Gemm(f, g[5,32], h[5]) transB=1",
  ]

  private func compressor(
    _ scheme: CompressionScheme, multiplicity: Int = 1, ignoring: [String] = []
  ) throws -> Compressor {
    var options = CompressionOptions()
    options.scheme = scheme
    options.multiplicity = multiplicity
    options.ignoredLayers = ignoring
    return try Compressor(try TextGraph.make(net), options)
  }

  private func output(_ graph: Graph) throws -> [Float] {
    var random = SeededGenerator(seed: 3)
    let x = try Tensor(random.floats(2 * 192), shape: [2, 3, 8, 8])
    var open = graph
    open.inputs = graph.inputs.map {
      ValueInfo(name: $0.name, dataType: .float32, dimensions: nil)
    }
    return try #require(try Session(graph: open).run(["x": x])["y"]).floats()
  }

  @Test func costsByHand() throws {
    let costs = try compressor(.spatialSVD).costs
    // Outputs: 4x4, then 4x2 (a dilated kernel of reach 3), 4x2, 4x2, and one row.
    #expect(costs.layers.map(\.cost.parameters) == [162, 96, 72, 32, 160])
    #expect(costs.layers.map(\.cost.macs) == [162 * 16, 96 * 8, 72 * 8, 32 * 8, 160])
    #expect(costs.total == Cost(macs: 2592 + 768 + 576 + 256 + 160, parameters: 522))
  }

  @Test func ranksByHand() throws {
    let spatial = try compressor(.spatialSVD)
    #expect(spatial.layers.map(\.name) == ["n0", "n2", "n4"])
    // n0: rank r takes (3·3·r·2 + r·6·3) · 16 = 576 r of 2592 multiply-accumulates; half is 1296.
    #expect(try spatial.units(0, ratio: 0.5) == 2)
    // The least rank is 1 even if that is too much, and 1 and more leave the layer alone.
    #expect(try spatial.units(0, ratio: 0.01) == 1)
    #expect(try spatial.units(0, ratio: 1) == nil)
    let weight = try compressor(.weightSVD)
    #expect(weight.layers.map(\.name) == ["n0", "n2", "n4", "n6"])
    // n6: rank r takes 32 r + 5 r = 37 r of 160.
    #expect(try weight.units(3, ratio: 0.5) == 2)
    // n0: (3·r·4 + r·6·9) · 16 = 1056 r of 2592; half is 1296.
    #expect(try weight.units(0, ratio: 0.5) == 1)
    let even = try compressor(.spatialSVD, multiplicity: 4)
    // 2 becomes 4; the largest rank within the layer's own cost is 2592 / 576 = 4.
    #expect(try even.units(0, ratio: 0.5) == 4)
    #expect(try even.units(0, ratio: 0.01) == 4)
  }

  @Test(arguments: [CompressionScheme.weightSVD, .spatialSVD])
  func fullRankReproducesTheFunction(_ scheme: CompressionScheme) throws {
    let compressor = try compressor(scheme)
    let result = try compressor.compress(units: compressor.layers.map(\.maximumUnits))
    #expect(result.graph.nodes.count == compressor.graph.nodes.count + compressor.layers.count)
    let expected = try output(compressor.graph)
    let actual = try output(result.graph)
    // Each weight is a sum of at most 9 products of factors rounded to float, and each output a
    // sum of at most 54 more terms: 5 layers · 63 · 2⁻²⁴ of the largest magnitude.
    let range = expected.map(abs).max() ?? 0
    for (a, b) in zip(expected, actual) { #expect(abs(a - b) <= 2e-5 * range) }
    #expect(expected.count == actual.count && range > 0)
  }

  @Test func ratioOneIsTheIdentity() throws {
    let compressor = try compressor(.spatialSVD)
    let sizes = try compressor.layers.indices.map { try compressor.units($0, ratio: 1) }
    let result = try compressor.compress(units: sizes)
    #expect(try output(result.graph) == output(compressor.graph))
    #expect(result.report.after == result.report.before)
  }

  @Test func estimatedCostIsTheTrueOne() throws {
    for scheme in [CompressionScheme.weightSVD, .spatialSVD] {
      // Without padding a first layer's picture is larger than the estimate knows.
      let compressor = try compressor(scheme, ignoring: ["v"])
      let sizes = try compressor.layers.indices.map { try compressor.units($0, ratio: 0.6) }
      let result = try compressor.compress(units: sizes)
      // Strides divide the pictures here.
      #expect(result.report.after == compressor.cost(units: sizes))
      #expect(result.report.layers.map(\.after).reduce(.zero, +) == result.report.after)
    }
  }

  @Test func weightsHaveTheShapesOfTheRank() throws {
    let compressor = try compressor(.spatialSVD)
    let graph = try compressor.compress(units: [2, nil, nil]).graph
    #expect(graph.initializers["w.0.weight"]?.shape.dimensions == [2, 3, 3, 1])
    #expect(graph.initializers["w.1.weight"]?.shape.dimensions == [6, 2, 1, 3])
    let (first, second) = (graph.nodes[0], graph.nodes[1])
    #expect(first.intsAttribute("strides") == [2, 1] && second.intsAttribute("strides") == [1, 2])
    #expect(first.intsAttribute("pads") == [1, 0, 1, 0])
    #expect(second.intsAttribute("pads") == [0, 1, 0, 1])
    #expect(first.input(2) == nil && second.input(2) == "b")
  }

  @Test func whatCannotBeSplitIsNamedAndTheRestIsSplit() throws {
    let compressor = try compressor(.spatialSVD, ignoring: ["t"])
    #expect(compressor.layers.map(\.name) == ["n0", "n2"])
    #expect(compressor.refusals.map(\.layer) == ["n3", "n6"])
    expectError(.unsupportedOperator, "groups") { try compressor.position(of: "n3") }
    expectError(.unknownName, "'zz'") { try compressor.position(of: "zz") }
    expectError(.unknownName, "'zz'") { try self.compressor(.spatialSVD, ignoring: ["zz"]) }
    expectError(.invalidArgument, "multiplicity") {
      try self.compressor(.spatialSVD, multiplicity: 0)
    }
    expectError(.invalidArgument, "above 0") { try compressor.units(0, ratio: .nan) }
    expectError(.invalidArgument, "1...9") { try compressor.compress(units: [10, nil]) }
    expectError(.invalidArgument, "expected 2") { try compressor.compress(units: [1]) }
    expectError(.cancelled) {
      try compressor.compress(units: [1, 1]) { _ throws(HalfstepError) in
        throw HalfstepError(.cancelled, "stopped")
      }
    }
  }

  @Test func sharedWeightsAreSplitForTheirLayerOnly() throws {
    let graph = try TextGraph.make([
      "a = Conv(x, w[3,3,3,3]) pads=1,1,1,1", "b = Conv(a, w) pads=1,1,1,1", "y = Add(a, b)",
    ])
    var options = CompressionOptions()
    options.scheme = .weightSVD
    let compressor = try Compressor(graph, options)
    let result = try compressor.compress(units: [2, nil])
    #expect(result.graph.initializers["w"] != nil)
    #expect(result.graph.nodes.count == 4)
    // A weight's name stands for all its layers, a node's for one.
    options.ignoredLayers = ["w"]
    #expect(try Compressor(graph, options).layers.isEmpty)
    options.ignoredLayers = ["n1"]
    #expect(try Compressor(graph, options).layers.map(\.name) == ["n0"])
  }

  @Test func automaticChoiceMeetsItsTarget() throws {
    let compressor = try compressor(.weightSVD)
    for target in [0.9, 0.7] {
      let sizes = try compressor.select(target: target)
      #expect(compressor.ratio(compressor.cost(units: sizes)) <= target)
      #expect(sizes.contains { $0 != nil })
    }
    #expect(try compressor.select(target: 1) == [nil, nil, nil, nil])
    expectError(.invalidArgument, "at best") { try compressor.select(target: 0.01) }
    expectError(.invalidArgument, "(0, 1]") { try compressor.select(target: 0) }
  }

  @Test func nonFiniteWeightsAreNamed() throws {
    var graph = try TextGraph.make(net)
    graph.initializers["w"] = try Tensor([Float](repeating: .nan, count: 162), shape: [6, 3, 3, 3])
    let compressor = try Compressor(graph, CompressionOptions())
    expectError(.nonFiniteValue, "'n0'") { try compressor.compress(units: [1, nil, nil]) }
  }

  @Test func threadsDoNotMatterAndSingleLayersAreAlmostTheSame() throws {
    let compressor = try compressor(.spatialSVD)
    let threads = Parallel.maximumThreads
    defer { Parallel.setMaximumThreads(threads) }
    let sizes: [Int?] = [3, 5, 2]
    Parallel.setMaximumThreads(1)
    let one = try compressor.compress(units: sizes)
    Parallel.setMaximumThreads(2)
    let two = try compressor.compress(units: sizes)
    #expect(one.graph.initializers.keys == two.graph.initializers.keys)
    for name in one.graph.initializers.keys {
      #expect(try one.graph.initializers[name]?.floats() == two.graph.initializers[name]?.floats())
    }
    // Alone a layer is decomposed in doubles: the product of the factors is the same in floats.
    for (position, layer) in one.report.layers.filter({ $0.pair != nil }).enumerated() {
      var alone = [Int?](repeating: nil, count: sizes.count)
      alone[position] = sizes[position]
      let single = try compressor.compress(units: alone)
      let pair = try #require(layer.pair)
      for name in [pair.firstWeight, pair.secondWeight] {
        let a = try #require(try one.graph.initializers[name]?.floats())
        let b = try #require(try single.graph.initializers[name]?.floats())
        // Singular values of random weights are some hundredths apart: 2⁻²³ over that, ten times.
        #expect(zip(a, b).allSatisfy { abs($0 - $1) <= 5e-5 } && a.count == b.count)
      }
    }
  }

  @Test func progressRisesToOneAndStops() throws {
    let compressor = try compressor(.weightSVD)
    var shares: [Double] = []
    _ = try compressor.compress(units: [1, 1, 1, 1]) { shares.append($0) }
    #expect(shares.first == 0 && shares.last == 1 && shares == shares.sorted())
    var calls = 0
    expectError(.cancelled, "stop") {
      try compressor.compress(units: [1, 1, 1, 1]) { (_) throws(HalfstepError) in
        calls += 1
        if calls == 2 { throw HalfstepError(.cancelled, "stop") }
      }
    }
    #expect(calls == 2)
  }
}
