// SPDX-License-Identifier: Apache-2.0
// Candidates for a layer compared by what they do to the network's outputs.

import HalfstepAlgorithms
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import TestSupport
import Testing

@Suite struct OutputValidationTests {
  /// Offers the weights times a factor and keeps what the problem says of them.
  final class Scaled: LayerRounder {
    let factor: (String, Int) -> Float
    private(set) var noise: [Double] = []
    private(set) var weights: [Tensor] = []

    /// - Parameter factor: For a node and a position in its weight.
    init(_ factor: @escaping (String, Int) -> Float) { self.factor = factor }

    func round(_ problem: LayerProblem) throws(HalfstepError) -> LayerRounding {
      let values = try problem.weight.floats()
      let weight = try Tensor(
        values.indices.map { values[$0] * factor(problem.node.label, $0) },
        shape: problem.weight.shape.dimensions)
      let candidate = LayerRounding(weight: weight, encoding: problem.nearest, note: "scaled")
      noise.append(try problem.noise(of: candidate))
      weights.append(weight)
      return candidate
    }
  }

  private func ratio(_ wanted: [Float], _ got: [Float]) -> Double {
    let mean = wanted.reduce(0) { $0 + Double($1) } / Double(wanted.count)
    let signal = wanted.reduce(0) { $0 + (Double($1) - mean) * (Double($1) - mean) }
    let noise = zip(wanted, got).reduce(0) {
      $0 + (Double($1.0) - Double($1.1)) * (Double($1.0) - Double($1.1))
    }
    return noise / signal
  }

  /// The noise of a candidate is that of a run of the whole network with all layers before it as they
  /// were kept, this one as the candidate, and the rest in float: residuals, shape arithmetic,
  /// transposed layers and all.
  @Test func noiseIsThatOfTheWholeNetwork() throws {
    let graph = try LayerWalkTests.graph()
    let x = try LayerWalkTests.data(20)
    var options = try LayerWalkTests.options()
    options.activationBits = nil
    options.validation = .outputs(isQuantized: false)
    // Always kept, so that the prefix is what the candidates were.
    options.keepsBetter = false
    let rounder = Scaled { _, position in position % 2 == 0 ? 1.1 : 0.95 }
    var result = graph
    let report = try LayerReconstruction(options: options).apply(
      to: &result, batches: [["x": x]], rounder: rounder)
    let wanted = try #require(try Session(graph: graph).run(["x": x])["y"]).floats()
    var prefix = graph
    for (index, layer) in report.layers.enumerated() {
      prefix.initializers[layer.weight] = rounder.weights[index]
      let got = try #require(try Session(graph: prefix).run(["x": x])["y"]).floats()
      // The parts of a network may run with other code than the whole, which fuses more: sums of at
      // most 72 products in another order, so 72·2⁻²⁴ of a value at each of six layers.
      let expected = ratio(wanted, got)
      #expect(abs(rounder.noise[index] - expected) <= 1e-4 * expected, "\(layer.layer)")
      #expect(layer.after == rounder.noise[index])
    }
  }

  /// Shapes of tensors from before a layer may be asked for behind it.
  @Test func shapesOfEarlierTensorsAreKnownBehindALayer() throws {
    var graph = try TextGraph.make(
      [
        "a = Conv(x, wa[4,3,3,3]) pads=1,1,1,1", "b = Conv(a, wb[4,4,1,1])", "h = Shape(a)",
        "r = Reshape(b, h)", "p = GlobalAveragePool(r)", "f = Flatten(p)", "y = MatMul(f, wy[4,3])",
      ], inputs: [("x", [-1, 3, 8, 8])])
    var options = try LayerWalkTests.options()
    options.validation = .outputs(isQuantized: true)
    options.writesWeights = false
    let report = try LayerReconstruction(options: options).apply(
      to: &graph, batches: [["x": try LayerWalkTests.data(8)]],
      rounder: EmpiricalBiasCorrection())
    #expect(report.layers.count == 3)
    // Noise of the layer's own output, which is what remains if no output tells, would differ.
    for (one, next) in zip(report.layers, report.layers.dropFirst()) {
      #expect(abs(next.before - one.after) <= 1e-3 * one.after)
    }
  }

  /// Channel 0 is read with weight zero. A candidate that repairs it and spoils channel 1 a little has
  /// less error of its own than rounding to nearest, but more at the output.
  @Test(arguments: [false, true]) func outputsDecideIfTheyAreAskedFor(_ byOutputs: Bool) throws {
    var graph = try TextGraph.make(
      ["a = Conv(x, wa[2,1,1,1])", "y = Conv(a, wb[1,2,1,1])"], inputs: [("x", [-1, 1, 4, 4])])
    // On a grid of sixteen codes over ±10 the step is 10/7; 6.4 is nearest to 4 steps = 5.71 and 0.7
    // off, 10 is on it.
    graph.initializers["wa"] = try Tensor([6.4, 10], shape: [2, 1, 1, 1])
    graph.initializers["wb"] = try Tensor([0, 1], shape: [1, 2, 1, 1])
    var random = SeededGenerator(seed: 5)
    let x = try Tensor(random.floats(20 * 16), shape: [20, 1, 4, 4])
    var options = LayerReconstruction.Options(
      configuration: try RuntimeConfigurationFile.load(nameOrPath: "default"))
    options.activationBits = nil
    options.validation = byOutputs ? .outputs(isQuantized: false) : .layer
    let rounder = Scaled { node, position in node == "n0" && position == 1 ? 0.98 : 1 }
    let report = try LayerReconstruction(options: options).apply(
      to: &graph, batches: [["x": x]], rounder: rounder)
    let first = try #require(report.layers.first)
    #expect(first.kept == (byOutputs ? "nearest" : "scaled"))
    if byOutputs {
      #expect(first.before == 0)
      // A factor of 0.98 on the output: noise 0.02² of its power, and its mean is nearly zero.
      #expect(abs(rounder.noise[0] - 4e-4) < 4e-5)
    }
  }

  /// With the rest quantized, the noise after the last layer is that of the quantized network.
  @Test func aQuantizedRestEndsInTheQuantizedNetwork() throws {
    let graph = try LayerWalkTests.graph()
    let x = try LayerWalkTests.data(20)
    var options = try LayerWalkTests.options()
    options.validation = .outputs(isQuantized: true)
    options.writesWeights = false
    var result = graph
    let report = try LayerReconstruction(options: options).apply(
      to: &result, batches: [["x": x]], rounder: EmpiricalBiasCorrection())
    for (one, next) in zip(report.layers, report.layers.dropFirst()) {
      #expect(one.after <= one.before)
      // The same network: nothing has changed in between but which part of it runs in one piece.
      #expect(abs(next.before - one.after) <= 1e-3 * one.after)
    }
    #expect(report.layers.contains { $0.after < $0.before })
  }
}
