// SPDX-License-Identifier: Apache-2.0
// Turns ONNX's node, attribute and type messages into the graph's own.

import HalfstepGraph
import HalfstepNumerics
import ONNXProto

extension Node {
  /// Takes over a node message; what has no place in a node goes to `opaque`.
  init(_ proto: ONNXNodeProto, tensors: TensorReader) throws(HalfstepError) {
    guard !proto.opType.isEmpty else {
      throw HalfstepError(.malformedFile, "node '\(proto.name)' has no operator", node: proto.name)
    }
    self.init(
      name: proto.name, opType: proto.opType, domain: proto.domain, inputs: proto.input,
      outputs: proto.output)
    var captured = CapturedNames()
    var shells: [ONNXAttributeProto] = []
    for var attribute in proto.attribute {
      guard !attribute.name.isEmpty, attributes[attribute.name] == nil else {
        throw HalfstepError(
          .malformedFile, "node '\(label)': attribute '\(attribute.name)' is repeated or unnamed",
          node: label)
      }
      let where_ = "node '\(label)' attribute '\(attribute.name)'"
      if let value = try Attribute(attribute, tensors: tensors, where_) {
        attributes[attribute.name] = value
        attribute.clearValue()
        if let shell = attribute.shell { shells.append(shell) }
      } else {
        try attribute.loadExternalData(tensors, where_)
        if attribute.hasG { captured.collect(attribute.g) }
        for graph in attribute.graphs { captured.collect(graph) }
        attributes[attribute.name] = .opaque(try encodeMessage(attribute))
      }
    }
    capturedInputs = captured.names
    var shell = proto
    shell.input = []
    shell.output = []
    shell.attribute = shells
    shell.clearName()
    shell.clearOpType()
    shell.clearDomain()
    if shell != ONNXNodeProto() { opaque = try encodeMessage(shell) }
  }
}

extension Attribute {
  /// Takes over an attribute's value; nil if the engine does not interpret it.
  init?(
    _ proto: ONNXAttributeProto, tensors: TensorReader, _ label: String
  ) throws(HalfstepError) {
    guard !proto.hasRefAttrName else { return nil }
    switch proto.hasType ? proto.type : proto.inferredType {
    case .float: self = .float(proto.f)
    case .int: self = .int(proto.i)
    case .string: self = .string([UInt8](proto.s))
    case .floats: self = .floats(proto.floats)
    case .ints: self = .ints(proto.ints)
    case .strings: self = .strings(proto.strings.map { [UInt8]($0) })
    case .tensor:
      guard let tensor = try tensors.tensor(proto.t, label) else { return nil }
      self = .tensor(tensor)
    default: return nil
    }
  }
}

extension ONNXAttributeProto {
  /// The type that the filled field suggests; files of the first format version give no type.
  var inferredType: AttributeType {
    if !unknownFields.data.isEmpty { return .undefined }
    if hasF { return .float }
    if hasI { return .int }
    if hasS { return .string }
    if hasT { return .tensor }
    if !floats.isEmpty { return .floats }
    if !ints.isEmpty { return .ints }
    if !strings.isEmpty { return .strings }
    return .undefined
  }

  /// Removes what `Attribute` holds, keeping only what it cannot.
  mutating func clearValue() {
    clearType()
    clearF()
    clearI()
    clearS()
    floats = []
    ints = []
    strings = []
    if hasT {
      var tensor = t
      tensor.clearValue()
      if tensor == ONNXTensorProto() { clearT() } else { t = tensor }
    }
  }

  /// This message if it holds more than its name.
  var shell: ONNXAttributeProto? {
    var rest = self
    rest.clearName()
    return rest == ONNXAttributeProto() ? nil : self
  }
}

extension ValueInfo {
  /// Takes over a type message; `what` names its role in errors.
  init(_ proto: ONNXValueInfoProto, _ what: String) throws(HalfstepError) {
    guard !proto.name.isEmpty else {
      throw HalfstepError(.malformedFile, "\(what) without a name")
    }
    guard case .tensorType(let type)? = proto.type.value else {
      self.init(name: proto.name, dataType: nil, dimensions: nil)
      return
    }
    var dimensions: [Dimension]?
    if type.hasShape {
      guard type.shape.dim.count <= Shape.maximumRank else {
        throw HalfstepError(
          .malformedFile, "\(what) '\(proto.name)': rank \(type.shape.dim.count) is too high")
      }
      var extents: [Dimension] = []
      for dim in type.shape.dim {
        switch dim.value {
        case .dimParam(let symbol)? where !symbol.isEmpty: extents.append(.symbolic(symbol))
        // Some exporters write −1 for an extent they do not know.
        case .dimValue(-1)?: extents.append(.unknown)
        case .dimValue(let extent)?:
          guard extent >= 0, extent < Shape.elementLimit else {
            throw HalfstepError(
              .malformedFile, "\(what) '\(proto.name)': bad extent \(extent)")
          }
          extents.append(.fixed(Int(extent)))
        default: extents.append(.unknown)
        }
      }
      dimensions = extents
    }
    self.init(
      name: proto.name, dataType: DataType(rawValue: type.elemType), dimensions: dimensions)
  }
}

/// Collects the names that a subgraph reads from the graph around it.
struct CapturedNames {
  /// Names in order of their first use, each once.
  private(set) var names: [String] = []
  private var seen: Set<String> = []

  /// Adds the names that `graph` and the graphs inside it read but do not define.
  mutating func collect(_ graph: ONNXGraphProto) { collect(graph, outer: []) }

  // The depth is bounded by the limit on nested messages that decoding enforces.
  private mutating func collect(_ graph: ONNXGraphProto, outer: Set<String>) {
    var defined = outer
    defined.formUnion(graph.input.map(\.name))
    defined.formUnion(graph.initializer.map(\.name))
    defined.formUnion(graph.sparseInitializer.map(\.values.name))
    for node in graph.node { defined.formUnion(node.output) }
    for node in graph.node {
      for name in node.input { note(name, defined) }
      for attribute in node.attribute {
        if attribute.hasG { collect(attribute.g, outer: defined) }
        for inner in attribute.graphs { collect(inner, outer: defined) }
      }
    }
    for output in graph.output { note(output.name, defined) }
  }

  private mutating func note(_ name: String, _ defined: Set<String>) {
    guard !name.isEmpty, !defined.contains(name), seen.insert(name).inserted else { return }
    names.append(name)
  }
}
