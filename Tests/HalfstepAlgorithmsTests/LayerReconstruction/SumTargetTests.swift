// SPDX-License-Identifier: Apache-2.0
// Layers whose output is added to another tensor aim at the sum; what Gram rounding learns from.

import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import TestSupport
import Testing

@Suite struct SumTargetTests {
  /// A residual block: `b` is added to what the block reads; `c` to a constant; `d` to a broadcast mean.
  private static let lines = [
    "a = Conv(x, wa[6,3,1,1])", "ra = Relu(a)", "b = Conv(ra, wb[6,6,1,1], bb[6])",
    "s = Add(b, ra)", "c = Conv(s, wc[6,6,1,1])", "k = Add(c, shift[6,1,1])",
    "m = GlobalAveragePool(s)", "d = Conv(k, wd[6,6,1,1])", "y = Add(d, m)",
  ]

  private static func graph() throws -> Graph {
    try TextGraph.make(lines, inputs: [("x", [-1, 3, 6, 6])])
  }

  private static func data() throws -> Tensor {
    var random = SeededGenerator(seed: 8)
    return try Tensor(random.floats(40 * 108), shape: [40, 3, 6, 6])
  }

  private static func options(sums: Bool) throws -> LayerReconstruction.Options {
    var options = try LayerWalkTests.options()
    options.parameterBits = 3
    options.activationBits = nil
    options.targetsSums = sums
    return options
  }

  /// Rounds to nearest and looks at what layers have to make up for.
  private final class Recorder: LayerRounder {
    var errors: [String: [Float]] = [:]
    var inputs: [String: (reference: [Float], quantized: [Float])] = [:]

    func round(_ problem: LayerProblem) throws(HalfstepError) -> LayerRounding {
      let given = try problem.inputs(0)
      let unfolding = try problem.unfolding(given.quantized.shape)
      errors[problem.node.label] = try problem.sumErrors(0, [0, 5, 40], unfolding)
      inputs[problem.node.label] = (try given.reference.floats(), try given.quantized.floats())
      return LayerRounding(
        weight: try problem.nearest.fakeQuantize(problem.weight), encoding: problem.nearest,
        note: "recorded")
    }
  }

  @Test func whatIsMissingIsTheOtherTensorsError() throws {
    for sums in [true, false] {
      var graph = try Self.graph()
      let recorder = Recorder()
      let report = try LayerReconstruction(options: try Self.options(sums: sums)).apply(
        to: &graph, batches: [["x": try Self.data()]], rounder: recorder)
      #expect(report.layers.count == 4)
      let labels = report.layers.map(\.layer)
      // Constants and tensors of another shape are none.
      #expect(recorder.errors.keys.sorted() == (sums ? [labels[1]] : []))
      guard sums, let input = recorder.inputs[labels[1]] else { continue }
      // The block reads what is added: channel c of picture p at position q is element (6p + c)·36 + q.
      let expected = (0..<6).flatMap { channel in
        [(0, 0), (0, 5), (1, 4)].map { picture, position in
          let at = (picture * 6 + channel) * 36 + position
          return input.reference[at] - input.quantized[at]
        }
      }
      #expect(recorder.errors[labels[1]] == expected)
      #expect(expected.contains { $0 != 0 })
    }
  }

  /// Noise over signal of the block's sum on other data.
  private static func noise(_ rounded: Graph) throws -> Double {
    var random = SeededGenerator(seed: 9)
    let x = try Tensor(random.floats(32 * 108), shape: [32, 3, 6, 6])
    func sum(_ graph: Graph) throws -> [Float] {
      var part = graph
      part.outputs = [ValueInfo(name: "s", dataType: .float32, dimensions: nil)]
      return try #require(try Session(graph: part).run(["x": x])["s"]).floats()
    }
    let (wanted, got) = (try sum(graph()), try sum(rounded))
    let mean = wanted.reduce(0) { $0 + Double($1) } / Double(wanted.count)
    var (noise, signal) = (0.0, 0.0)
    for (a, b) in zip(wanted, got) {
      noise += (Double(a) - Double(b)) * (Double(a) - Double(b))
      signal += (Double(a) - mean) * (Double(a) - mean)
    }
    return noise / signal
  }

  @Test func aimingAtTheSumLowersItsError() throws {
    let noise = try [false, true].map { sums in
      var graph = try Self.graph()
      try LayerReconstruction(options: try Self.options(sums: sums)).apply(
        to: &graph, batches: [["x": try Self.data()]], rounder: GramRounding())
      return try Self.noise(graph)
    }
    // The block reads the very tensor whose error it shall make up for.
    #expect(noise[1] < noise[0], "\(noise)")
  }

  @Test func heldOutRowsAreLearnedFromOnceTheyHaveChosen() throws {
    var weights: [[Float]] = []
    for refits in [true, false] {
      var options = GramRounding.Options()
      options.refitsOnAllRows = refits
      var graph = try Self.graph()
      let report = try LayerReconstruction(options: try Self.options(sums: true)).apply(
        to: &graph, batches: [["x": try Self.data()]], rounder: GramRounding(options: options))
      #expect(report.layers.allSatisfy { $0.after <= $0.before && $0.after > 0 })
      weights.append(try #require(graph.initializers["bb"]).floats())
    }
    #expect(weights[0] != weights[1])
  }
}
