// SPDX-License-Identifier: Apache-2.0
// Batch-norm folding: hand-worked cases, the function preserved, what must not fold, errors.

import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics
import TestSupport
import Testing

@Suite struct BatchNormFoldingTests {
  typealias Array64 = ReferenceEvaluator.Array64

  private func floats(_ graph: Graph, _ name: String) throws -> [Float] {
    try #require(graph.initializers[name]).floats()
  }

  /// Folds and expects every output to stay the same up to the rounding of the new parameters: each of
  /// the `depth` products and sums moves by at most 2⁻²³ of the largest magnitude on its way.
  private func expectUnchanged(
    _ graph: Graph, _ shape: [Int], depth: Double = 256,
    sourceLocation: SourceLocation = #_sourceLocation
  ) throws -> (Graph, [BatchNormFolding.Fold]) {
    var random = SeededGenerator(seed: 7)
    let x = Array64(shape, random.floats(shape.reduce(1, *), in: -2...2).map(Double.init))
    let before = try ReferenceEvaluator.run(graph, ["x": x])
    var folded = graph
    let folds = try BatchNormFolding().apply(to: &folded)
    try folded.validateAndSort()
    let after = try ReferenceEvaluator.run(folded, ["x": x])
    for output in graph.outputs {
      let (a, b) = (try #require(before[output.name]), try #require(after[output.name]))
      #expect(a.shape == b.shape, sourceLocation: sourceLocation)
      let largest = a.values.reduce(1) { max($0, abs($1)) }
      for (u, v) in zip(a.values, b.values) {
        #expect(abs(u - v) <= depth * 0x1p-23 * largest, sourceLocation: sourceLocation)
      }
    }
    return (folded, folds)
  }

  @Test func backwardFoldWorkedByHand() throws {
    // sigma = √(variance + epsilon) = 2 and 4, so s = gamma/sigma = 1.5 and −0.5.
    // W' = [2·1.5, 8·(−0.5)] = [3, −4]; b' = beta + (b − mean)·s = [1 + (1−3)·1.5, 2 + (0−4)·(−0.5)].
    var b = GraphBuilder(shape: [1, 1, 1, 1])
    try b.constant("w", [2, 8], [2, 1, 1, 1])
    try b.constant("b", [1, 0], [2])
    b.node("Conv", ["x", "w", "b"], "conv")
    try b.batchNorm("conv", "norm", [[3, -2], [1, 2], [3, 4], [3.75, 15.75]], epsilon: 0.25)
    var graph = try b.finish("norm")
    let folds = try BatchNormFolding().apply(to: &graph)
    #expect(folds == [.init(layer: "conv", batchNorm: "norm", isForward: false)])
    #expect(graph.nodes.map(\.opType) == ["Conv"])
    #expect(graph.nodes[0].outputs == ["norm"])
    #expect(try floats(graph, "w") == [3, -4])
    #expect(try floats(graph, "b") == [-2, 4])
    #expect(Array(graph.initializers.keys) == ["w", "b"])
    let recorded = try #require(graph.foldedBatchNorms["norm"])
    #expect(recorded.gamma == [3, -2])
    #expect(recorded.beta == [1, 2])
  }

  @Test func forwardFoldWorkedByHand() throws {
    // s = 4/2 = 2, shift = beta − mean·s = 5 − 1·2 = 3; the kernel's sum is 1+2+3+4 = 10.
    // W' = 2·W, and the missing bias becomes 10·3 = 30.
    var b = GraphBuilder(shape: [1, 1, 2, 2])
    try b.batchNorm("x", "norm", [[4], [5], [1], [3]], epsilon: 1)
    try b.constant("w", [1, 2, 3, 4], [1, 1, 2, 2])
    b.node("Conv", ["norm", "w"], "conv")
    var graph = try b.finish("conv")
    let folds = try BatchNormFolding().apply(to: &graph)
    #expect(folds == [.init(layer: "conv", batchNorm: "norm", isForward: true)])
    #expect(graph.nodes[0].inputs == ["x", "w", "conv.bias"])
    #expect(try floats(graph, "w") == [2, 4, 6, 8])
    #expect(try floats(graph, "conv.bias") == [30])
    #expect(graph.foldedBatchNorms.isEmpty)
  }

  @Test func remainingBatchNormBecomesScaleAndShift() throws {
    // s = 3/√(3+1) = 1.5; the stored scale is 1.5·√(1+1) so that epsilon cancels; shift = 2 − 4·1.5.
    var b = GraphBuilder(shape: [1, 1, 1, 1])
    try b.batchNorm("x", "norm", [[3], [2], [4], [3]], epsilon: 1)
    let graph = try b.finish("norm")
    let (rewritten, folds) = try expectUnchanged(graph, [1, 1, 1, 1])
    #expect(folds.isEmpty)
    #expect(try floats(rewritten, "norm.gamma") == [Float(1.5 * 2.0.squareRoot())])
    #expect(try floats(rewritten, "norm.beta") == [-4])
    #expect(try floats(rewritten, "norm.mean") == [0])
    #expect(try floats(rewritten, "norm.variance") == [1])
    // Done again, nothing moves.
    var again = rewritten
    try BatchNormFolding().apply(to: &again)
    #expect(try floats(again, "norm.gamma") == floats(rewritten, "norm.gamma"))
  }

  /// A layer, its attributes, its weight's shape and whether a batch norm behind it folds.
  struct Layer: Sendable, CustomStringConvertible {
    let opType: String
    let group: Int
    let weight: [Int]
    let bias: Bool
    let folds: Bool
    var description: String { "\(opType) \(weight) groups \(group) bias \(bias)" }
  }

  @Test(arguments: [
    Layer(opType: "Conv", group: 1, weight: [5, 4, 3, 3], bias: true, folds: true),
    Layer(opType: "Conv", group: 1, weight: [5, 4, 3, 3], bias: false, folds: true),
    Layer(opType: "Conv", group: 2, weight: [6, 2, 1, 1], bias: true, folds: true),
    Layer(opType: "Conv", group: 4, weight: [8, 1, 3, 3], bias: false, folds: true),
    Layer(opType: "ConvTranspose", group: 1, weight: [4, 3, 2, 2], bias: true, folds: true),
    Layer(opType: "ConvTranspose", group: 4, weight: [4, 2, 2, 2], bias: false, folds: true),
    Layer(opType: "ConvTranspose", group: 2, weight: [4, 3, 2, 2], bias: true, folds: false),
  ]) func backwardFoldKeepsTheFunction(_ layer: Layer) throws {
    var random = SeededGenerator(seed: 11)
    var b = GraphBuilder(shape: [2, 4, 5, 5])
    try b.constant("w", random.floats(layer.weight.reduce(1, *)), layer.weight)
    let channels = layer.opType == "Conv" ? layer.weight[0] : layer.weight[1] * layer.group
    var inputs = ["x", "w"]
    if layer.bias { inputs.append(try b.constant("b", random.floats(channels), [channels])) }
    b.node(layer.opType, inputs, "layer", ["group": .int(Int64(layer.group))])
    try b.batchNorm("layer", "norm", GraphBuilder.randomBatchNorm(channels, &random))
    b.node("Relu", ["norm"], "y")
    let (folded, _) = try expectUnchanged(try b.finish("y"), [2, 4, 5, 5])
    #expect(folded.nodes.contains { $0.opType == "BatchNormalization" } == !layer.folds)
  }

  /// A Conv behind a batch norm: attributes, and whether the batch norm may fold into it.
  struct Forward: Sendable {
    let weight: [Int]
    let pads: [Int64]
    let group: Int64
    let folds: Bool
  }

  @Test(arguments: [
    Forward(weight: [3, 4, 3, 3], pads: [0, 0, 0, 0], group: 1, folds: true),
    Forward(weight: [3, 4, 3, 3], pads: [0, 0, 1, 1], group: 1, folds: false),
    Forward(weight: [4, 2, 3, 3], pads: [0, 0, 0, 0], group: 2, folds: false),
  ]) func forwardFoldNeedsNoPaddingAndNoGroups(_ forward: Forward) throws {
    var random = SeededGenerator(seed: 13)
    var b = GraphBuilder(shape: [1, 4, 5, 5])
    try b.batchNorm("x", "norm", GraphBuilder.randomBatchNorm(4, &random))
    try b.constant("w", random.floats(forward.weight.reduce(1, *)), forward.weight)
    b.node(
      "Conv", ["norm", "w"], "y",
      ["pads": .ints(forward.pads), "group": .int(forward.group)])
    let (folded, folds) = try expectUnchanged(try b.finish("y"), [1, 4, 5, 5])
    #expect(folds.map(\.isForward) == (forward.folds ? [true] : []))
    #expect(folded.nodes.count == (forward.folds ? 1 : 2))
  }

  @Test(arguments: [(true, Float(1), Float(1)), (false, 0.5, 2), (true, 2, 0)])
  func gemmFoldsBothWays(transposed: Bool, alpha: Float, beta: Float) throws {
    var random = SeededGenerator(seed: 17)
    var b = GraphBuilder(shape: [3, 6])
    try b.batchNorm("x", "before", GraphBuilder.randomBatchNorm(6, &random))
    try b.constant("w", random.floats(30), transposed ? [5, 6] : [6, 5])
    try b.constant("b", random.floats(5), [1, 5])
    b.node(
      "Gemm", ["before", "w", "b"], "gemm",
      ["transB": .int(transposed ? 1 : 0), "alpha": .float(alpha), "beta": .float(beta)])
    try b.batchNorm("gemm", "y", GraphBuilder.randomBatchNorm(5, &random))
    let (folded, folds) = try expectUnchanged(try b.finish("y"), [3, 6])
    #expect(folds.map(\.isForward) == [false, true])
    #expect(folded.nodes.map(\.opType) == ["Gemm"])
  }

  @Test func batchNormFoldsThroughFlatten() throws {
    var random = SeededGenerator(seed: 19)
    var b = GraphBuilder(shape: [2, 3, 2, 2])
    try b.batchNorm("x", "norm", GraphBuilder.randomBatchNorm(3, &random))
    b.node("Flatten", ["norm"], "flat")
    try b.constant("w", random.floats(24), [2, 12])
    b.node("Gemm", ["flat", "w"], "y", ["transB": .int(1)])
    let (folded, folds) = try expectUnchanged(try b.finish("y"), [2, 3, 2, 2])
    #expect(folds == [.init(layer: "y", batchNorm: "norm", isForward: true)])
    #expect(folded.nodes.map(\.opType) == ["Flatten", "Gemm"])
  }

  @Test func matMulTakesItsBiasFromTheAddOrBecomesGemm() throws {
    var random = SeededGenerator(seed: 23)
    var b = GraphBuilder(shape: [3, 4])
    try b.constant("w1", random.floats(20), [4, 5])
    b.node("MatMul", ["x", "w1"], "product")
    try b.constant("b1", random.floats(5), [5])
    b.node("Add", ["b1", "product"], "sum")
    try b.batchNorm("sum", "middle", GraphBuilder.randomBatchNorm(5, &random))
    try b.constant("w2", random.floats(10), [5, 2])
    b.node("MatMul", ["middle", "w2"], "last")
    try b.batchNorm("last", "y", GraphBuilder.randomBatchNorm(2, &random))
    let (folded, folds) = try expectUnchanged(try b.finish("y"), [3, 4])
    #expect(folds.map(\.layer) == ["product", "last"])
    #expect(folded.nodes.map(\.opType) == ["MatMul", "Add", "Gemm"])
    #expect(folded.foldedBatchNorms.keys.contains("middle"))
  }

  @Test func matMulOfRank3StaysApart() throws {
    // The batch norm works on axis 1, MatMul's channels are on axis 2: same extent, other meaning.
    var random = SeededGenerator(seed: 29)
    var b = GraphBuilder(shape: [2, 3, 3])
    try b.constant("w", random.floats(9), [3, 3])
    b.node("MatMul", ["x", "w"], "product")
    try b.batchNorm("product", "y", GraphBuilder.randomBatchNorm(3, &random))
    let (_, folds) = try expectUnchanged(try b.finish("y"), [2, 3, 3])
    #expect(folds.isEmpty)
  }

  @Test func sharedWeightIsClonedForTheLayerThatFolds() throws {
    var random = SeededGenerator(seed: 31)
    var b = GraphBuilder(shape: [1, 2, 3, 3])
    try b.constant("w", random.floats(4), [2, 2, 1, 1])
    b.node("Conv", ["x", "w"], "first")
    try b.batchNorm("first", "middle", GraphBuilder.randomBatchNorm(2, &random))
    b.node("Relu", ["middle"], "relu")
    b.node("Conv", ["relu", "w"], "y")
    let original = try b.finish("y")
    let (folded, folds) = try expectUnchanged(original, [1, 2, 3, 3])
    #expect(folds.count == 1)
    #expect(folded.nodes[0].inputs[1] != "w")
    #expect(folded.nodes[2].inputs[1] == "w")
    #expect(try floats(folded, "w") == floats(original, "w"))
  }

  @Test func sharedBatchNormParametersStayWithTheOther() throws {
    // Both read the same four constants; one folds, the other is rewritten in its own copies.
    var random = SeededGenerator(seed: 37)
    var b = GraphBuilder(shape: [1, 2, 3, 3])
    try b.batchNorm("x", "alone", GraphBuilder.randomBatchNorm(2, &random))
    b.node("Relu", ["alone"], "relu")
    try b.constant("w", random.floats(4), [2, 2, 1, 1])
    b.node("Conv", ["relu", "w"], "conv")
    b.node(
      "BatchNormalization", ["conv"] + ["gamma", "beta", "mean", "variance"].map { "alone.\($0)" },
      "y")
    let (folded, folds) = try expectUnchanged(try b.finish("y"), [1, 2, 3, 3])
    #expect(folds.map(\.batchNorm) == ["y"])
    #expect(folded.nodes.count == 3)
  }

  @Test func severalBatchNormsInARowFold() throws {
    var random = SeededGenerator(seed: 41)
    var b = GraphBuilder(shape: [1, 2, 3, 3])
    try b.constant("w", random.floats(4), [2, 2, 1, 1])
    try b.batchNorm("x", "a", GraphBuilder.randomBatchNorm(2, &random))
    try b.batchNorm("a", "b", GraphBuilder.randomBatchNorm(2, &random))
    b.node("Conv", ["b", "w"], "conv")
    try b.batchNorm("conv", "c", GraphBuilder.randomBatchNorm(2, &random))
    try b.batchNorm("c", "y", GraphBuilder.randomBatchNorm(2, &random))
    let (folded, folds) = try expectUnchanged(try b.finish("y"), [1, 2, 3, 3])
    #expect(folds.map(\.batchNorm) == ["c", "y", "b", "a"])
    #expect(folded.nodes.map(\.opType) == ["Conv"])
  }

  @Test func tensorWithAnotherUseIsNoNeighbor() throws {
    var random = SeededGenerator(seed: 43)
    for isOutput in [false, true] {
      var b = GraphBuilder(shape: [1, 2, 3, 3])
      try b.constant("w", random.floats(4), [2, 2, 1, 1])
      b.node("Conv", ["x", "w"], "conv")
      try b.batchNorm("conv", "norm", GraphBuilder.randomBatchNorm(2, &random))
      b.node("Add", ["norm", isOutput ? "norm" : "conv"], "y")
      let graph = isOutput ? try b.finish("y", "conv") : try b.finish("y")
      #expect(try expectUnchanged(graph, [1, 2, 3, 3]).1.isEmpty)
    }
  }

  @Test func trainingModeStaysUntouched() throws {
    var b = GraphBuilder(shape: [1, 1, 1, 1])
    try b.constant("w", [2], [1, 1, 1, 1])
    b.node("Conv", ["x", "w"], "conv")
    try b.batchNorm("conv", "y", [[3], [1], [4], [2]])
    b.graph.update(at: 1) { $0.attributes["training_mode"] = .int(1) }
    var graph = try b.finish("y")
    #expect(try BatchNormFolding().apply(to: &graph).isEmpty)
    #expect(try floats(graph, "y.mean") == [4])
  }

  @Test(arguments: [
    ([[1], [1], [.nan], [1]] as [[Float]], "mean", HalfstepError.Code.nonFiniteValue),
    ([[1], [1], [1], [-1]], "variance", .nonFiniteValue),
    ([[1], [1], [1], [.infinity]], "variance", .nonFiniteValue),
    ([[1], [1, 1], [1], [1]], "bias", .shapeMismatch),
    ([[3e38], [1], [1], [1e-9]], "scale and shift", .nonFiniteValue),
  ]) func badParametersAreNamed(
    _ parameters: [[Float]], _ what: String, _ code: HalfstepError.Code
  ) throws {
    var b = GraphBuilder(shape: [1, 1, 1, 1])
    try b.batchNorm("x", "norm", parameters, epsilon: 1e-12)
    let original = try b.finish("norm")
    var graph = original
    let error = #expect(throws: HalfstepError.self) { try BatchNormFolding().apply(to: &graph) }
    #expect(error?.code == code)
    #expect(error?.node == "norm")
    #expect(error?.message.contains(what) == true)
    #expect(graph.initializers.keys == original.initializers.keys)
  }

  @Test func badWeightIsNamedAndLeavesTheGraphAlone() throws {
    for (weight, channels) in [([Float.nan, 1], 2), ([1, 1], 3)] {
      var random = SeededGenerator(seed: 47)
      var b = GraphBuilder(shape: [1, 1, 1, 1])
      try b.constant("w", weight, [2, 1, 1, 1])
      b.node("Conv", ["x", "w"], "conv")
      try b.batchNorm("conv", "y", GraphBuilder.randomBatchNorm(channels, &random))
      var graph = try b.finish("y")
      let error = #expect(throws: HalfstepError.self) { try BatchNormFolding().apply(to: &graph) }
      #expect(error?.node == (channels == 2 ? "conv" : "y"))
      #expect(graph.nodes.count == 2)
      #expect(graph.foldedBatchNorms.isEmpty)
    }
  }
}
