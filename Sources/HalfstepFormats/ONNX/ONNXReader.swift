// SPDX-License-Identifier: Apache-2.0
// Turns the bytes of an ONNX model into a graph.

import HalfstepGraph
import HalfstepNumerics
import ONNXProto
import SwiftProtobuf

/// Turns the bytes of an ONNX model into a graph.
///
/// The model is cut into fields first; only nodes, types and headers become message objects.
struct ONNXReader {
  private let bytes: UnsafeRawBufferPointer
  private let tensors: TensorReader
  private let discard: ((Range<Int>) -> Void)?
  private var graph = Graph()
  /// Fields of the graph that are neither nodes nor constants.
  private var graphRest = WireWriter()
  private var hasGraph = false

  /// Reads from `bytes`; `discard` is told of ranges that are not needed any more.
  init(
    bytes: UnsafeRawBufferPointer, external: ExternalDataReader?, discard: ((Range<Int>) -> Void)?
  ) {
    self.bytes = bytes
    self.tensors = TensorReader(external: external)
    self.discard = discard
  }

  /// Reads the whole model.
  mutating func read() throws(HalfstepError) -> Graph {
    var modelRest = WireWriter()
    var model = WireReader(bytes, 0..<bytes.count)
    while let field = try model.next() {
      if field.number == 7, let content = field.content {
        try readGraph(content)
        hasGraph = true
      } else {
        modelRest.append(bytes[field.whole])
      }
    }
    guard hasGraph else {
      throw HalfstepError(.malformedFile, "not a valid ONNX model: it holds no graph")
    }
    let header: ONNXModelProto = try decodeMessage(modelRest.bytes, "model header")
    try readOpsets(header)
    let rest: ONNXGraphProto = try decodeMessage(graphRest.bytes, "graph header")
    graph.name = rest.name
    for proto in rest.input { graph.inputs.append(try ValueInfo(proto, "graph input")) }
    for proto in rest.output { graph.outputs.append(try ValueInfo(proto, "graph output")) }
    for proto in rest.valueInfo {
      graph.valueInfos[proto.name] = try ValueInfo(proto, "value info")
    }
    modelRest.append(field: 7, graphRest.bytes)
    graph.envelope = modelRest.bytes
    try graph.validateAndSort()
    return graph
  }

  private mutating func readGraph(_ range: Range<Int>) throws(HalfstepError) {
    var reader = WireReader(bytes, range)
    while let field = try reader.next() {
      switch (field.number, field.content) {
      case (1, let content?):
        let proto: ONNXNodeProto = try decodeMessage(
          slice(content), "node \(graph.nodes.count)")
        graph.insert(try Node(proto, tensors: tensors))
      case (5, let content?):
        try readInitializer(content)
        discard?(content)
      case (15, let content?):
        try readSparseInitializer(content)
      default:
        graphRest.append(bytes[field.whole])
      }
    }
  }

  private mutating func readInitializer(_ range: Range<Int>) throws(HalfstepError) {
    var rest = WireWriter()
    var raw: Range<Int>?
    var reader = WireReader(bytes, range)
    while let field = try reader.next() {
      if field.number == 9, let content = field.content {
        raw = content
      } else {
        rest.append(bytes[field.whole])
      }
    }
    var proto: ONNXTensorProto = try decodeMessage(
      rest.bytes, "initializer \(graph.initializers.count)")
    let name = proto.name
    try checkNew(name)
    let label = "initializer '\(name)'"
    if let tensor = try tensors.tensor(proto, raw: raw.map { slice($0) }, label) {
      graph.initializers[name] = tensor
      proto.clearValue()
      if let shell = proto.shell { graphRest.append(field: 5, try encodeMessage(shell)) }
    } else {
      graph.opaqueInitializers[name] = fragment(field: 5, range)
    }
  }

  private mutating func readSparseInitializer(_ range: Range<Int>) throws(HalfstepError) {
    let proto: ONNXSparseTensorProto = try decodeMessage(slice(range), "sparse initializer")
    try checkNew(proto.values.name)
    graph.opaqueInitializers[proto.values.name] = fragment(field: 15, range)
  }

  /// The message at `range` as a field of the graph, which is what `opaqueInitializers` holds.
  private func fragment(field number: Int, _ range: Range<Int>) -> [UInt8] {
    var writer = WireWriter()
    writer.append(field: number, Array(bytes[range]))
    return writer.bytes
  }

  private func checkNew(_ name: String) throws(HalfstepError) {
    guard !name.isEmpty else {
      throw HalfstepError(
        .malformedFile, "initializer \(graph.initializers.count) has no name")
    }
    guard graph.initializers[name] == nil, graph.opaqueInitializers[name] == nil else {
      throw HalfstepError(.invalidGraph, "initializer '\(name)' is defined twice")
    }
  }

  private mutating func readOpsets(_ model: ONNXModelProto) throws(HalfstepError) {
    for entry in model.opsetImport {
      let domain = entry.domain == "ai.onnx" ? "" : entry.domain
      guard let version = Int32(exactly: entry.version), version > 0 else {
        throw HalfstepError(
          .malformedFile, "operator set '\(domain)': bad version \(entry.version)")
      }
      guard graph.opsetVersions.updateValue(Int(version), forKey: domain) == nil else {
        throw HalfstepError(.malformedFile, "operator set '\(domain)' is declared twice")
      }
    }
    guard graph.opset >= ONNXFile.oldestOpset || graph.nodes.allSatisfy({ !$0.domain.isEmpty })
    else {
      throw HalfstepError(
        .unsupportedVersion,
        "operator set \(graph.opset): expected version \(ONNXFile.oldestOpset) or newer")
    }
  }

  private func slice(_ range: Range<Int>) -> UnsafeRawBufferPointer {
    UnsafeRawBufferPointer(rebasing: bytes[range])
  }
}

/// Decodes a message, giving failures the name of what was decoded.
func decodeMessage<M: Message>(
  _ bytes: UnsafeRawBufferPointer, _ what: String
) throws(HalfstepError) -> M {
  do {
    return try M(serializedBytes: bytes.bytes)
  } catch {
    throw HalfstepError(.malformedFile, "not a valid ONNX model: \(what) cannot be decoded")
  }
}

/// Decodes a message, giving failures the name of what was decoded.
func decodeMessage<M: Message>(_ bytes: [UInt8], _ what: String) throws(HalfstepError) -> M {
  do {
    return try M(serializedBytes: bytes)
  } catch {
    throw HalfstepError(.malformedFile, "not a valid ONNX model: \(what) cannot be decoded")
  }
}

/// Encodes a message.
func encodeMessage(_ message: some Message) throws(HalfstepError) -> [UInt8] {
  do {
    return try message.serializedBytes()
  } catch {
    throw HalfstepError(.internalError, "a message cannot be encoded: \(error)")
  }
}
