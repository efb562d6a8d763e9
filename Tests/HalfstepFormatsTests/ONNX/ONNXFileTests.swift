// SPDX-License-Identifier: Apache-2.0
// Loading and saving of ONNX models.

import Foundation
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics
import ONNXProto
import SwiftProtobuf
import Testing

@Suite struct ONNXFileTests {
  @Test func sampleModelLoadsAsWritten() throws {
    let graph = try load(sampleModel())
    #expect(graph.name == "sample")
    #expect(graph.opset == 17)
    #expect(graph.nodes.map(\.opType) == ["Conv", "Relu"])
    #expect(graph.nodes[0].intsAttribute("kernel_shape") == [1, 1])
    #expect(try graph.initializers["w"]?.floats() == [1, -0.5, 0.25, 2])
    #expect(graph.initializers["w"]?.shape.dimensions == [2, 2, 1, 1])
    #expect(graph.inputs.map(\.name) == ["x"])
    #expect(graph.outputs[0].dimensions == [.fixed(1), .fixed(2), .fixed(4), .fixed(4)])
  }

  @Test func savingAndLoadingIsTheIdentity() throws {
    let graph = try load(everythingModel())
    try expectSame(graph, load(ONNXFile.serialize(graph)))
    #expect(try ONNXFile.serialize(load(ONNXFile.serialize(graph))) == ONNXFile.serialize(graph))
  }

  @Test func uninterpretedPartsSurvive() throws {
    let saved = try ONNXModelProto(
      serializedBytes: ONNXFile.serialize(load(everythingModel())))
    let model = everythingModel()
    #expect(saved.docString == "model doc")
    #expect(saved.metadataProps == model.metadataProps)
    #expect(saved.functions == model.functions)
    #expect(saved.trainingInfo == model.trainingInfo)
    #expect(saved.unknownFields == model.unknownFields)
    #expect(saved.graph.docString == "graph doc")
    #expect(saved.graph.unknownFields == model.graph.unknownFields)
    #expect(saved.graph.input == model.graph.input)
    #expect(saved.graph.sparseInitializer == model.graph.sparseInitializer)
    #expect(saved.graph.initializer.first { $0.name == "w" }?.docString == "weight doc")
    #expect(saved.graph.initializer.first { $0.name == "words" }?.stringData == [Data([104, 105])])
    // Nodes come back message for message: their typed parts are written as they were read.
    #expect(saved.graph.node == model.graph.node)
    #expect(saved.opsetImport == model.opsetImport)
    #expect(saved.producerName == "elsewhere")
  }

  @Test func subgraphsShowWhatTheyRead() throws {
    let graph = try load(everythingModel())
    let node = try #require(graph.nodes.first { $0.opType == "If" })
    #expect(node.capturedInputs == ["c", "w"])
  }

  @Test func nodesAreSorted() throws {
    var model = sampleModel()
    model.graph.node.reverse()
    #expect(try load(model).nodes.map(\.name) == ["conv", "relu"])
  }

  @Test(arguments: referenceFiles(".onnx"))
  func referenceModelsSurvive(path: String) throws {
    let graph = try ONNXFile.load(path: path)
    #expect(!graph.nodes.isEmpty)
    try expectSame(graph, load(ONNXFile.serialize(graph)))
  }

  // MARK: Files

  @Test func savedFilesLoadInlineAndExternal() throws {
    try withTemporaryFolder { folder in
      var graph = try load(sampleModel())
      let values = (0..<1000).map { Float($0) * 0.5 }
      graph.initializers["big"] = try Tensor(values, shape: [10, 100])
      graph.initializers["odd"] = try Tensor(Array(values[0..<301]), shape: [301])
      for external in [false, true] {
        let path = "\(folder)/m\(external).onnx"
        try ONNXFile.save(graph, path: path, externalData: external)
        try expectSame(graph, ONNXFile.load(path: path))
        #expect(FileManager.default.fileExists(atPath: path + ".data") == external)
      }
      // 10·100 and 301 floats lie outside, the second at a multiple of 64; w and b stay inside.
      let size = try FileManager.default.attributesOfItem(atPath: "\(folder)/mtrue.onnx.data")[
        .size]
      #expect(size as? Int == 4032 + 1204)
      #expect(try FileManager.default.contentsOfDirectory(atPath: folder).count == 3)
    }
  }

  @Test func largeModelsGoOutsideUnasked() throws {
    try withTemporaryFolder { folder in
      var graph = try load(sampleModel())
      graph.initializers["big"] = try Tensor([Float](repeating: 1, count: 1000), shape: [1000])
      try ONNXFile.save(graph, path: "\(folder)/a.onnx", limit: 5000)
      try ONNXFile.save(graph, path: "\(folder)/b.onnx", limit: 4000)
      let files = try FileManager.default.contentsOfDirectory(atPath: folder).sorted()
      #expect(files == ["a.onnx", "b.onnx", "b.onnx.data"])
      try expectSame(graph, ONNXFile.load(path: "\(folder)/b.onnx"))
      // Without anything large there is no second file.
      try ONNXFile.save(load(sampleModel()), path: "\(folder)/c.onnx", externalData: true)
      #expect(!FileManager.default.fileExists(atPath: "\(folder)/c.onnx.data"))
    }
  }

  @Test func subgraphsTakeTheirExternalDataAlong() throws {
    try withTemporaryFolder { folder in
      var model = everythingModel()
      var entry = ONNXStringStringEntryProto()
      entry.key = "location"
      entry.value = "d"
      var tensor = tensorProto("inner", [2], [])
      tensor.dataLocation = .external
      tensor.externalData = [entry]
      let position = try #require(model.graph.node.firstIndex { $0.opType == "If" })
      model.graph.node[position].attribute[0].g.initializer = [tensor]
      try AtomicFile.write([0, 0, 0x80, 0x3F, 0, 0, 0, 0x40], to: "\(folder)/d")
      let saved = try ONNXModelProto(
        serializedBytes: ONNXFile.serialize(load(model, folder: folder)))
      let inner = saved.graph.node[position].attribute[0].g.initializer[0]
      #expect(inner.rawData == Data([0, 0, 0x80, 0x3F, 0, 0, 0, 0x40]))
      #expect(inner.externalData.isEmpty && !inner.hasDataLocation)
      expectFailure(.unsafePath, "then_branch") { _ = try load(model) }
    }
  }

  @Test func failedSaveLeavesNothing() throws {
    try withTemporaryFolder { folder in
      let graph = try load(sampleModel())
      expectFailure(.fileAccess, "\(folder)/none/m.onnx") {
        try ONNXFile.save(graph, path: "\(folder)/none/m.onnx")
      }
      expectFailure(.fileAccess, folder) { try ONNXFile.save(graph, path: folder) }
      #expect(try FileManager.default.contentsOfDirectory(atPath: folder).isEmpty)
    }
  }

  @Test func missingFileIsNamed() {
    expectFailure(.fileAccess, "/nowhere/m.onnx") { _ = try ONNXFile.load(path: "/nowhere/m.onnx") }
    expectFailure(.fileAccess, "/tmp", "folder") { _ = try ONNXFile.load(path: "/tmp") }
  }
}

/// A model with one of everything that the engine keeps but does not interpret.
func everythingModel() -> ONNXModelProto {
  var model = sampleModel()
  model.producerName = "elsewhere"
  model.docString = "model doc"
  var entry = ONNXStringStringEntryProto()
  entry.key = "key"
  entry.value = "value"
  model.metadataProps = [entry]
  var opset = ONNXOperatorSetIdProto()
  opset.domain = "my.domain"
  opset.version = 3
  model.opsetImport.append(opset)
  var function = ONNXFunctionProto()
  function.name = "Twice"
  function.domain = "my.domain"
  function.node = [nodeProto("Add", ["a", "a"], ["b"])]
  model.functions = [function]
  var training = ONNXTrainingInfoProto()
  training.algorithm.name = "sgd"
  model.trainingInfo = [training]
  // Field 1999, a number.
  try! model.merge(serializedBytes: [0xF8, 0x7C, 0x05] as [UInt8])

  model.graph.docString = "graph doc"
  try! model.graph.merge(serializedBytes: [0xF8, 0x7C, 0x06] as [UInt8])
  model.graph.input[0].docString = "picture"
  model.graph.valueInfo = [valueProto("c", [1, 2, 4, 4])]
  model.graph.initializer[0].docString = "weight doc"
  model.graph.initializer[0].metadataProps = [entry]
  var words = ONNXTensorProto()
  words.name = "words"
  words.dataType = 8
  words.dims = [1]
  words.stringData = [Data([104, 105])]
  model.graph.initializer.append(words)
  var sparse = ONNXSparseTensorProto()
  sparse.values = tensorProto("sparse", [1], [2])
  sparse.indices.dataType = 7
  sparse.indices.dims = [1]
  sparse.indices.int64Data = [4]
  sparse.dims = [8]
  model.graph.sparseInitializer = [sparse]

  model.graph.node[0].docString = "node doc"
  model.graph.node[0].overload = "o"
  model.graph.node[0].attribute[0].docString = "attribute doc"
  model.graph.node[0].metadataProps = [entry]
  var configuration = ONNXNodeDeviceConfigurationProto()
  configuration.configurationID = "device"
  model.graph.node[0].deviceConfigurations = [configuration]
  var custom = nodeProto("Twice", ["y"], ["z"])
  custom.domain = "my.domain"
  var constant = nodeProto("Constant", [], ["k"])
  var value = ONNXAttributeProto()
  value.name = "value"
  value.type = .tensor
  value.t.name = "inner"
  value.t.dataType = 7
  value.t.dims = [1]
  value.t.rawData = Data([1, 0, 0, 0, 0, 0, 0, 0])
  constant.attribute = [value]
  var branch = ONNXAttributeProto()
  branch.name = "then_branch"
  branch.type = .graph
  branch.g.node = [nodeProto("Mul", ["c", "w"], ["m"]), nodeProto("Add", ["m", "m"], ["r"])]
  branch.g.output = [valueProto("r", [1])]
  var other = branch
  other.name = "else_branch"
  var text = ONNXAttributeProto()
  text.name = "text"
  text.type = .strings
  text.strings = [Data([1, 2]), Data()]
  model.graph.node += [custom, constant, nodeProto("If", ["k"], ["i"], [branch, other, text])]
  return model
}
