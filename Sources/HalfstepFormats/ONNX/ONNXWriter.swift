// SPDX-License-Identifier: Apache-2.0
// Turns a graph into the bytes of an ONNX model.

import HalfstepGraph
import HalfstepNumerics
import ONNXProto

/// Turns a graph into the bytes of an ONNX model, as a list of pieces that borrow the weights.
struct ONNXWriter {
  /// A piece of the file.
  enum Chunk {
    case bytes([UInt8])
    /// The elements of a tensor.
    case tensor(Tensor)

    /// Bytes in this piece.
    var count: Int {
      switch self {
      case .bytes(let bytes): bytes.count
      case .tensor(let tensor): tensor.byteCount
      }
    }

    /// Appends the piece to an array.
    func append(to result: inout [UInt8]) {
      switch self {
      case .bytes(let bytes): result.append(contentsOf: bytes)
      case .tensor(let tensor):
        result.append(contentsOf: tensor.rawBytes)
        withExtendedLifetime(tensor) {}
      }
    }

    /// Appends the piece to a file.
    func write(to file: inout FileWriter) throws(HalfstepError) {
      switch self {
      case .bytes(let bytes): try file.append(bytes)
      case .tensor(let tensor):
        try file.append(tensor.rawBytes)
        withExtendedLifetime(tensor) {}
      }
    }
  }

  private let graph: Graph

  /// Writes `graph`.
  init(_ graph: Graph) { self.graph = graph }

  /// The pieces of the model; with a layout, the weights that it places are left out.
  func chunks(external layout: ExternalDataLayout?) throws(HalfstepError) -> [Chunk] {
    let envelope: ONNXModelProto = try decodeMessage(graph.envelope, "envelope")
    var model = envelope
    var rest = envelope.graph
    model.clearGraph()
    updateHeader(&model)
    let shells = Dictionary(
      rest.initializer.map { ($0.name, $0) }, uniquingKeysWith: { _, later in later })
    rest.initializer = []
    // The format wants a name; a file that had none stays as it was.
    rest.name = graph.name.isEmpty && graph.envelope.isEmpty ? "halfstep" : graph.name
    rest.input = merged(graph.inputs, rest.input)
    rest.output = merged(graph.outputs, rest.output)
    rest.valueInfo = merged(Array(graph.valueInfos.values), rest.valueInfo)

    var body: [Chunk] = []
    var fields = WireWriter()
    for node in graph.nodes {
      fields.append(field: 1, try encodeMessage(message(node)))
    }
    for (name, tensor) in graph.initializers {
      let message = header(name, tensor, shells[name], layout)
      let head = try encodeMessage(message)
      guard message.dataLocation != .external else {
        fields.append(field: 5, head)
        continue
      }
      var raw = WireWriter()
      raw.appendHeader(field: 9, count: tensor.byteCount)
      fields.appendHeader(
        field: 5, count: head.count + raw.bytes.count + tensor.byteCount)
      fields.append(head)
      fields.append(raw.bytes)
      if tensor.byteCount < 1 << 16 {
        fields.append(tensor.rawBytes)
        withExtendedLifetime(tensor) {}
      } else {
        body.append(.bytes(fields.bytes))
        body.append(.tensor(tensor))
        fields = WireWriter()
      }
    }
    for (_, fragment) in graph.opaqueInitializers { fields.append(fragment) }
    fields.append(try encodeMessage(rest))
    body.append(.bytes(fields.bytes))

    var head = WireWriter()
    head.append(try encodeMessage(model))
    head.appendHeader(field: 7, count: body.reduce(0) { $0 + $1.count })
    return [.bytes(head.bytes)] + body
  }

  // MARK: Parts

  private func updateHeader(_ model: inout ONNXModelProto) {
    var versions = graph.opsetVersions
    var raised = !model.hasIrVersion
    var imports: [ONNXOperatorSetIdProto] = []
    // Entries of the file keep their place and spelling.
    for var entry in model.opsetImport {
      let domain = entry.domain == "ai.onnx" ? "" : entry.domain
      guard let version = versions.removeValue(forKey: domain) else { continue }
      if domain.isEmpty, entry.version != Int64(version) { raised = true }
      entry.version = Int64(version)
      imports.append(entry)
    }
    for (domain, version) in versions {
      var entry = ONNXOperatorSetIdProto()
      entry.domain = domain
      entry.version = Int64(version)
      imports.append(entry)
    }
    model.opsetImport = imports
    if raised {
      model.irVersion = max(model.irVersion, Self.formatVersion(forOpset: graph.opset))
    }
    if !model.hasProducerName { model.producerName = "halfstep" }
  }

  /// The format version that came out with a version of ONNX's own operators.
  static func formatVersion(forOpset opset: Int) -> Int64 {
    switch opset {
    case ..<9: 3
    case 9: 4
    case 10: 5
    case 11: 6
    case 12...14: 7
    case 15...18: 8
    case 19...20: 9
    case 21...22: 10
    case 23: 11
    case 24: 12
    default: 13
    }
  }

  /// Type messages for `infos`: the file's own where they still say the same.
  private func merged(
    _ infos: [ValueInfo], _ originals: [ONNXValueInfoProto]
  ) -> [ONNXValueInfoProto] {
    let byName = Dictionary(
      originals.map { ($0.name, $0) }, uniquingKeysWith: { _, later in later })
    return infos.map { info in
      guard let original = byName[info.name] else { return ONNXValueInfoProto(info) }
      if (try? ValueInfo(original, "value info")) == info { return original }
      var changed = original
      changed.type = ONNXValueInfoProto(info).type
      return changed
    }
  }

  private func message(_ node: Node) throws(HalfstepError) -> ONNXNodeProto {
    var proto: ONNXNodeProto = try decodeMessage(node.opaque, "node '\(node.label)'")
    let shells = Dictionary(
      proto.attribute.map { ($0.name, $0) }, uniquingKeysWith: { _, later in later })
    proto.input = node.inputs
    proto.output = node.outputs
    if !node.name.isEmpty { proto.name = node.name }
    proto.opType = node.opType
    if !node.domain.isEmpty { proto.domain = node.domain }
    proto.attribute = []
    for (name, value) in node.attributes {
      proto.attribute.append(try attribute(name, value, shells[name]))
    }
    return proto
  }

  private func attribute(
    _ name: String, _ value: Attribute, _ shell: ONNXAttributeProto?
  ) throws(HalfstepError) -> ONNXAttributeProto {
    if case .opaque(let bytes) = value {
      var proto: ONNXAttributeProto = try decodeMessage(bytes, "attribute '\(name)'")
      proto.name = name
      return proto
    }
    var proto = shell ?? ONNXAttributeProto()
    proto.name = name
    switch value {
    case .int(let value):
      proto.type = .int
      proto.i = value
    case .float(let value):
      proto.type = .float
      proto.f = value
    case .string(let value):
      proto.type = .string
      proto.s = .init(value)
    case .ints(let values):
      proto.type = .ints
      proto.ints = values
    case .floats(let values):
      proto.type = .floats
      proto.floats = values
    case .strings(let values):
      proto.type = .strings
      proto.strings = values.map { .init($0) }
    case .tensor(let tensor):
      proto.type = .tensor
      var message = proto.t
      message.dims = tensor.shape.dimensions.map(Int64.init)
      message.dataType = tensor.dataType.rawValue
      message.rawData = .init(tensor.rawBytes)
      withExtendedLifetime(tensor) {}
      proto.t = message
    case .opaque: break
    }
    return proto
  }

  /// An initializer's message without its bytes.
  private func header(
    _ name: String, _ tensor: Tensor, _ shell: ONNXTensorProto?, _ layout: ExternalDataLayout?
  ) -> ONNXTensorProto {
    var proto = shell ?? ONNXTensorProto()
    proto.name = name
    proto.dims = tensor.shape.dimensions.map(Int64.init)
    proto.dataType = tensor.dataType.rawValue
    if let layout, let offset = layout.offsets[name] {
      proto.dataLocation = .external
      proto.externalData = [
        ("location", layout.location), ("offset", String(offset)),
        ("length", String(tensor.byteCount)),
      ].map { key, value in
        var entry = ONNXStringStringEntryProto()
        entry.key = key
        entry.value = value
        return entry
      }
    }
    return proto
  }
}

extension ONNXValueInfoProto {
  /// A type message for `info`.
  init(_ info: ValueInfo) {
    self.init()
    name = info.name
    guard let dataType = info.dataType else { return }
    var tensor = ONNXTypeProto.Tensor()
    tensor.elemType = dataType.rawValue
    if let dimensions = info.dimensions {
      var shape = ONNXTensorShapeProto()
      shape.dim = dimensions.map { dimension in
        var result = ONNXTensorShapeProto.Dimension()
        switch dimension {
        case .fixed(let extent): result.dimValue = Int64(extent)
        case .symbolic(let symbol): result.dimParam = symbol
        case .unknown: break
        }
        return result
      }
      tensor.shape = shape
    }
    type.tensorType = tensor
  }
}
