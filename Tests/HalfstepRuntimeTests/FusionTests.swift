// SPDX-License-Identifier: Apache-2.0
// Fused nodes give the same bits as separate ones.

import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import TestSupport
import Testing

@Suite struct FusionTests {
  /// A convolution `c` and what follows it up to `y`.
  struct Case: Sendable, CustomTestStringConvertible {
    let testDescription: String
    /// Tensors that are rounded to a grid.
    let quantized: [String]
    let build: @Sendable (inout GraphBuilder, _ channels: Int) throws -> Void
  }

  static let cases: [Case] = [
    Case(testDescription: "relu", quantized: []) { b, _ in b.node("Relu", ["c"], "y") },
    Case(testDescription: "relu, quantized", quantized: ["y"]) { b, _ in
      b.node("Relu", ["c"], "y")
    },
    Case(testDescription: "quantized", quantized: ["c"]) { b, _ in b.node("Identity", ["c"], "y") },
    Case(testDescription: "input and result quantized", quantized: ["x", "y"]) { b, _ in
      b.node("Relu", ["c"], "y")
    },
    Case(testDescription: "relu6, quantized", quantized: ["y"]) { b, _ in
      try b.constant("low", [0], [])
      try b.constant("high", [0.8], [])
      b.node("Clip", ["c", "low", "high"], "y")
    },
    Case(testDescription: "residual, relu, quantized", quantized: ["y"]) { b, _ in
      b.node("Relu", ["r"], "r1")
      b.node("Add", ["c", "r1"], "a")
      b.node("Relu", ["a"], "y")
    },
    Case(testDescription: "quantized, residual, quantized", quantized: ["c", "r", "y"]) { b, _ in
      b.node("Add", ["r", "c"], "y")
    },
    Case(testDescription: "residual that is read again", quantized: ["y"]) { b, _ in
      b.node("Add", ["c", "r"], "a")
      b.node("Relu", ["a"], "a1")
      b.node("Add", ["a1", "r"], "y")
    },
    Case(testDescription: "batch norm, relu, quantized", quantized: ["y"]) { b, channels in
      var random = SeededGenerator(seed: 3)
      try b.batchNorm("c", "n", GraphBuilder.randomBatchNorm(channels, &random))
      b.node("Relu", ["n"], "y")
    },
    Case(testDescription: "relu, minimum by channel, quantized", quantized: ["y"]) { b, channels in
      var random = SeededGenerator(seed: 4)
      try b.constant("top", random.floats(channels, in: 0.1...0.5), [1, channels, 1, 1])
      b.node("Relu", ["c"], "p")
      b.node("Min", ["p", "top"], "y")
    },
    Case(testDescription: "hard swish, quantized", quantized: ["y"]) { b, _ in
      b.node("HardSwish", ["c"], "y")
    },
    Case(testDescription: "hard sigmoid, quantized", quantized: ["y"]) { b, _ in
      b.node("HardSigmoid", ["c"], "y")
    },
    Case(testDescription: "swish", quantized: ["y"]) { b, _ in
      b.node("Sigmoid", ["c"], "s")
      b.node("Mul", ["c", "s"], "y")
    },
    Case(testDescription: "swish with a quantized sigmoid", quantized: ["s", "y"]) { b, _ in
      b.node("Sigmoid", ["c"], "s")
      b.node("Mul", ["c", "s"], "y")
    },
    Case(testDescription: "two clips", quantized: ["y"]) { b, _ in
      try b.constant("l", [-0.4], [])
      try b.constant("h", [0.4], [])
      try b.constant("h2", [0.3], [])
      b.node("Clip", ["c", "l", "h"], "p")
      b.node("Clip", ["p", "l", "h2"], "y")
    },
    Case(testDescription: "two leaky relus", quantized: ["y"]) { b, _ in
      b.node("LeakyRelu", ["c"], "p", ["alpha": .float(0.5)])
      b.node("LeakyRelu", ["p"], "y", ["alpha": .float(0.25)])
    },
  ]

  /// Channels that fill oneDNN's blocks of 8 and 16, and that do not; kernel; groups.
  static let layers: [[Int]] = [
    [16, 3, 1], [24, 1, 1], [20, 3, 1], [5, 1, 1], [24, 3, 24], [20, 3, 4],
  ]

  @Test(arguments: cases, layers)
  func fusedEqualsSeparate(_ sample: Case, _ layer: [Int]) throws {
    let (channels, kernel, groups) = (layer[0], layer[1], layer[2])
    var random = SeededGenerator(seed: 11)
    var b = GraphBuilder(shape: [2, channels, 7, 9])
    let fan = channels / groups * kernel * kernel
    let bound = 1 / Float(fan).squareRoot()
    try b.constant(
      "w", random.floats(channels * fan, in: -bound...bound),
      [channels, channels / groups, kernel, kernel])
    try b.constant("bias", random.floats(channels, in: -0.2...0.2), [channels])
    b.node("Neg", ["x"], "r")
    let pad = Int64(kernel / 2)
    b.node(
      "Conv", ["x", "w", "bias"], "c",
      ["pads": .ints([pad, pad, pad, pad]), "group": .int(Int64(groups))])
    try sample.build(&b, channels)
    let graph = try b.finish("y")
    // A coarse grid with an odd zero point, so that many elements land on its ends and near ties.
    let encoding = try Encoding(
      bits: 5, isSigned: false, isSymmetric: false, scales: [0.0437], zeroPoints: [9])
    let encodings = Dictionary(uniqueKeysWithValues: sample.quantized.map { ($0, encoding) })
    let input = try Tensor(random.floats(2 * channels * 63), shape: [2, channels, 7, 9])
    let fused = try Session(graph: graph, quantized: encodings).run(["x": input])
    // Asking for every tensor leaves nothing to fuse.
    let every = graph.nodes.flatMap(\.outputs)
    let separate = try Session(graph: graph, quantized: encodings, extraOutputs: every)
      .run(["x": input])
    let a = try fused["y"]!.floats().map(\.bitPattern)
    let c = try separate["y"]!.floats().map(\.bitPattern)
    let different = zip(a, c).filter { $0 != $1 }.count
    #expect(different == 0, "\(different) of \(a.count) elements differ")
    #expect(Set(a).count > 4)
  }

  @Test func gemmFusesToTheSameBits() throws {
    var random = SeededGenerator(seed: 5)
    var b = GraphBuilder(shape: [6, 40])
    try b.constant("w", random.floats(40 * 30), [30, 40])
    try b.constant("bias", random.floats(30), [30])
    b.node("Gemm", ["x", "w", "bias"], "c", ["transB": .int(1)])
    b.node("Relu", ["c"], "y")
    let graph = try b.finish("y")
    let encoding = try Encoding(
      bits: 8, isSigned: false, isSymmetric: false, scales: [0.031], zeroPoints: [0])
    let input = try Tensor(random.floats(240), shape: [6, 40])
    let fused = try Session(graph: graph, quantized: ["y": encoding]).run(["x": input])
    let separate = try Session(graph: graph, quantized: ["y": encoding], extraOutputs: ["c"])
      .run(["x": input])
    #expect(
      try fused["y"]!.floats().map(\.bitPattern) == separate["y"]!.floats().map(\.bitPattern))
  }

  @Test func roundsToTheGridOfTheEncoding() throws {
    // 1×1 convolution with weight 1: y = relu(x) on a grid of 0.5 with codes 0…7. Ties go to even.
    var b = GraphBuilder(shape: [1, 1, 1, 6])
    try b.constant("w", [1], [1, 1, 1, 1])
    b.node("Conv", ["x", "w"], "c")
    b.node("Relu", ["c"], "y")
    let encoding = try Encoding(
      bits: 3, isSigned: false, isSymmetric: false, scales: [0.5], zeroPoints: [0])
    let session = try Session(graph: b.finish("y"), quantized: ["y": encoding])
    let input = try Tensor([-1, 0.25, 0.75, 1.1, 3.6, 90], shape: [1, 1, 1, 6])
    #expect(try session.run(["x": input])["y"]!.floats() == [0, 0, 1, 1, 3.5, 3.5])
  }
}
