// SPDX-License-Identifier: Apache-2.0
// Quantize-dequantize models.

import Foundation
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics
import ONNXProto
import Testing

@Suite struct QDQModelTests {
  private func unsigned(_ scale: Float, _ zero: Int32, bits: Int = 8) throws -> Encoding {
    try Encoding(
      bits: bits, isSigned: false, isSymmetric: false, scales: [scale], zeroPoints: [zero])
  }

  private func weights(
    _ scales: [Float], bits: Int = 8, strict: Bool = false, granularity: Granularity? = nil
  ) throws -> Encoding {
    try Encoding(
      bits: bits, isSigned: true, isSymmetric: true, isStrict: strict,
      granularity: granularity ?? (scales.count == 1 ? .perTensor : .perChannel(axis: 0)),
      scales: scales, zeroPoints: [Int32](repeating: 0, count: scales.count))
  }

  /// Encodings for `sampleModel`: x, y and w.
  private func sampleTable() throws -> EncodingTable {
    var table = EncodingTable()
    table.activations["x"] = try unsigned(0.5, 128)
    table.activations["y"] = try unsigned(0.25, 0)
    table.parameters["w"] = try weights([0.5, 0.25])
    return table
  }

  private func producer(_ graph: Graph, _ name: String) throws -> Node {
    try #require(graph.nodes.first { $0.outputs.contains(name) })
  }

  private func bytes(_ tensor: Tensor?) throws -> [UInt8] {
    let tensor = try #require(tensor)
    defer { withExtendedLifetime(tensor) {} }
    return Array(
      UnsafeRawBufferPointer(start: tensor.storage.baseAddress, count: tensor.byteCount))
  }

  @Test func everyEntryGetsAPair() throws {
    let graph = try QDQModel.make(from: load(sampleModel()), encodings: sampleTable())
    #expect(
      graph.nodes.map(\.opType) == [
        "QuantizeLinear", "DequantizeLinear", "QuantizeLinear", "DequantizeLinear", "Conv", "Relu",
        "QuantizeLinear", "DequantizeLinear",
      ])
    #expect(Set(graph.nodes.map(\.name)).count == graph.nodes.count)
    let conv = try producer(graph, "c")
    #expect(conv.inputs == ["x_qdq", "w_qdq", "b"])
    #expect(try producer(graph, "x_qdq").inputs == ["x_q", "x_scale", "x_zero_point"])
    #expect(graph.inputs.map(\.name) == ["x"])
    #expect(graph.outputs.map(\.name) == ["y"])
    // The output keeps its name on the last node of its pair.
    #expect(try producer(graph, "y").opType == "DequantizeLinear")
    #expect(try producer(graph, "w_q").intAttribute("axis") == 0)
    #expect(graph.initializers["x_zero_point"]?.dataType == .uint8)
    #expect(graph.initializers["x_zero_point"]?.shape == .scalar)
    #expect(graph.initializers["w_zero_point"]?.dataType == .int8)
    #expect(graph.initializers["w_zero_point"]?.shape.dimensions == [2])
    #expect(graph.opset == 17)
    // w = [1, −0.5, 0.25, 2], scales 0.5 and 0.25: all but nothing is on the grid already.
    #expect(try graph.initializers["w"]?.floats() == [1, -0.5, 0.25, 2])
  }

  @Test func constantsAreStoredAsCodes() throws {
    var options = QDQModel.Options()
    options.prequantizesConstants = true
    let graph = try QDQModel.make(
      from: load(sampleModel()), encodings: sampleTable(), options: options)
    #expect(graph.initializers["w"] == nil)
    // 1/0.5, −0.5/0.5, 0.25/0.25, 2/0.25.
    #expect(try bytes(graph.initializers["w_q"]) == [2, 0xFF, 1, 8])
    #expect(graph.initializers["w_q"]?.dataType == .int8)
    #expect(try producer(graph, "w_qdq").inputs[0] == "w_q")
    #expect(!graph.nodes.contains { $0.outputs == ["w_q"] })
  }

  // Scale of the sums is 0.5 · (0.5, 0.25), bias (0.5, −1).
  @Test func biasTakesTheScaleOfTheSums() throws {
    var options = QDQModel.Options()
    options.exportsInt32Bias = true
    let graph = try QDQModel.make(
      from: load(sampleModel()), encodings: sampleTable(), options: options)
    #expect(try graph.initializers["b_scale"]?.floats() == [0.25, 0.125])
    #expect(try graph.initializers["b_q"]?.integers() == [2, -8])
    #expect(try producer(graph, "c").inputs[2] == "b_qdq")
    #expect(graph.initializers["b"] == nil)
  }

  @Test func biasBeyond32BitsStaysFloat() throws {
    var model = sampleModel()
    model.graph.initializer[1].floatData = [1e9, 0]
    var options = QDQModel.Options()
    options.exportsInt32Bias = true
    let graph = try QDQModel.make(from: load(model), encodings: sampleTable(), options: options)
    #expect(try producer(graph, "c").inputs[2] == "b")
  }

  // MARK: Grids

  @Test func fourBitsAreTwoAByteInOperatorSet21() throws {
    var table = try sampleTable()
    table.parameters["w"] = try weights([0.5, 0.25], bits: 4)
    var options = QDQModel.Options()
    options.prequantizesConstants = true
    let graph = try QDQModel.make(from: load(sampleModel()), encodings: table, options: options)
    #expect(graph.opset == 21)
    #expect(graph.initializers["w_q"]?.dataType == .int4)
    // Codes 2, −1 | 1, 7 (2/0.25 = 8 is beyond the grid), the first in the low half.
    #expect(try bytes(graph.initializers["w_q"]) == [0xF2, 0x71])
  }

  @Test func strictGridIsKept() throws {
    var table = try sampleTable()
    // −0.5/0.003 is below −127; so is −1/0.003.
    table.parameters["w"] = try weights([0.003], strict: true)
    table.activations["y"] = try Encoding(
      bits: 8, isSigned: true, isSymmetric: true, isStrict: true, scales: [0.25], zeroPoints: [0])
    let graph = try QDQModel.make(from: load(sampleModel()), encodings: table)
    let values = try #require(try graph.initializers["w"]?.floats())
    #expect(values == [127, -127, 83, 127].map { Float($0) * 0.003 })
    let clip = try #require(graph.nodes.first { $0.opType == "Clip" })
    #expect(try graph.initializers[clip.inputs[1]]?.floats() == [-31.75])
    #expect(try graph.initializers[clip.inputs[2]]?.floats() == [31.75])
  }

  @Test(arguments: [2, 3, 5, 6, 7, 12])
  func oddWidthsTakeTheNextType(bits: Int) throws {
    var table = try sampleTable()
    table.activations["y"] = try unsigned(0.25, 1, bits: bits)
    table.parameters["w"] = try weights([0.25], bits: bits)
    let graph = try QDQModel.make(from: load(sampleModel()), encodings: table)
    #expect(graph.initializers["y_zero_point"]?.dataType == (bits > 8 ? .uint16 : .uint8))
    let clip = try #require(graph.nodes.first { $0.opType == "Clip" })
    #expect(
      try graph.initializers[clip.inputs[2]]?.floats() == [0.25 * Float((1 << bits) - 2)])
    let largest = Float((1 << (bits - 1)) - 1) * 0.25
    #expect(
      try graph.initializers["w"]?.floats() == [min(1, largest), -0.5, 0.25, min(2, largest)])
  }

  @Test func blocksAreLaidOutOverTheTensor() throws {
    var model = sampleModel()
    // [K=2, C=3, 1, 2]: blocks of 2 channels, the last shorter.
    model.graph.initializer[0] = tensorProto("w", [2, 3, 1, 2], (0..<12).map { Float($0) })
    model.graph.node[0].input[0] = "x3"
    model.graph.input.append(valueProto("x3", [1, 3, 4, 4]))
    var table = EncodingTable()
    table.parameters["w"] = try weights(
      [1, 2, 4, 8], granularity: .perBlock(channelAxis: 0, axis: 1, size: 2))
    let graph = try QDQModel.make(from: load(model), encodings: table)
    #expect(graph.opset == 21)
    #expect(graph.initializers["w_scale"]?.shape.dimensions == [2, 2, 1, 2])
    #expect(try graph.initializers["w_scale"]?.floats() == [1, 1, 2, 2, 4, 4, 8, 8])
    let node = try producer(graph, "w_q")
    #expect(node.intAttribute("axis") == 1 && node.intAttribute("block_size") == 2)
  }

  // MARK: Operator sets

  @Test func oldOperatorsAreConverted() throws {
    var model = sampleModel()
    model.opsetImport[0].version = 10
    var low = ONNXAttributeProto()
    low.name = "max"
    low.type = .float
    low.f = 6
    model.graph.node[1] = nodeProto("Clip", ["c"], ["s"], name: "clip", [low])
    model.graph.node += [
      nodeProto("Squeeze", ["s"], ["q"], [intsProto("axes", [0])]),
      nodeProto("Softmax", ["q"], ["p"], [intProto("axis", 2)]),
      nodeProto("ReduceMean", ["p"], ["m"], [intsProto("axes", [1])]),
      nodeProto("Split", ["m"], ["y", "z"], [intProto("axis", 0)]),
    ]
    model.graph.valueInfo = [valueProto("q", [2, 4, 4])]
    var table = try sampleTable()
    table.activations["x"] = try unsigned(1e-4, 0, bits: 16)
    let graph = try QDQModel.make(from: load(model), encodings: table)
    #expect(graph.opset == 21)
    let clip = try producer(graph, "s")
    #expect(clip.inputs.count == 3 && clip.inputs[1].isEmpty && clip.attributes.isEmpty)
    #expect(try graph.initializers[clip.inputs[2]]?.floats() == [6])
    #expect(try graph.initializers[producer(graph, "q").inputs[1]]?.integers() == [0])
    #expect(try producer(graph, "p").intAttribute("axis") == 2)
    #expect(try graph.initializers[producer(graph, "m").inputs[1]]?.integers() == [1])
    #expect(try producer(graph, "z").intAttribute("num_outputs") == 2)
  }

  @Test func operatorsThatCannotMoveKeepTheirSet() throws {
    var model = sampleModel()
    model.opsetImport[0].version = 10
    // From axis 1 on, an old Softmax takes all extents together.
    model.graph.node[1] = nodeProto("Softmax", ["c"], ["y"], name: "soft")
    model.graph.valueInfo = [valueProto("c", [1, 2, 4, 4])]
    var table = try sampleTable()
    table.activations["x"] = try unsigned(1e-4, 0, bits: 16)
    let graph = try QDQModel.make(from: load(model), encodings: table)
    #expect(graph.opset == 10)
    #expect(graph.opsetVersions["com.microsoft"] == 1)
    #expect(
      graph.nodes.filter { $0.opType.hasSuffix("Linear") }.allSatisfy {
        $0.domain == "com.microsoft"
      })
    table.parameters["w"] = try weights(
      [1, 2, 4, 8], granularity: .perBlock(channelAxis: 0, axis: 1, size: 1))
    expectFailure(.unsupportedVersion, "soft") {
      _ = try QDQModel.make(from: load(model), encodings: table)
    }
  }

  // MARK: Places

  @Test func tensorsReadBySubgraphsKeepTheirName() throws {
    var table = try sampleTable()
    table.activations["c"] = try unsigned(0.5, 128)
    let graph = try QDQModel.make(from: load(everythingModel()), encodings: table)
    let node = try #require(graph.nodes.first { $0.opType == "If" })
    #expect(node.capturedInputs == ["c", "w"])
    #expect(try producer(graph, "c").opType == "DequantizeLinear")
    #expect(try producer(graph, "w").opType == "DequantizeLinear")
    #expect(graph.initializers["w"] == nil)
    // The loader checks that everything that is read is written.
    _ = try load(ONNXFile.serialize(graph))
  }

  @Test func constantNodesBecomeInitializers() throws {
    var model = sampleModel()
    var value = ONNXAttributeProto()
    value.name = "value"
    value.type = .tensor
    value.t = model.graph.initializer.removeFirst()
    model.graph.node.insert(nodeProto("Constant", [], ["w"], [value]), at: 0)
    let graph = try QDQModel.make(from: load(model), encodings: sampleTable())
    #expect(!graph.nodes.contains { $0.opType == "Constant" })
    #expect(try producer(graph, "c").inputs[1] == "w_qdq")
  }

  @Test func takenNamesAreAvoided() throws {
    var model = sampleModel()
    model.graph.node[1].output = ["x_q"]
    model.graph.node[1].name = "x_QuantizeLinear"
    model.graph.node.append(nodeProto("Relu", ["x_q"], ["y"]))
    let graph = try QDQModel.make(from: load(model), encodings: sampleTable())
    #expect(try producer(graph, "x_q").opType == "Relu")
    #expect(Set(graph.nodes.flatMap(\.outputs)).count == graph.nodes.flatMap(\.outputs).count)
    let names = graph.nodes.map(\.name).filter { !$0.isEmpty }
    #expect(Set(names).count == names.count)
  }

  // Integer runtimes want a pair at either side of each node; here values stay on the input's grid.
  @Test func operatorsThatHandValuesOnGetPairs() throws {
    var model = sampleModel()
    model.graph.node[1].output = ["r"]
    model.graph.node += [
      nodeProto("Flatten", ["r"], ["f"]),
      nodeProto("Split", ["f"], ["s", "y"], [intProto("axis", 1)]),
      nodeProto("Sigmoid", ["s"], ["z"]),
    ]
    model.graph.output.append(valueProto("z", [1, 16]))
    var table = try sampleTable()
    table.activations["y"] = nil
    table.activations["r"] = try unsigned(0.25, 3, bits: 7)
    let graph = try QDQModel.make(from: load(model), encodings: table)
    #expect(try producer(graph, "s").inputs == ["f_qdq"])
    for name in ["f", "s", "y"] {
      let quantize = try #require(
        graph.nodes.first { $0.opType == "QuantizeLinear" && $0.name.hasPrefix("\(name)_") })
      #expect(try graph.initializers[quantize.inputs[1]]?.floats() == [0.25])
      #expect(try bytes(graph.initializers[quantize.inputs[2]]) == [3])
    }
    #expect(try producer(graph, "y").opType == "DequantizeLinear")
    #expect(try producer(graph, "z").inputs == ["s_qdq"])
    // A grid of 7 bits needs its Clip once, where values come onto it.
    #expect(graph.nodes.filter { $0.opType == "Clip" }.count == 1)
    // Without a grid on the input there is nothing to hand on.
    table.activations["r"] = nil
    let bare = try QDQModel.make(from: load(model), encodings: table)
    #expect(!bare.nodes.contains { $0.name.hasPrefix("f_") })
  }

  @Test(arguments: [0, 1])
  func paddingOffTheGridGetsNoPair(value: Float) throws {
    var model = sampleModel()
    model.graph.node[1].output = ["r"]
    model.graph.node.append(nodeProto("Pad", ["r", "pads", "value"], ["y"]))
    model.graph.initializer += [tensorProto("value", [], [value])]
    var pads = ONNXTensorProto()
    pads.name = "pads"
    pads.dims = [8]
    pads.dataType = DataType.int64.rawValue
    pads.int64Data = [0, 0, 1, 1, 0, 0, 1, 1]
    model.graph.initializer.append(pads)
    var table = try sampleTable()
    table.activations["y"] = nil
    table.activations["r"] = try unsigned(0.3, 0)
    let graph = try QDQModel.make(from: load(model), encodings: table)
    #expect(try producer(graph, "y").opType == (value == 0 ? "DequantizeLinear" : "Pad"))
  }

  // MARK: Errors

  @Test func wrongTablesAreNamed() throws {
    let graph = try load(sampleModel())
    var table = EncodingTable()
    table.activations["none"] = try unsigned(1, 0)
    expectFailure(.encodingMismatch, "'none'") {
      _ = try QDQModel.make(from: graph, encodings: table)
    }
    table = EncodingTable()
    table.parameters["w"] = try weights([1, 2, 3])
    expectFailure(.encodingMismatch, "'w'") {
      _ = try QDQModel.make(from: graph, encodings: table)
    }
    var model = sampleModel()
    model.graph.input[0].type.tensorType.elemType = DataType.float16.rawValue
    table = EncodingTable()
    table.activations["x"] = try unsigned(1, 0)
    expectFailure(.typeMismatch, "'x'", "float16") {
      _ = try QDQModel.make(from: load(model), encodings: table)
    }
  }
}

/// An integer attribute message.
private func intProto(_ name: String, _ value: Int64) -> ONNXAttributeProto {
  var proto = ONNXAttributeProto()
  proto.name = name
  proto.type = .int
  proto.i = value
  return proto
}
