// SPDX-License-Identifier: Apache-2.0
// Damaged and hostile models: a clear error, never a trap.

import Foundation
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics
import ONNXProto
import SwiftProtobuf
import Testing

@Suite struct ONNXMalformedTests {
  // MARK: Structure

  @Test func noModelIsRefused() {
    expectFailure(.malformedFile, "no graph") { _ = try load([]) }
    expectFailure(.malformedFile) { _ = try load(Array("just some text, no model".utf8)) }
    expectFailure(.malformedFile) { _ = try load([UInt8](repeating: 0xFF, count: 100)) }
  }

  @Test func everyTruncationIsRefusedOrRead() throws {
    let bytes: [UInt8] = try everythingModel().serializedBytes()
    for count in bytes.indices { try expectLoadedOrRefused(Array(bytes[..<count])) }
  }

  @Test func oldOperatorSetIsRefused() {
    var model = sampleModel()
    model.opsetImport[0].version = 6
    expectFailure(.unsupportedVersion, "operator set 6", "7") { _ = try load(model) }
    model.opsetImport = []
    expectFailure(.unsupportedVersion) { _ = try load(model) }
    model.opsetImport = sampleModel().opsetImport + sampleModel().opsetImport
    expectFailure(.malformedFile, "twice") { _ = try load(model) }
  }

  @Test func brokenGraphsAreNamed() {
    var model = sampleModel()
    model.graph.node[1].output = ["c"]
    expectFailure(.invalidGraph, "'c'", "relu") { _ = try load(model) }
    model = sampleModel()
    model.graph.node[0].input[0] = "y"
    expectFailure(.invalidGraph, "cycle") { _ = try load(model) }
    model = sampleModel()
    model.graph.node[0].input[0] = "missing"
    expectFailure(.invalidGraph, "'missing'", "conv") { _ = try load(model) }
    model = sampleModel()
    model.graph.initializer.append(model.graph.initializer[0])
    expectFailure(.invalidGraph, "'w'", "twice") { _ = try load(model) }
    model = sampleModel()
    model.graph.initializer[0].clearName()
    expectFailure(.malformedFile, "initializer 0") { _ = try load(model) }
    model = sampleModel()
    model.graph.node[0].clearOpType()
    expectFailure(.malformedFile, "conv") { _ = try load(model) }
    model = sampleModel()
    model.graph.node[0].attribute += model.graph.node[0].attribute
    expectFailure(.malformedFile, "conv", "kernel_shape") { _ = try load(model) }
  }

  @Test func deepNestingIsRefused() throws {
    // 40 conditionals in one another nest 120 messages; the decoder's limit is 100.
    var model = sampleModel()
    var inner = ONNXGraphProto()
    inner.output = [valueProto("r", [1])]
    for _ in 0..<40 {
      var attribute = ONNXAttributeProto()
      attribute.name = "then_branch"
      attribute.type = .graph
      attribute.g = inner
      inner = ONNXGraphProto()
      inner.node = [nodeProto("If", ["x"], ["r"], [attribute])]
    }
    model.graph.node += inner.node
    expectFailure(.malformedFile, "node 2") { _ = try load(model) }
  }

  // MARK: Tensors

  @Test(
    arguments: [
      [-1], [2, -2], [3], [1 << 62, 4], [1 << 47, 2], [1 << 40, 0, 1 << 40],
    ] as [[Int64]])
  func wrongExtentsAreNamed(dims: [Int64]) {
    var model = sampleModel()
    model.graph.initializer[1].dims = dims
    expectFailure(.malformedFile, "initializer 'b'") { _ = try load(model) }
  }

  @Test func rankIsBounded() {
    var model = sampleModel()
    model.graph.initializer[1].dims = [Int64](repeating: 1, count: 100_000)
    expectFailure(.malformedFile, "initializer 'b'", "rank") { _ = try load(model) }
    model = sampleModel()
    model.graph.input = [valueProto("x", [Int64](repeating: 1, count: 40))]
    expectFailure(.malformedFile, "'x'", "rank") { _ = try load(model) }
    model.graph.input = [valueProto("x", [-5])]
    expectFailure(.malformedFile, "'x'", "-5") { _ = try load(model) }
  }

  @Test func sizesMustFit() {
    var model = sampleModel()
    model.graph.initializer[1].floatData = []
    model.graph.initializer[1].rawData = Data([1, 2, 3])
    expectFailure(.malformedFile, "initializer 'b'", "expected 8 bytes, got 3") {
      _ = try load(model)
    }
    // 2^47 bytes are declared and 3 are there: nothing may be allocated for them.
    model.graph.initializer[1].dims = [1 << 45]
    expectFailure(.malformedFile, "expected 140737488355328 bytes") { _ = try load(model) }
  }

  // MARK: Element types

  @Test(
    arguments: [
      (DataType.int8, [-128, 127], [0x80, 0x7F]), (.uint8, [0, 255], [0, 0xFF]),
      (.int16, [-2, 3], [0xFE, 0xFF, 3, 0]), (.uint16, [65535, 1], [0xFF, 0xFF, 1, 0]),
      (.float16, [0x3C00, 0xC000], [0, 0x3C, 0, 0xC0]),
      (.bfloat16, [0x3F80, 0], [0x80, 0x3F, 0, 0]),
      (.bool, [1, 0], [1, 0]), (.int4, [0x21, 0x03], [0x21, 0x03]),
      (.int32, [-1, 1], [0xFF, 0xFF, 0xFF, 0xFF, 1, 0, 0, 0]),
      (.float8E5M2, [0x3C, 0x80], [0x3C, 0x80]),
    ] as [(DataType, [Int32], [UInt8])])
  func typedFieldsAreUnpacked(type: DataType, values: [Int32], bytes: [UInt8]) throws {
    var model = sampleModel()
    var proto = ONNXTensorProto()
    proto.name = "t"
    proto.dataType = type.rawValue
    // Three 4-bit elements take two bytes.
    proto.dims = [type == .int4 ? 3 : 2]
    proto.int32Data = values
    model.graph.initializer.append(proto)
    let tensor = try #require(try load(model).initializers["t"])
    #expect(tensor.dataType == type)
    let raw = UnsafeRawBufferPointer(start: tensor.storage.baseAddress, count: tensor.byteCount)
    #expect(Array(raw) == bytes)
    withExtendedLifetime(tensor) {}
  }

  @Test func valuesMustFitTheirType() {
    var model = sampleModel()
    model.graph.initializer[1].floatData = []
    model.graph.initializer[1].dataType = DataType.int8.rawValue
    model.graph.initializer[1].int32Data = [1, 200]
    expectFailure(.malformedFile, "initializer 'b'", "200") { _ = try load(model) }
  }

  @Test func unknownElementTypeSurvives() throws {
    var model = sampleModel()
    var proto = ONNXTensorProto()
    proto.name = "odd"
    proto.dataType = 99
    proto.dims = [1]
    proto.rawData = Data([7])
    model.graph.initializer.append(proto)
    let graph = try load(model)
    #expect(Array(graph.opaqueInitializers.keys) == ["odd"])
    let saved = try ONNXModelProto(serializedBytes: ONNXFile.serialize(graph))
    #expect(saved.graph.initializer.last == proto)
  }

  // MARK: External data

  private func externalModel(_ entries: [(String, String)]) -> ONNXModelProto {
    var model = sampleModel()
    model.graph.initializer[1].floatData = []
    model.graph.initializer[1].dataLocation = .external
    model.graph.initializer[1].externalData = entries.map { key, value in
      var entry = ONNXStringStringEntryProto()
      entry.key = key
      entry.value = value
      return entry
    }
    return model
  }

  @Test func externalDataIsRead() throws {
    try withTemporaryFolder { folder in
      try AtomicFile.write([9, 0, 0, 0x80, 0x3F, 0, 0, 0, 0x40], to: "\(folder)/d")
      let model = externalModel([("location", "d"), ("offset", "1"), ("length", "8")])
      #expect(try load(model, folder: folder).initializers["b"]?.floats() == [1, 2])
      expectFailure(.unsafePath, "initializer 'b'") { _ = try load(model) }
    }
  }

  @Test(arguments: ["/etc/passwd", "../d", "a/../../d", "..", "link", "linked/d"])
  func externalDataStaysInTheFolder(location: String) throws {
    try withTemporaryFolder { outside in
      let folder = outside + "/model"
      try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
      try AtomicFile.write([UInt8](repeating: 0, count: 8), to: "\(outside)/d")
      for (link, target) in [("link", "../d"), ("linked", "..")] {
        try FileManager.default.createSymbolicLink(
          atPath: "\(folder)/\(link)", withDestinationPath: target)
      }
      let model = externalModel([("location", location)])
      expectFailure(.unsafePath, "initializer 'b'", location) {
        _ = try load(model, folder: folder)
      }
    }
  }

  @Test(arguments: [
    [("location", "d"), ("offset", "1")], [("location", "d"), ("offset", "9223372036854775807")],
    [("location", "d"), ("length", "7")], [("location", "d"), ("offset", "-1")],
    [("location", "d"), ("offset", "x")], [("offset", "0")], [("location", "")],
  ])
  func wrongExternalEntriesAreNamed(entries: [(String, String)]) throws {
    try withTemporaryFolder { folder in
      try AtomicFile.write([UInt8](repeating: 0, count: 8), to: "\(folder)/d")
      expectFailure(.malformedFile, "initializer 'b'") {
        _ = try load(externalModel(entries), folder: folder)
      }
    }
  }

  @Test func missingExternalFileIsNamed() throws {
    try withTemporaryFolder { folder in
      expectFailure(.fileAccess, "initializer 'b'", "none") {
        _ = try load(externalModel([("location", "none")]), folder: folder)
      }
    }
  }

  // MARK: Mutations

  /// Damages a valid model in one of several ways.
  private func mutate(_ bytes: [UInt8], _ random: inout SplitMix) -> [UInt8] {
    var result = bytes
    for _ in 0..<Int.random(in: 1...4, using: &random) {
      let position = Int.random(in: 0..<result.count, using: &random)
      switch Int.random(in: 0..<6, using: &random) {
      case 0: result[position] ^= 1 << UInt8.random(in: 0..<8, using: &random)
      case 1: result[position] = .random(in: 0...255, using: &random)
      case 2:
        // Lengths and numbers that claim too much.
        let lies: [[UInt8]] = [
          [0x7F], [0xFF, 0x7F], [0xFF, 0xFF, 0xFF, 0xFF, 0x0F],
          [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01],
        ]
        result.replaceSubrange(position...position, with: lies.randomElement(using: &random)!)
      case 3:
        let end = min(result.count, position + Int.random(in: 1...40, using: &random))
        let target = Int.random(in: 0..<result.count, using: &random)
        result.insert(contentsOf: result[position..<end], at: target)
      case 4:
        let end = min(result.count, position + Int.random(in: 1...20, using: &random))
        result.removeSubrange(position..<end)
      default: result.removeSubrange(position...)
      }
      if result.isEmpty { return result }
    }
    return result
  }

  @Test func mutatedModelsAreReadOrRefused() throws {
    let bytes: [UInt8] = try everythingModel().serializedBytes()
    var random = SplitMix(state: 20_261)
    var loaded = 0
    for _ in 0..<5000 {
      if try expectLoadedOrRefused(mutate(bytes, &random)) { loaded += 1 }
    }
    // Damage in names and values goes unnoticed: both outcomes must have been tested.
    #expect(loaded > 50 && loaded < 4950)
  }

  /// Expects a model that loads to survive saving, and one that does not to give a reason.
  @discardableResult
  private func expectLoadedOrRefused(_ bytes: [UInt8]) throws -> Bool {
    let graph: Graph
    do {
      graph = try load(bytes)
    } catch let error as HalfstepError {
      #expect(!error.message.isEmpty)
      return false
    }
    try expectSame(graph, load(ONNXFile.serialize(graph)))
    return true
  }
}

/// A small seeded generator (SplitMix64).
private struct SplitMix: RandomNumberGenerator {
  var state: UInt64

  mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var mixed = state
    mixed = (mixed ^ (mixed >> 30)) &* 0xBF58_476D_1CE4_E5B9
    mixed = (mixed ^ (mixed >> 27)) &* 0x94D0_49BB_1331_11EB
    return mixed ^ (mixed >> 31)
  }
}
