// SPDX-License-Identifier: Apache-2.0
// Equalization leaves the function of random networks alone and evens out what it should.

import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics
import TestSupport
import Testing

@Suite struct EqualizationPropertyTests {
  typealias Array64 = ReferenceEvaluator.Array64

  /// A random network: its name, and how it is built.
  struct Network: Sendable, CustomStringConvertible {
    let description: String
    let sets: Int
    var equalizesResiduals = false
    let build: @Sendable (inout GraphBuilder, inout SeededGenerator) throws -> Void

    init(
      _ description: String, sets: Int, residuals: Bool = false,
      _ build: @escaping @Sendable (inout GraphBuilder, inout SeededGenerator) throws -> Void
    ) {
      self.description = description
      self.sets = sets
      self.equalizesResiduals = residuals
      self.build = build
    }
  }

  /// Adds a layer whose channels have ranges that differ by up to 2¹⁰.
  private static func layer(
    _ b: inout GraphBuilder, _ random: inout SeededGenerator, _ opType: String, _ input: String,
    _ output: String, _ shape: [Int], group: Int = 1, pads: [Int64] = [0, 0, 0, 0]
  ) throws {
    let spread = (0..<shape[0]).map { _ in
      Float(sign: .plus, exponent: Int.random(in: -5...5, using: &random), significand: 1)
    }
    let inner = shape.dropFirst().reduce(1, *)
    let weight = (0..<shape[0] * inner).map {
      Float.random(in: -1...1, using: &random) * spread[$0 / inner]
    }
    try b.constant("\(output).w", weight, shape)
    let channels =
      switch opType {
      case "Conv": shape[0]
      case "ConvTranspose": shape[1] * group
      default: shape[1]
      }
    try b.constant("\(output).b", random.floats(channels), [channels])
    switch opType {
    case "MatMul":
      b.node("MatMul", [input, "\(output).w"], "\(output).product")
      b.node("Add", ["\(output).product", "\(output).b"], output)
    case "Gemm": b.node("Gemm", [input, "\(output).w", "\(output).b"], output)
    default:
      b.node(
        opType, [input, "\(output).w", "\(output).b"], output,
        ["group": .int(Int64(group)), "pads": .ints(pads)])
    }
  }

  static let networks: [Network] = [
    Network("inverted bottleneck with Relu6", sets: 2) { b, r in
      try b.constant("low", [0], [])
      try b.constant("high", [2], [])
      try layer(&b, &r, "Conv", "x", "expand", [6, 4, 1, 1])
      b.node("Clip", ["expand", "low", "high"], "clip1")
      try layer(&b, &r, "Conv", "clip1", "deep", [6, 1, 3, 3], group: 6, pads: [1, 1, 1, 1])
      b.node("Clip", ["deep", "low", "high"], "clip2")
      try layer(&b, &r, "Conv", "clip2", "y", [3, 6, 1, 1])
    },
    Network("groups, depthwise multiplier 2, PRelu, LeakyRelu", sets: 3) { b, r in
      try layer(&b, &r, "Conv", "x", "a", [6, 2, 3, 3], group: 2, pads: [1, 1, 1, 1])
      try b.constant("slope", r.floats(6), [6, 1, 1])
      b.node("PRelu", ["a", "slope"], "pa")
      try layer(&b, &r, "Conv", "pa", "m", [12, 1, 1, 1], group: 6)
      b.node("LeakyRelu", ["m"], "lm", ["alpha": .float(0.2)])
      try layer(&b, &r, "Conv", "lm", "g", [4, 6, 1, 1], group: 2)
      b.node("Identity", ["g"], "ig")
      try layer(&b, &r, "Conv", "ig", "y", [2, 4, 1, 1])
    },
    Network("transposed convolutions", sets: 2) { b, r in
      try layer(&b, &r, "ConvTranspose", "x", "a", [4, 3, 2, 2])
      b.node("Relu", ["a"], "ra")
      try layer(&b, &r, "Conv", "ra", "c", [4, 3, 1, 1])
      b.node("Relu", ["c"], "rc")
      try layer(&b, &r, "ConvTranspose", "rc", "y", [4, 2, 2, 2], group: 2)
    },
    Network("pooling, flatten, Gemm, MatMul", sets: 3) { b, r in
      try layer(&b, &r, "Conv", "x", "a", [5, 4, 1, 1])
      b.node("Relu", ["a"], "ra")
      b.node("MaxPool", ["ra"], "p", ["kernel_shape": .ints([2, 2]), "strides": .ints([2, 2])])
      b.node("Flatten", ["p"], "f")
      try layer(&b, &r, "Gemm", "f", "g", [20, 6])
      b.node("Relu", ["g"], "rg")
      try layer(&b, &r, "MatMul", "rg", "m", [6, 4])
      try layer(&b, &r, "MatMul", "m", "y", [4, 3])
    },
    Network("fire module: two readers, Concat, global pooling", sets: 3) { b, r in
      try layer(&b, &r, "Conv", "x", "squeeze", [3, 4, 1, 1])
      b.node("Relu", ["squeeze"], "s")
      try layer(&b, &r, "Conv", "s", "e1", [4, 3, 1, 1])
      try layer(&b, &r, "Conv", "s", "e3", [5, 3, 3, 3], pads: [1, 1, 1, 1])
      b.node("Relu", ["e1"], "r1")
      b.node("Concat", ["r1", "e3"], "cat", ["axis": .int(1)])
      b.node("Relu", ["cat"], "rcat")
      b.node("GlobalAveragePool", ["rcat"], "pool")
      try layer(&b, &r, "Conv", "pool", "y", [2, 9, 1, 1])
    },
    Network("squeeze and excitation", sets: 2) { b, r in
      try layer(&b, &r, "Conv", "x", "a", [4, 4, 3, 3], pads: [1, 1, 1, 1])
      b.node("Relu", ["a"], "ra")
      b.node("GlobalAveragePool", ["ra"], "pool")
      try layer(&b, &r, "Conv", "pool", "down", [2, 4, 1, 1])
      b.node("Relu", ["down"], "rd")
      try layer(&b, &r, "Conv", "rd", "up", [4, 2, 1, 1])
      b.node("Sigmoid", ["up"], "gate")
      b.node("Mul", ["gate", "ra"], "gated")
      try layer(&b, &r, "Conv", "gated", "y", [3, 4, 1, 1])
    },
    Network("residual, additions end chains", sets: 1) { b, r in try residual(&b, &r) },
    Network("residual as one stream", sets: 3, residuals: true) { b, r in try residual(&b, &r) },
  ]

  private static func residual(_ b: inout GraphBuilder, _ r: inout SeededGenerator) throws {
    try layer(&b, &r, "Conv", "x", "stem", [4, 4, 1, 1])
    try layer(&b, &r, "Conv", "stem", "a", [6, 4, 3, 3], pads: [1, 1, 1, 1])
    b.node("Relu", ["a"], "ra")
    try layer(&b, &r, "Conv", "ra", "b", [4, 6, 1, 1])
    b.node("Add", ["b", "stem"], "sum")
    b.node("Relu", ["sum"], "rsum")
    try layer(&b, &r, "Conv", "rsum", "y", [3, 4, 1, 1])
  }

  @Test(arguments: networks) func functionStaysTheSame(_ network: Network) throws {
    for seed in 1...4 as ClosedRange<UInt64> {
      var random = SeededGenerator(seed: seed)
      var b = GraphBuilder(shape: [2, 4, 4, 4])
      try network.build(&b, &random)
      let graph = try b.finish("y")
      let x = Array64([2, 4, 4, 4], random.floats(128, in: -3...3).map(Double.init))
      let expected = try #require(try ReferenceEvaluator.run(graph, ["x": x])["y"])
      var equalized = graph
      var options = CrossLayerEqualization.Options()
      options.equalizesResiduals = network.equalizesResiduals
      options.maximumIterations = 200
      let report = try CrossLayerEqualization(options: options).apply(to: &equalized)
      try equalized.validateAndSort()
      #expect(report.sets.count == network.sets)
      #expect(report.isConverged)
      let factors = report.sets.flatMap { $0.factors.flatMap { $0 } }
      #expect(factors.allSatisfy { $0.isFinite && $0 >= 1e-3 && $0 <= 1e3 })
      #expect(factors.contains { $0 < 0.9 || $0 > 1.1 })
      let actual = try #require(try ReferenceEvaluator.run(equalized, ["x": x])["y"])
      // Each weight, bias and bound is rounded once, by 2⁻²⁴ of itself at most; over four layers the
      // relative errors add up to less than 2⁻²⁰ of the largest sum of magnitudes, which stays within
      // 2⁶ times the largest output for these networks.
      let largest = expected.values.reduce(0) { max($0, abs($1)) }
      for (a, e) in zip(actual.values, expected.values) {
        #expect(abs(a - e) <= 0x1p-14 * largest)
      }
    }
  }

  @Test func writtenAndReadRangesBecomeEqual() throws {
    var random = SeededGenerator(seed: 5)
    var b = GraphBuilder(shape: [2, 4, 4, 4])
    try Self.networks[0].build(&b, &random)
    var graph = try b.finish("y")
    var options = CrossLayerEqualization.Options()
    options.tolerance = 1e-4
    options.maximumIterations = 200
    #expect(try CrossLayerEqualization(options: options).apply(to: &graph).isConverged)
    func range(_ name: String, stride: Int, _ channel: Int) throws -> Float {
      let values = try #require(graph.initializers[name]).floats()
      return values.indices.filter { $0 / stride % 6 == channel }
        .map { abs(values[$0]) }.max() ?? 0
    }
    var (firstRatio, secondRatio): (Float?, Float?)
    for channel in 0..<6 {
      // expand [6, 4], deep [6, 3·3], y [3, 6]: what writes a channel against what reads it.
      let (a, b) = (
        try range("expand.w", stride: 4, channel), try range("deep.w", stride: 9, channel)
      )
      let c = try range("y.w", stride: 1, channel)
      // Rounds end when the factors of a tensor move by less than 10⁻⁴ against each other; ranges agree
      // within some times that, apart from one ratio for each pair of layers.
      firstRatio = firstRatio ?? a / b
      secondRatio = secondRatio ?? b / c
      expectClose(a / b, firstRatio ?? 0, relative: 1e-2)
      expectClose(b / c, secondRatio ?? 0, relative: 1e-2)
    }
  }
}
