// SPDX-License-Identifier: Apache-2.0
// Operators on cases worked by hand; the conformance test covers many more.

import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import TestSupport
import Testing

@Suite struct OperatorTests {
  /// All numbers here are small integers or dyadic fractions, so that results are exact.
  private func expect(
    _ result: Tensor, _ values: [Float], _ shape: [Int],
    sourceLocation: SourceLocation = #_sourceLocation
  ) throws {
    #expect(result.shape.dimensions == shape, sourceLocation: sourceLocation)
    #expect(try result.floats() == values, sourceLocation: sourceLocation)
  }

  private let picture: ([Float], [Int]) = (
    [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 1, 3, 3]
  )

  @Test func convolutionSumsTheWindow() throws {
    // A window of ones over a padded 3×3 picture: sums of the neighborhoods.
    let ones = try Tensor([Float](repeating: 1, count: 9), shape: [1, 1, 3, 3])
    let result = try runNode("Conv", [picture], constants: [ones], ["pads": .ints([1, 1, 1, 1])])
    try expect(result, [12, 21, 16, 27, 45, 33, 24, 39, 28], [1, 1, 3, 3])
  }

  @Test func convolutionStridesDilatesAndAddsItsBias() throws {
    // Dilation 2 touches the corners and the middles only: 1 + 3 + 7 + 9 = 20, plus 0.5.
    let weights = try Tensor([1, 1, 1, 1], shape: [1, 1, 2, 2])
    let bias = try Tensor([0.5], shape: [1])
    let result = try runNode(
      "Conv", [picture], constants: [weights, bias], ["dilations": .ints([2, 2])])
    try expect(result, [20.5], [1, 1, 1, 1])
    let stepped = try runNode(
      "Conv", [picture], constants: [weights],
      ["strides": .ints([2, 2]), "pads": .ints([0, 0, 1, 1])])
    // Windows at (0,0), (0,2), (2,0), (2,2), the last three half outside.
    try expect(stepped, [12, 9, 15, 9], [1, 1, 2, 2])
  }

  @Test func groupedConvolutionKeepsGroupsApart() throws {
    // Two groups of one channel each, scaled by 2 and by 3.
    let weights = try Tensor([2, 3], shape: [2, 1, 1])
    let result = try runNode(
      "Conv", [([1, 2, 10, 20], [1, 2, 2])], constants: [weights], ["group": .int(2)])
    try expect(result, [2, 4, 30, 60], [1, 2, 2])
  }

  @Test func samePaddingIsUnevenAtTheEnd() throws {
    // Width 4, stride 2, kernel 3: one element of padding, behind (upper) or before (lower).
    let ones = try Tensor([1, 1, 1], shape: [1, 1, 3])
    let input: ([Float], [Int]) = ([1, 2, 3, 4], [1, 1, 4])
    let upper = try runNode(
      "Conv", [input], constants: [ones],
      ["strides": .ints([2]), "auto_pad": .string(Array("SAME_UPPER".utf8))])
    try expect(upper, [6, 7], [1, 1, 2])
    let lower = try runNode(
      "Conv", [input], constants: [ones],
      ["strides": .ints([2]), "auto_pad": .string(Array("SAME_LOWER".utf8))])
    try expect(lower, [3, 9], [1, 1, 2])
  }

  @Test func paddingBeyondTheKernelMakesZeros() throws {
    let weights = try Tensor([1], shape: [1, 1, 1])
    let result = try runNode(
      "Conv", [([5], [1, 1, 1])], constants: [weights], ["pads": .ints([3, 2])])
    try expect(result, [0, 0, 0, 5, 0, 0], [1, 1, 6])
  }

  @Test func transposedConvolutionScatters() throws {
    // Each element spreads [1, 2] at stride 2; the extra element holds the bias.
    let weights = try Tensor([1, 2], shape: [1, 1, 2])
    let bias = try Tensor([1], shape: [1])
    let result = try runNode(
      "ConvTranspose", [([1, 2, 3], [1, 1, 3])], constants: [weights, bias],
      ["strides": .ints([2]), "output_padding": .ints([1])])
    try expect(result, [2, 3, 3, 5, 4, 7, 1], [1, 1, 7])
    let cut = try runNode(
      "ConvTranspose", [([1, 2, 3], [1, 1, 3])], constants: [weights],
      ["strides": .ints([2]), "pads": .ints([1, 1])])
    try expect(cut, [2, 2, 4, 3], [1, 1, 4])
  }

  @Test func matrixProductsTransposeScaleAndBroadcast() throws {
    let a: ([Float], [Int]) = ([1, 2, 3, 4, 5, 6], [2, 3])
    let b = try Tensor([1, 0, 0, 1, 1, 1], shape: [3, 2])
    let c = try Tensor([10, 20], shape: [2])
    // [[1+3, 2+3], [4+6, 5+6]] = [[4, 5], [10, 11]]; halved, plus twice C.
    let result = try runNode(
      "Gemm", [a], constants: [b, c], ["alpha": .float(0.5), "beta": .float(2)])
    try expect(result, [22, 42.5, 25, 45.5], [2, 2])
    let transposed = try Tensor([1, 0, 1, 0, 1, 1], shape: [2, 3])
    let same = try runNode("Gemm", [a], constants: [transposed, c], ["transB": .int(1)])
    try expect(same, [14, 25, 20, 31], [2, 2])
    let batched = try runNode("MatMul", [([1, 2, 3, 4], [2, 1, 2]), ([1, 1], [2])])
    try expect(batched, [3, 7], [2, 1])
  }

  @Test func poolingCountsPaddingAsAsked() throws {
    let kernel: Attributes = ["kernel_shape": .ints([2, 2]), "pads": .ints([1, 1, 0, 0])]
    let maximum = try runNode("MaxPool", [picture], kernel)
    try expect(maximum, [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 1, 3, 3])
    let inside = try runNode("AveragePool", [picture], kernel)
    try expect(inside, [1, 1.5, 2.5, 2.5, 3, 4, 5.5, 6, 7], [1, 1, 3, 3])
    var counted = kernel
    counted["count_include_pad"] = .int(1)
    let all = try runNode("AveragePool", [picture], counted)
    try expect(all, [0.25, 0.75, 1.25, 1.25, 3, 4, 2.75, 6, 7], [1, 1, 3, 3])
  }

  @Test func ceilModeKeepsTheLastWindow() throws {
    let attributes: Attributes = [
      "kernel_shape": .ints([2, 2]), "strides": .ints([2, 2]), "ceil_mode": .int(1),
    ]
    try expect(try runNode("MaxPool", [picture], attributes), [5, 6, 8, 9], [1, 1, 2, 2])
    try expect(try runNode("AveragePool", [picture], attributes), [3, 4.5, 7.5, 9], [1, 1, 2, 2])
  }

  @Test func globalPoolsReduceToOnePixel() throws {
    try expect(try runNode("GlobalAveragePool", [picture]), [5], [1, 1, 1, 1])
    try expect(try runNode("GlobalMaxPool", [picture]), [9], [1, 1, 1, 1])
  }

  @Test func batchNormIsAnAffineMap() throws {
    // Variance 4 without ε: factor gamma/2; x = 3 → (3 − 1)·(2/2) + 5 = 7; x = 8 → (8−0)·(1/2) + 0.
    func vector(_ a: Float, _ b: Float) throws -> Tensor { try Tensor([a, b], shape: [2]) }
    let result = try runNode(
      "BatchNormalization", [([3, 8], [1, 2, 1])],
      constants: [vector(2, 1), vector(5, 0), vector(1, 0), vector(4, 4)], ["epsilon": .float(0)])
    try expect(result, [7, 4], [1, 2, 1])
  }

  @Test func clipBoundsAreAttributesBeforeOpset11() throws {
    let input: ([Float], [Int]) = ([-2, 0.5, 9], [3])
    let bounds: Attributes = ["min": .float(-1), "max": .float(6)]
    try expect(try runNode("Clip", [input], bounds, opset: 10), [-1, 0.5, 6], [3])
    let high = try Tensor([6], shape: [])
    try expect(try runNode("Clip", [input], constants: [nil, high]), [-2, 0.5, 6], [3])
    let low = try Tensor([7], shape: [])
    // The maximum wins where the minimum exceeds it.
    try expect(try runNode("Clip", [input], constants: [low, high]), [6, 6, 6], [3])
  }

  @Test func softmaxBeforeOpset13TakesAllTrailingAxes() throws {
    // Equal elements share evenly: a quarter over two axes of two, a half over the last one.
    let zeros: ([Float], [Int]) = ([0, 0, 0, 0], [1, 2, 2])
    for value in try runNode("Softmax", [zeros], opset: 12).floats() {
      expectClose(value, 0.25, ulps: 2)
    }
    for value in try runNode("Softmax", [zeros]).floats() { expectClose(value, 0.5, ulps: 2) }
  }

  @Test func arithmeticBroadcastsBothOperands() throws {
    let column: ([Float], [Int]) = ([1, 2], [2, 1])
    let row: ([Float], [Int]) = ([10, 20, 30], [3])
    try expect(try runNode("Add", [column, row]), [11, 21, 31, 12, 22, 32], [2, 3])
    try expect(try runNode("Sub", [row, column]), [9, 19, 29, 8, 18, 28], [2, 3])
    try expect(try runNode("Max", [column, row, ([15], [1])]), [15, 20, 30, 15, 20, 30], [2, 3])
  }

  @Test func reductionsTakeAxesFromAttributeOrInput() throws {
    let input: ([Float], [Int]) = ([1, 2, 3, 4, 5, 6], [2, 3])
    let attribute = try runNode("ReduceMean", [input], ["axes": .ints([-1])])
    try expect(attribute, [2, 5], [2, 1])
    let axes = try Tensor([Int64(0)])
    let operand = try runNode("ReduceSum", [input], constants: [axes], ["keepdims": .int(0)])
    try expect(operand, [5, 7, 9], [3])
  }

  @Test func sliceWalksBackward() throws {
    let input: ([Float], [Int]) = ([0, 1, 2, 3, 4], [5])
    func list(_ value: Int64) throws -> Tensor { try Tensor([value]) }
    let result = try runNode(
      "Slice", [input], constants: [list(-1), list(.min), list(0), list(-2)])
    try expect(result, [4, 2, 0], [3])
  }

  @Test func joinsAndTransposes() throws {
    let a: ([Float], [Int]) = ([1, 2, 3, 4], [2, 2])
    try expect(
      try runNode("Concat", [a, ([9, 8], [2, 1])], ["axis": .int(-1)]), [1, 2, 9, 3, 4, 8], [2, 3])
    try expect(try runNode("Transpose", [a]), [1, 3, 2, 4], [2, 2])
  }

  @Test func functionsFollowTheirDefinitions() throws {
    let input: ([Float], [Int]) = ([-4, -1, 0, 1, 4], [5])
    try expect(try runNode("Relu", [input]), [0, 0, 0, 1, 4], [5])
    try expect(try runNode("LeakyRelu", [input], ["alpha": .float(0.5)]), [-2, -0.5, 0, 1, 4], [5])
    try expect(
      try runNode("HardSigmoid", [input], ["alpha": .float(0.25), "beta": .float(0.5)]),
      [0, 0.25, 0.5, 0.75, 1], [5])
    // x·clamp(x/6 + 1/2): −4 → 0, 4 → 4; ±1 → ∓1/3, 2/3 within one rounding of the sixth.
    let swish = try runNode("HardSwish", [input]).floats()
    for (value, expected) in zip(swish, [0, -1 / 3, 0, 2 / 3, 4] as [Float]) {
      expectClose(value, expected, ulps: 4)
    }
    let slope = try Tensor([0.25], shape: [1])
    try expect(try runNode("PRelu", [input], constants: [slope]), [-1, -0.25, 0, 1, 4], [5])
  }

  @Test func quantizedPairRoundsHalfToEven() throws {
    // Scale 1/2, zero point 1: 0.25 is half a step and goes to the even code 0 (+1).
    let scale = try Tensor([0.5], shape: [])
    let zero = try Tensor(elements: [UInt8(1)], .uint8, shape: [])
    var builder = GraphBuilder(shape: [4])
    builder.graph.initializers["s"] = scale
    builder.graph.initializers["z"] = zero
    builder.node("QuantizeLinear", ["x", "s", "z"], "q")
    builder.node("DequantizeLinear", ["q", "s", "z"], "y")
    let graph = try builder.finish("y")
    let input = try Tensor([0.25, 0.75, -9, 1000], shape: [4])
    let result = try Session(graph: graph).run(["x": input])
    #expect(try result["y"]!.floats() == [0, 1, -0.5, 127])
  }

  @Test func shapeArithmeticIsFolded() throws {
    // Reshape to [batch, -1] computed by Shape, Gather, Unsqueeze and Concat.
    var builder = GraphBuilder(shape: [2, 3, 2])
    builder.graph.initializers["zero"] = try Tensor(elements: [Int64(0)], .int64, shape: [])
    builder.graph.initializers["axes"] = try Tensor([Int64(0)])
    builder.graph.initializers["rest"] = try Tensor([Int64(-1)])
    builder.node("Shape", ["x"], "shape")
    builder.node("Gather", ["shape", "zero"], "batch")
    builder.node("Unsqueeze", ["batch", "axes"], "row")
    builder.node("Concat", ["row", "rest"], "target", ["axis": .int(0)])
    builder.node("Reshape", ["x", "target"], "y")
    let values = (0..<12).map(Float.init)
    let result = try Session(graph: builder.finish("y")).run([
      "x": Tensor(values, shape: [2, 3, 2])
    ])
    try expect(result["y"]!, values, [2, 6])
  }
}
