// SPDX-License-Identifier: Apache-2.0
// AdaRound layer by layer: every kind of layer, starts, threads, what is kept.

import HalfstepAlgorithms
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics
import TestSupport
import Testing

@Suite struct AdaRoundRounderTests {
  /// Remembers what a method made of each layer.
  final class Recorder: LayerRounder {
    let rounder: AdaRoundRounder
    var found: [(problem: String, rounding: LayerRounding, nearest: Encoding)] = []
    var following: [FollowingActivation] = []

    init(_ rounder: AdaRoundRounder) { self.rounder = rounder }

    func round(_ problem: LayerProblem) throws(HalfstepError) -> LayerRounding {
      let result = try rounder.round(problem)
      found.append((problem.node.label, result, problem.nearest))
      following.append(problem.following)
      return result
    }
  }

  private static func options(bytes: Int = 1 << 29) throws -> LayerReconstruction.Options {
    var options = try LayerWalkTests.options()
    options.maximumBytes = bytes
    options.activationBits = nil
    return options
  }

  private static func rounder(_ start: (any LayerRounder)? = nil) -> AdaRoundRounder {
    var options = AdaRoundOptions()
    options.iterations = 300
    options.rate = 1e-2
    options.batchRows = 128
    return AdaRoundRounder(options: options, start: start)
  }

  private static func run(
    _ rounder: AdaRoundRounder, bytes: Int = 1 << 29
  ) throws -> (Recorder, LayerReconstruction.Report, Graph) {
    var graph = try LayerWalkTests.graph()
    let recorder = Recorder(rounder)
    let report = try LayerReconstruction(options: try options(bytes: bytes)).apply(
      to: &graph, batches: [["x": try LayerWalkTests.data(24)]], rounder: recorder)
    return (recorder, report, graph)
  }

  @Test func weightsAreOneOfTheTwoGridPointsAround() throws {
    let (recorder, report, graph) = try Self.run(Self.rounder())
    let float = try LayerWalkTests.graph()
    #expect(recorder.found.count == 6)
    #expect(recorder.found.contains { $0.rounding.note == "adaround" })
    #expect(report.layers.allSatisfy { $0.after <= $0.before })
    #expect(recorder.following[0] == .relu)
    for row in report.layers {
      let encoding = try #require(graph.weightEncodings[row.weight])
      let rounded = try #require(graph.initializers[row.weight])
      // Already on the grid: rounding again changes nothing.
      #expect(try encoding.fakeQuantize(rounded).floats() == rounded.floats())
      let layout = try GroupLayout(encoding.granularity, shape: rounded.shape)
      let (after, before) = (
        try rounded.floats(), try #require(float.initializers[row.weight]).floats()
      )
      for index in 0..<layout.runCount {
        let run = layout.run(index)
        let scale = encoding.scales[run.group]
        for element in run.offset..<run.offset + run.count {
          // Less than a step away, unless the grid ends before the weight.
          let isInside =
            before[element] <= scale * Float(encoding.maximumCode)
            && before[element] >= scale * Float(encoding.minimumCode)
          #expect(!isInside || abs(after[element] - before[element]) < scale * 1.0001)
        }
      }
    }
  }

  @Test func threadsAndFilesDoNotMatter() throws {
    let saved = Parallel.maximumThreads
    defer { Parallel.setMaximumThreads(saved) }
    var weights: [[[Float]]] = []
    for (threads, bytes) in [(1, 1 << 29), (2, 1 << 29), (2, 0)] {
      Parallel.setMaximumThreads(threads)
      let (recorder, _, _) = try Self.run(Self.rounder(), bytes: bytes)
      weights.append(try recorder.found.map { try $0.rounding.weight.floats() })
    }
    #expect(weights[0] == weights[1] && weights[0] == weights[2])
  }

  @Test func anotherMethodsResultIsRefinedAgainstTheLoss() throws {
    /// Rounds all weights down, with a bias of its own.
    struct Down: LayerRounder {
      func round(_ problem: LayerProblem) throws(HalfstepError) -> LayerRounding {
        var weight = try problem.nearest.fakeQuantize(problem.weight)
        let layout = try GroupLayout(problem.nearest.granularity, shape: weight.shape)
        let float = try problem.weight.floats()
        try weight.withMutableFloats { (values) throws(HalfstepError) in
          for index in 0..<layout.runCount {
            let run = layout.run(index)
            let scale = problem.nearest.scales[run.group]
            for element in run.offset..<run.offset + run.count {
              let code = (float[element] / scale).rounded(.down)
              values[element] = max(code, Float(problem.nearest.minimumCode)) * scale
            }
          }
        }
        return LayerRounding(
          weight: weight, encoding: problem.nearest, bias: problem.bias.map { Float($0) },
          note: "down")
      }
    }
    let (recorder, _, _) = try Self.run(Self.rounder(Down()))
    // Rounding down is so bad that every layer gains.
    #expect(recorder.found.allSatisfy { $0.rounding.note == "down, adaround" })
    #expect(recorder.found.allSatisfy { $0.rounding.bias != nil })
    // A tolerance that nothing exceeds leaves the first method's result.
    var patient = Self.rounder(Down())
    patient.tolerance = .infinity
    let (kept, _, _) = try Self.run(patient)
    #expect(kept.found.allSatisfy { $0.rounding.note == "down" })
  }

  /// In a brief refinement, layers without an activation function and with few rows keep the first result,
  /// and so do those that gain too little.
  @Test func briefRefinementLeavesLayersOut() throws {
    let brief = AdaRoundRounder.brief(GramRounding(), seed: 0)
    let (plain, _, _) = try Self.run(brief)
    for (found, following) in zip(plain.found, plain.following) where following == .identity {
      #expect(!found.rounding.note.contains("adaround") && !found.rounding.note.contains("bias"))
    }
    #expect(plain.following.contains(.identity) && plain.following.contains(.relu))
    var greedy = brief
    greedy.refinement.gain = 0.999_999
    #expect(try Self.run(greedy).0.found.allSatisfy { !$0.rounding.note.contains("adaround") })
    var starved = brief
    starved.refinement.includesLinear = true
    starved.refinement.rowsPerColumn = 1_000_000
    #expect(try Self.run(starved).0.found.allSatisfy { !$0.rounding.note.contains("adaround") })
  }

  @Test func activationsBehindLayersAreFound() throws {
    let lines = [
      "a = Conv(x, wa[4,3,1,1])", "ra = PRelu(a, s[4,1,1])", "b = Conv(ra, wb[4,4,1,1])",
      "rb = LeakyRelu(b)", "c = Conv(rb, wc[4,4,1,1])", "rc = HardSwish(c)",
      "d = Conv(rc, wd[4,4,1,1])", "rd = Sigmoid(d)", "e = Conv(rd, we[4,4,1,1])",
      "re = Add(e, d)",
    ]
    var graph = try TextGraph.make(lines, inputs: [("x", [-1, 3, 4, 4])])
    let recorder = Recorder(Self.rounder())
    let x = try Tensor([Float](repeating: 0.5, count: 96), shape: [2, 3, 4, 4])
    try LayerReconstruction(options: try Self.options()).apply(
      to: &graph, batches: [["x": x]], rounder: recorder)
    let slopes = try #require(graph.initializers["s"]).floats()
    let expected: [FollowingActivation] = [
      .slopes(slopes), .slopes([0.01, 0.01, 0.01, 0.01]), .hardSwish, .identity, .identity,
    ]
    #expect(recorder.following == expected)
  }
}
