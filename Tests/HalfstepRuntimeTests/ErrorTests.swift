// SPDX-License-Identifier: Apache-2.0
// What callers and models may get wrong ends in an error that names the culprit.

import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import TestSupport
import Testing

@Suite struct ErrorTests {
  private func identity() throws -> Session {
    var b = GraphBuilder(shape: [2, 3])
    b.graph.inputs[0].dimensions = [.symbolic("N"), .fixed(3)]
    b.node("Relu", ["x"], "y")
    return try Session(graph: b.finish("y"))
  }

  @Test func unsupportedOperatorsAreAllNamed() throws {
    var b = GraphBuilder(shape: [2])
    b.node("Mystery", ["x"], "a")
    b.node("Enigma", ["a"], "y")
    let graph = try b.finish("y")
    let error = try #require(failure { _ = try Session(graph: graph) })
    #expect(error.code == .unsupportedOperator)
    #expect(error.message.contains("Mystery") && error.message.contains("Enigma"))
  }

  @Test func unknownTensorsAreNamed() throws {
    var b = GraphBuilder(shape: [2])
    b.node("Relu", ["x"], "y")
    let graph = try b.finish("y")
    let error = try #require(failure { _ = try Session(graph: graph, observed: ["nowhere"]) })
    #expect(error.code == .unknownName)
    #expect(error.message.contains("nowhere"))
  }

  @Test(
    arguments: [
      ([:], HalfstepError.Code.unknownName),
      (["z": [2, 3]], .unknownName),
      (["x": [2]], .shapeMismatch),
      (["x": [2, 4]], .shapeMismatch),
      (["x": [0, 3]], .shapeMismatch),
    ] as [([String: [Int]], HalfstepError.Code)])
  func wrongInputs(_ shapes: [String: [Int]], _ code: HalfstepError.Code) throws {
    let session = try identity()
    var inputs: [String: Tensor] = [:]
    for (name, shape) in shapes {
      inputs[name] = try Tensor([Float](repeating: 0, count: shape.reduce(1, *)), shape: shape)
    }
    let error = try #require(failure { _ = try session.run(inputs) })
    #expect(error.code == code)
    #expect(error.message.contains(shapes.keys.first ?? "x"))
  }

  @Test func wrongTypesAreNamed() throws {
    let x = try Tensor(elements: [Int32](repeating: 0, count: 6), .int32, shape: [2, 3])
    let session = try identity()
    let error = try #require(failure { _ = try session.run(["x": x]) })
    #expect(error.code == .typeMismatch)
    #expect(error.message.contains("'x'"))
  }

  @Test func symbolsStandForOneExtent() throws {
    var b = GraphBuilder(shape: [2])
    b.graph.inputs[0].dimensions = [.symbolic("N")]
    b.graph.inputs.append(ValueInfo(name: "z", dataType: .float32, dimensions: [.symbolic("N")]))
    b.node("Add", ["x", "z"], "y")
    let session = try Session(graph: b.finish("y"))
    let error = try #require(
      failure {
        _ = try session.run(["x": Tensor([1, 2], shape: [2]), "z": Tensor([1], shape: [1])])
      })
    #expect(error.code == .shapeMismatch)
    #expect(error.message.contains("'z'"))
  }

  /// A node that cannot run: operator, shape of the input, shape of the weights, attributes.
  struct Broken: Sendable, CustomTestStringConvertible {
    let testDescription: String
    let opType: String
    var input: [Int] = [1, 4, 8, 8]
    var weights: [Int]? = nil
    var integers: [Int64]? = nil
    var attributes: Attributes = [:]
  }

  static let kernel: Attribute = .ints([2, 2])

  @Test(arguments: [
    Broken(
      testDescription: "stride 0", opType: "Conv", weights: [4, 4, 3, 3],
      attributes: ["strides": .ints([0, 1])]),
    Broken(
      testDescription: "negative dilation", opType: "Conv", weights: [4, 4, 3, 3],
      attributes: ["dilations": .ints([-1, 1])]),
    Broken(
      testDescription: "huge dilation", opType: "Conv", weights: [4, 4, 3, 3],
      attributes: ["dilations": .ints([.max, .max])]),
    Broken(
      testDescription: "negative padding", opType: "Conv", weights: [4, 4, 3, 3],
      attributes: ["pads": .ints([-1, 0, 0, 0])]),
    Broken(
      testDescription: "huge padding", opType: "Conv", weights: [4, 4, 3, 3],
      attributes: ["pads": .ints([1 << 24, 1 << 24, 1 << 24, 1 << 24])]),
    Broken(testDescription: "kernel above input", opType: "Conv", weights: [4, 4, 9, 9]),
    Broken(testDescription: "channels", opType: "Conv", weights: [4, 3, 3, 3]),
    Broken(
      testDescription: "groups", opType: "Conv", weights: [4, 4, 3, 3],
      attributes: ["group": .int(3)]),
    Broken(
      testDescription: "no groups", opType: "Conv", weights: [4, 4, 3, 3],
      attributes: ["group": .int(0)]),
    Broken(testDescription: "weights of rank 3", opType: "Conv", weights: [4, 4, 3]),
    Broken(testDescription: "empty weights", opType: "Conv", weights: [0, 4, 3, 3]),
    Broken(
      testDescription: "kernel_shape", opType: "Conv", weights: [4, 4, 3, 3],
      attributes: ["kernel_shape": .ints([2, 2])]),
    Broken(
      testDescription: "auto_pad", opType: "Conv", weights: [4, 4, 3, 3],
      attributes: ["auto_pad": .string(Array("SIDEWAYS".utf8))]),
    Broken(
      testDescription: "groups of a transposed one", opType: "ConvTranspose",
      weights: [4, 3, 1, 1],
      attributes: ["group": .int(.max)]),
    Broken(testDescription: "no kernel", opType: "MaxPool"),
    Broken(
      testDescription: "pool padding", opType: "MaxPool",
      attributes: ["kernel_shape": kernel, "pads": .ints([2, 2, 2, 2])]),
    Broken(
      testDescription: "pool of a vector", opType: "AveragePool", input: [4],
      attributes: ["kernel_shape": .ints([1])]),
    Broken(
      testDescription: "softmax axis", opType: "Softmax", attributes: ["axis": .int(4)]),
    Broken(
      testDescription: "flatten axis", opType: "Flatten", attributes: ["axis": .int(.min)]),
    Broken(
      testDescription: "perm", opType: "Transpose", attributes: ["perm": .ints([0, 1, 1, 2])]),
    Broken(testDescription: "reshape", opType: "Reshape", integers: [3, -1]),
    Broken(testDescription: "reshape twice -1", opType: "Reshape", integers: [-1, -1]),
    Broken(testDescription: "reshape negative", opType: "Reshape", integers: [-2, 4]),
    Broken(
      testDescription: "reshape overflow", opType: "Reshape", integers: [1 << 62, 1 << 62, -1]),
    Broken(testDescription: "expand", opType: "Expand", integers: [3, 3, 3, 3]),
    Broken(testDescription: "expand too far", opType: "Expand", integers: [1 << 46, 1, 1, 1, 1]),
    Broken(testDescription: "tile", opType: "Tile", integers: [.max, .max, 2, 2]),
    Broken(testDescription: "gemm", opType: "Gemm", input: [2, 3], weights: [4, 5]),
    Broken(testDescription: "matmul", opType: "MatMul", input: [2, 3], weights: [4, 5]),
    Broken(testDescription: "broadcast", opType: "Add", input: [2, 3], weights: [4]),
    Broken(testDescription: "squeeze", opType: "Squeeze", integers: [1]),
    Broken(testDescription: "unsqueeze", opType: "Unsqueeze", integers: [9]),
    Broken(testDescription: "pad", opType: "Pad", integers: [.min, 0, 0, 0, 0, 0, 0, 0]),
    Broken(testDescription: "crop", opType: "Pad", integers: [0, -9, 0, 0, 0, 0, 0, 0]),
    Broken(testDescription: "split", opType: "Split", integers: [.max, .max]),
    Broken(testDescription: "reduce", opType: "ReduceSum", integers: [7]),
    Broken(
      testDescription: "gather", opType: "Gather", integers: [9], attributes: ["axis": .int(1)]),
    Broken(
      testDescription: "depth", opType: "DepthToSpace", attributes: ["blocksize": .int(3)]),
    Broken(testDescription: "missing input", opType: "Add"),
  ])
  func brokenNodesAreNamed(_ broken: Broken) throws {
    var b = GraphBuilder(shape: broken.input)
    var inputs = ["x"]
    if let weights = broken.weights {
      let count = weights.reduce(1, *)
      inputs.append(try b.constant("w", [Float](repeating: 1, count: count), weights))
    }
    if let integers = broken.integers {
      b.graph.initializers["i"] = try Tensor(integers)
      inputs.append("i")
    }
    b.node(broken.opType, inputs, "culprit", broken.attributes)
    let graph = try b.finish("culprit")
    let count = broken.input.reduce(1, *)
    let x = try Tensor([Float](repeating: 1, count: count), shape: broken.input)
    let error = try #require(failure { _ = try Session(graph: graph).run(["x": x]) })
    #expect(error.message.contains("culprit"), "\(error.message)")
    #expect(error.code != .internalError, "\(error.message)")
  }

  @Test func hugeIntermediatesAreRefusedBeforeAllocation() throws {
    // Each of the tensors would take 2^44 bytes.
    var b = GraphBuilder(shape: [1])
    b.graph.initializers["shape"] = try Tensor([Int64(1) << 21, 1 << 21])
    b.node("Expand", ["x", "shape"], "wide")
    b.node("Relu", ["wide"], "y")
    let graph = try b.finish("y")
    let x = try Tensor([1], shape: [1])
    let error = try #require(failure { _ = try Session(graph: graph).run(["x": x]) })
    #expect(error.code == .outOfMemory)
  }
}
