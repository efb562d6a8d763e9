// SPDX-License-Identifier: Apache-2.0
// One operation of a graph.

import HalfstepNumerics
import OrderedCollections

/// One operation: reads tensors by name, writes tensors by name.
package struct Node: Sendable {
  /// Unique in its graph and stable while other nodes come and go; set by `Graph`.
  package internal(set) var id: Int = -1
  /// Name from the file; may be empty or repeated.
  package var name: String
  /// Operator, such as `Conv`.
  package var opType: String
  /// Operator domain; empty for ONNX's own.
  package var domain: String
  /// Tensors read, by position; an empty name is an omitted optional input.
  package var inputs: [String]
  /// Tensors written, by position; an empty name is an omitted optional output.
  package var outputs: [String]
  /// Parameters in file order.
  package var attributes: OrderedDictionary<String, Attribute>
  /// Tensors of this graph that the node's subgraphs read; they count as uses.
  package var capturedInputs: [String] = []
  /// Serialized fields that the engine does not interpret (doc string, metadata, overload).
  package var opaque: [UInt8] = []

  package init(
    name: String = "", opType: String, domain: String = "", inputs: [String], outputs: [String],
    attributes: OrderedDictionary<String, Attribute> = [:]
  ) {
    self.name = name
    self.opType = opType
    self.domain = domain == "ai.onnx" ? "" : domain
    self.inputs = inputs
    self.outputs = outputs
    self.attributes = attributes
  }

  /// What messages call the node: its name, or its operator and first output.
  package var label: String {
    if !name.isEmpty { return name }
    return "\(opType) -> \(outputs.first { !$0.isEmpty } ?? "nothing")"
  }

  /// Whether the node is ONNX's own operator of the given type.
  package func isOperator(_ type: String) -> Bool { domain.isEmpty && opType == type }

  /// The input at a position, or nil if it is omitted.
  package func input(_ index: Int) -> String? {
    guard index < inputs.count, !inputs[index].isEmpty else { return nil }
    return inputs[index]
  }

  package func intAttribute(_ key: String) -> Int? {
    if case .int(let value)? = attributes[key] { return Int(value) }
    return nil
  }

  package func intsAttribute(_ key: String) -> [Int]? {
    if case .ints(let values)? = attributes[key] { return values.map(Int.init) }
    return nil
  }

  package func floatAttribute(_ key: String) -> Float? {
    if case .float(let value)? = attributes[key] { return value }
    return nil
  }

  package func stringAttribute(_ key: String) -> String? {
    if case .string(let bytes)? = attributes[key] { return String(decoding: bytes, as: UTF8.self) }
    return nil
  }
}
