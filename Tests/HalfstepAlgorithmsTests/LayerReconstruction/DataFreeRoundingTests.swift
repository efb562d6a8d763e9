// SPDX-License-Identifier: Apache-2.0
// Rounding without data.

import HalfstepAlgorithms
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics
import TestSupport
import Testing

@Suite struct DataFreeRoundingTests {
  private func options() throws -> LayerReconstruction.Options {
    LayerReconstruction.Options(
      configuration: try RuntimeConfigurationFile.load(nameOrPath: "default_per_channel"))
  }

  /// Expected power of a row of weights by its definition, from the moments of single inputs: unit mean
  /// and variance, correlation 1/2 between taps of a kernel.
  private func power(_ row: [Double], taps: Int) -> Double {
    var total = 0.0
    for i in row.indices {
      for j in row.indices {
        var moment = 1.0
        if i == j { moment += 1 } else if i / taps == j / taps { moment += 0.5 }
        total += row[i] * moment * row[j]
      }
    }
    return total
  }

  /// Nothing is known of the inputs: errors of kernels and rows cancel. What is reported is the expected
  /// noise by its definition, and less than to nearest.
  @Test func kernelsAndRowsAreCompensated() throws {
    var graph = try TextGraph.make(
      ["y = Conv(x, w[6,4,3,3], b[6])"], inputs: [("x", [-1, 4, 8, 8])])
    let before = graph
    let options = try options()
    let report = try DataFreeRounding(options: options, gram: GramRounding.Options()).apply(
      to: &graph)
    let layer = try #require(report.layers.first)
    #expect(layer.kept == "gram, data-free")
    // To nearest, errors e of a row cost 2·Σe² on average. If those of each kernel and row cancelled and
    // none grew, Σe²/2 would be left: a quarter. Those that turn do grow.
    #expect(layer.after < 0.5 * layer.before)
    let old = try #require(before.initializers["w"]).floats().map(Double.init)
    let new = try #require(graph.initializers["w"]).floats().map(Double.init)
    var (noise, signal) = (0.0, 0.0)
    for row in 0..<6 {
      let range = row * 36..<(row + 1) * 36
      noise += power(range.map { old[$0] - new[$0] }, taps: 9)
      signal += power(range.map { old[$0] }, taps: 9)
    }
    #expect(abs(layer.after - noise / signal) <= 1e-9 * layer.before)
    // Unknown means are not for the bias.
    #expect(try graph.initializers["b"]!.floats() == before.initializers["b"]!.floats())
    let encoding = try #require(graph.weightEncodings["w"])
    #expect(encoding.bits == 4 && encoding.scales.count == 6)
    #expect(
      try encoding.fakeQuantize(graph.initializers["w"]!).floats()
        == graph.initializers["w"]!.floats())
  }

  @Test func knownMeansGoIntoTheBias() throws {
    var graph = try LayerWalkTests.graph()
    graph.foldedBatchNorms["a"] = FoldedBatchNorm(
      gamma: [Float](repeating: 1, count: 8), beta: [Float](repeating: 2, count: 8))
    let before = graph
    let report = try DataFreeRounding(options: try options(), gram: GramRounding.Options()).apply(
      to: &graph)
    #expect(report.layers.map(\.layer) == ["n0", "n2", "n3", "n6", "n9", "n10"])
    #expect(report.layers.allSatisfy { $0.after <= $0.before })
    // Layers behind the known one correct their means; the first one cannot.
    #expect(try graph.initializers["ba"]!.floats() == before.initializers["ba"]!.floats())
    #expect(try graph.initializers["bc"]!.floats() != before.initializers["bc"]!.floats())
  }

  @Test func cancellingLeavesTheGraph() throws {
    var graph = try LayerWalkTests.graph()
    let before = graph.initializers
    let options = try options()
    expectError(.cancelled) {
      try DataFreeRounding(options: options, gram: GramRounding.Options()).apply(to: &graph) {
        $0.completed < 2
      }
    }
    for (name, value) in before {
      #expect(try graph.initializers[name]!.floats() == value.floats())
    }
    #expect(graph.weightEncodings.isEmpty)
  }
}
