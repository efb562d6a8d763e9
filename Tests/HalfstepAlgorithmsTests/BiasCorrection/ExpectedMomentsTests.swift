// SPDX-License-Identifier: Apache-2.0
// What channels are expected to hold, and biases corrected by it.

import Foundation
import HalfstepAlgorithms
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics
import TestSupport
import Testing

@Suite struct ExpectedMomentsTests {
  /// A convolution behind which a batch norm was folded, then `lines` that read `a`.
  private func graph(
    _ lines: [String], gamma: [Float], beta: [Float]
  ) throws -> Graph {
    var graph = try TextGraph.make(
      ["a = Conv(x, wa[\(gamma.count),1,1,1], ba[\(gamma.count)])"] + lines,
      inputs: [("x", [-1, 1, 4, 4])])
    graph.foldedBatchNorms["a"] = FoldedBatchNorm(gamma: gamma, beta: beta)
    try graph.validateAndSort()
    return graph
  }

  /// Mean and variance by sampling the normal distribution at 200,001 quantile-free points.
  private func integrated(
    _ center: Double, _ deviation: Double, _ function: (Double) -> Double
  ) -> (mean: Double, variance: Double) {
    var (weight, sum, squares) = (0.0, 0.0, 0.0)
    let steps = 200_000
    for step in 0...steps {
      let z = -10 + 20 * Double(step) / Double(steps)
      let density = exp(-z * z / 2)
      let value = function(center + deviation * z)
      weight += density
      sum += density * value
      squares += density * value * value
    }
    return (sum / weight, squares / weight - sum * sum / weight / weight)
  }

  @Test func rectifiersAndBoundsCutNormalDistributions() throws {
    let gamma: [Float] = [1, -2, 0.5, 3, 0]
    let beta: [Float] = [0, 1, -2, 5, 0.25]
    let cases: [(String, (Double) -> Double)] = [
      ("y = Relu(a)", { max($0, 0) }),
      ("y = Clip(a, lo~0.0, hi~6.0)", { min(max($0, 0), 6) }),
      ("y = Clip(a, lo~-1.0, hi~1.5)", { min(max($0, -1), 1.5) }),
      ("y = HardSwish(a)", { $0 * min(max($0 / 6 + 0.5, 0), 1) }),
      ("y = LeakyRelu(a) alpha=f0.1", { $0 < 0 ? Double(Float(0.1)) * $0 : $0 }),
    ]
    for (line, function) in cases {
      let graph = try graph([line], gamma: gamma, beta: beta)
      let moments = try #require(try ExpectedMoments(graph, GraphIndex(graph))["y"])
      for channel in gamma.indices {
        let wanted = integrated(
          Double(beta[channel]), abs(Double(gamma[channel])), function)
        let got = moments.moments(channel)
        // The reference's grid of 10⁻⁴ deviations is off by its square at a kink; functions that are
        // not piecewise linear are integrated with steps of 0.04.
        #expect(abs(got.mean - wanted.mean) < 2e-4, "\(line) \(channel)")
        #expect(abs(got.variance - wanted.variance) < 2e-3, "\(line) \(channel)")
      }
    }
  }

  @Test func linearLayersSumsAndPoolsAddMeans() throws {
    var graph = try graph(
      [
        "b = Conv(a, wb[2,2,1,1], bb[2])", "s = Add(b, a)", "p = GlobalAveragePool(s)",
        "f = Flatten(p)", "y = Gemm(f, wg[1,2]) transB=1",
      ], gamma: [1, 2], beta: [3, -1])
    graph.initializers["wb"] = try Tensor([1, 2, 0, -1], shape: [2, 2, 1, 1])
    graph.initializers["bb"] = try Tensor([0.5, 0], shape: [2])
    graph.initializers["wg"] = try Tensor([2, 3], shape: [1, 2])
    let moments = try ExpectedMoments(graph, GraphIndex(graph))
    // b: 3 + 2·(−1) + 0.5 = 1.5 with variance 1 + 4·4 = 17; −(−1) = 1 with 4. s adds 3 and 1, −1 and 4.
    let sum = try #require(moments["s"])
    let (first, second) = (sum.moments(0), sum.moments(1))
    // A root and its square: two roundings.
    #expect(first.mean == 4.5 && abs(first.variance - 18) < 1e-14 * 18)
    #expect(second.mean == 0 && abs(second.variance - 8) < 1e-14 * 8)
    // y: 2·4.5 + 3·0 = 9. Nothing is known of the network's input.
    #expect(try #require(moments["y"]).moments(0).mean == 9)
    #expect(moments["x"] == nil)
  }

  /// `(w − q)·E(x)` by hand: behind Relu, a channel with shift 0 and scale 1 has mean 1/√(2π), one with
  /// shift 10 and scale 1 has mean 10.
  @Test func biasesTakeTheExpectedShift() throws {
    var graph = try graph(
      ["r = Relu(a)", "y = Conv(r, wb[1,2,1,1], bb[1])"], gamma: [1, 1], beta: [0, 10])
    // Four bits over ±7: step 1; 2.4 goes to 2 and 6.8 to 7.
    graph.initializers["wb"] = try Tensor([2.4, 7], shape: [1, 2, 1, 1])
    graph.initializers["bb"] = try Tensor([1], shape: [1])
    var options = LayerReconstruction.Options(
      configuration: try RuntimeConfigurationFile.load(nameOrPath: "default"))
    options.writesWeights = false
    let before = graph
    let report = try AnalyticBiasCorrection(options: options).apply(to: &graph)
    #expect(report.layers.map(\.kept) == ["nearest", AnalyticBiasCorrection.note])
    #expect(try graph.initializers["wb"]!.floats() == before.initializers["wb"]!.floats())
    #expect(try graph.initializers["ba"]!.floats() == before.initializers["ba"]!.floats())
    let mean = 1 / (2 * Double.pi).squareRoot()
    let bias = Double(try #require(graph.initializers["bb"]).floats()[0])
    // 0.4 in float, and a bias of about 1 in float: 2⁻²³ each.
    #expect(abs(bias - (1 + 0.4 * mean)) < 1e-6)
    // Variances behind Relu: 1/2 − 1/(2π) and 1 (the rest below 10⁻²⁰).
    let variance = 5.76 * (0.5 - 1 / (2 * Double.pi)) + 49
    #expect(abs(report.layers[1].before - 0.16 * mean * mean / variance) < 1e-7)
    #expect(report.layers[1].after == 0)
  }

  @Test func withoutBatchNormsNothingIsKnown() throws {
    var graph = try TextGraph.make(
      ["a = Conv(x, wa[2,1,1,1])", "y = Conv(a, wb[1,2,1,1])"], inputs: [("x", [-1, 1, 4, 4])])
    let before = graph.initializers
    let options = LayerReconstruction.Options(
      configuration: try RuntimeConfigurationFile.load(nameOrPath: "default"))
    expectError(.emptyStatistics) {
      try AnalyticBiasCorrection(options: options).apply(to: &graph)
    }
    expectError(.cancelled) {
      try AnalyticBiasCorrection(options: options).apply(to: &graph) { _ in false }
    }
    #expect(graph.initializers.keys == before.keys)
  }
}
