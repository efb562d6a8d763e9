// SPDX-License-Identifier: Apache-2.0
// Temporary folders, sample models and the shared reference folder for the tests of this module.

import Foundation
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics
import ONNXProto
import SwiftProtobuf
import Testing

/// Calls `body` with a new empty folder and removes it afterwards.
func withTemporaryFolder(_ body: (String) throws -> Void) throws {
  let url = FileManager.default.temporaryDirectory.appending(path: "halfstep-\(UUID().uuidString)")
  try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
  defer { try? FileManager.default.removeItem(at: url) }
  try body(url.path(percentEncoded: false))
}

/// The shared folder with reference files, or nil (with a printed reason) where it is absent.
let sharedFolder: String? = {
  let given = ProcessInfo.processInfo.environment["HALFSTEP_SHARED"]
  let root = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
    .deletingLastPathComponent()
  for path in [given, root.appending(path: "../shared").standardized.path(percentEncoded: false)] {
    if let path, FileManager.default.fileExists(atPath: path + "/reference") { return path }
  }
  print("skipped: neither HALFSTEP_SHARED nor ../shared holds the reference files")
  return nil
}()

/// Files below the shared reference folder whose names end in `suffix`, sorted.
func referenceFiles(_ suffix: String) -> [String] {
  guard let shared = sharedFolder else { return [] }
  let root = shared + "/reference/golden"
  let all = FileManager.default.enumerator(atPath: root)?.allObjects as? [String] ?? []
  return all.filter { $0.hasSuffix(suffix) }.sorted().map { "\(root)/\($0)" }
}

/// Expects `body` to throw an error of the given kind whose message holds every given text.
func expectFailure(
  _ code: HalfstepError.Code, _ texts: String..., sourceLocation: SourceLocation = #_sourceLocation,
  _ body: () throws -> Void
) {
  do {
    try body()
    Issue.record("nothing was thrown", sourceLocation: sourceLocation)
  } catch let error as HalfstepError {
    #expect(error.code == code, "\(error)", sourceLocation: sourceLocation)
    for text in texts {
      #expect(error.message.contains(text), "\(error)", sourceLocation: sourceLocation)
    }
  } catch {
    Issue.record(error, sourceLocation: sourceLocation)
  }
}

/// Loads a model from a message.
func load(_ model: ONNXModelProto, folder: String? = nil) throws -> Graph {
  let bytes: [UInt8] = try model.serializedBytes()
  return try load(bytes, folder: folder)
}

/// Loads a model from bytes.
func load(_ bytes: [UInt8], folder: String? = nil) throws -> Graph {
  try bytes.withUnsafeBytes { try ONNXFile.load(bytes: $0, folder: folder) }
}

/// A tensor message with float values in `float_data`.
func tensorProto(_ name: String, _ dims: [Int64], _ values: [Float]) -> ONNXTensorProto {
  var proto = ONNXTensorProto()
  proto.name = name
  proto.dims = dims
  proto.dataType = 1
  proto.floatData = values
  return proto
}

/// A type message of a float tensor.
func valueProto(_ name: String, _ dims: [Int64]) -> ONNXValueInfoProto {
  var proto = ONNXValueInfoProto()
  proto.name = name
  proto.type.tensorType.elemType = 1
  proto.type.tensorType.shape.dim = dims.map { extent in
    var dim = ONNXTensorShapeProto.Dimension()
    dim.dimValue = extent
    return dim
  }
  return proto
}

/// A node message.
func nodeProto(
  _ type: String, _ inputs: [String], _ outputs: [String], name: String = "",
  _ attributes: [ONNXAttributeProto] = []
) -> ONNXNodeProto {
  var proto = ONNXNodeProto()
  proto.opType = type
  proto.input = inputs
  proto.output = outputs
  proto.attribute = attributes
  if !name.isEmpty { proto.name = name }
  return proto
}

/// An integer-list attribute message.
func intsProto(_ name: String, _ values: [Int64]) -> ONNXAttributeProto {
  var proto = ONNXAttributeProto()
  proto.name = name
  proto.type = .ints
  proto.ints = values
  return proto
}

/// A small valid model: x -> Conv(w, b) -> Relu -> y, with shapes [1, 2, 4, 4].
func sampleModel() -> ONNXModelProto {
  var model = ONNXModelProto()
  model.irVersion = 8
  var opset = ONNXOperatorSetIdProto()
  opset.version = 17
  model.opsetImport = [opset]
  model.graph.name = "sample"
  model.graph.input = [valueProto("x", [1, 2, 4, 4])]
  model.graph.output = [valueProto("y", [1, 2, 4, 4])]
  model.graph.initializer = [
    tensorProto("w", [2, 2, 1, 1], [1, -0.5, 0.25, 2]), tensorProto("b", [2], [0.5, -1]),
  ]
  model.graph.node = [
    nodeProto("Conv", ["x", "w", "b"], ["c"], name: "conv", [intsProto("kernel_shape", [1, 1])]),
    nodeProto("Relu", ["c"], ["y"], name: "relu"),
  ]
  return model
}

/// Expects two graphs to say the same, including what the engine does not interpret.
func expectSame(
  _ a: Graph, _ b: Graph, sourceLocation: SourceLocation = #_sourceLocation
) throws {
  #expect(a.name == b.name, sourceLocation: sourceLocation)
  #expect(a.inputs == b.inputs, sourceLocation: sourceLocation)
  #expect(a.outputs == b.outputs, sourceLocation: sourceLocation)
  #expect(a.valueInfos == b.valueInfos, sourceLocation: sourceLocation)
  #expect(a.opsetVersions == b.opsetVersions, sourceLocation: sourceLocation)
  #expect(a.opaqueInitializers == b.opaqueInitializers, sourceLocation: sourceLocation)
  #expect(a.initializers.keys == b.initializers.keys, sourceLocation: sourceLocation)
  for (name, tensor) in a.initializers {
    guard let other = b.initializers[name] else { continue }
    #expect(isSame(tensor, other), "\(name)", sourceLocation: sourceLocation)
  }
  #expect(a.nodes.count == b.nodes.count, sourceLocation: sourceLocation)
  for (left, right) in zip(a.nodes, b.nodes) {
    #expect(left.name == right.name, sourceLocation: sourceLocation)
    #expect(left.opType == right.opType, sourceLocation: sourceLocation)
    #expect(left.domain == right.domain, sourceLocation: sourceLocation)
    #expect(left.inputs == right.inputs, sourceLocation: sourceLocation)
    #expect(left.outputs == right.outputs, sourceLocation: sourceLocation)
    #expect(left.capturedInputs == right.capturedInputs, sourceLocation: sourceLocation)
    #expect(left.opaque == right.opaque, sourceLocation: sourceLocation)
    #expect(left.attributes.keys == right.attributes.keys, sourceLocation: sourceLocation)
    for (key, value) in left.attributes {
      guard let other = right.attributes[key] else { continue }
      #expect(isSame(value, other), "\(left.label) \(key)", sourceLocation: sourceLocation)
    }
  }
}

func isSame(_ a: Tensor, _ b: Tensor) -> Bool {
  guard a.dataType == b.dataType, a.shape == b.shape else { return false }
  defer { withExtendedLifetime((a, b)) {} }
  return memcmp(a.storage.baseAddress, b.storage.baseAddress, a.byteCount) == 0
}

func isSame(_ a: Attribute, _ b: Attribute) -> Bool {
  switch (a, b) {
  case (.int(let x), .int(let y)): x == y
  case (.float(let x), .float(let y)): x.bitPattern == y.bitPattern
  case (.string(let x), .string(let y)): x == y
  case (.tensor(let x), .tensor(let y)): isSame(x, y)
  case (.ints(let x), .ints(let y)): x == y
  case (.floats(let x), .floats(let y)): x.map(\.bitPattern) == y.map(\.bitPattern)
  case (.strings(let x), .strings(let y)): x == y
  case (.opaque(let x), .opaque(let y)): x == y
  default: false
  }
}
