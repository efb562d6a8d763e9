// SPDX-License-Identifier: Apache-2.0
// A graph as the operations that a configuration speaks of: nodes, or patterns that count as one.

import HalfstepNumerics
import OrderedCollections

/// One operation that a configuration speaks of: a node, or a pattern of nodes that counts as one.
struct _Operation {
  /// Operator type under which the configuration is looked up.
  var type: String
  var domain: String
  /// Positions of the nodes, the one that writes the outputs last.
  var nodes: [Int]
  /// Data read, by position; empty for omitted operands and for those that are settings.
  var inputs: [String]
  var outputs: [String]
  /// Constants by parameter kind.
  var parameters: OrderedDictionary<String, String> = [:]
  /// Whether the weight is stored `[out, in]` although the operator wants `[in, out]`.
  var isTransposed = false

  /// The operand at a position, or nil.
  func input(_ index: Int) -> String? {
    index < inputs.count && !inputs[index].isEmpty ? inputs[index] : nil
  }
}

/// The operations of a graph in order, with who writes and reads each tensor.
struct _Operations {
  private(set) var list: [_Operation] = []
  /// Operation that writes a tensor.
  private(set) var producer: [String: Int] = [:]
  /// Operations that read a tensor, once for each operand, settings included.
  private(set) var consumers: [String: [Int]] = [:]
  let constants: _Constants
  let outputs: Set<String>

  /// - Parameter passes: Names of the patterns that count as one operation.
  init(_ graph: Graph, passes: Set<String>) {
    constants = _Constants(graph)
    let index = GraphIndex(graph)
    outputs = index.outputs
    var matcher = _PatternMatcher(graph: graph, index: index, constants: constants)
    let fused = matcher.matchAll(passes)
    for (position, node) in graph.nodes.enumerated() {
      if let operation = fused[position] {
        list.append(operation)
      } else if !matcher.isTaken(position), node.opType != "Constant" || !node.domain.isEmpty {
        list.append(single(node, position, graph))
      }
    }
    for (position, operation) in list.enumerated() {
      for output in operation.outputs where !output.isEmpty { producer[output] = position }
      if operation.nodes.count > 1 {
        for name in operation.inputs where !name.isEmpty {
          consumers[name, default: []].append(position)
        }
      } else {
        for name in graph.nodes[operation.nodes[0]].inputs where !name.isEmpty {
          consumers[name, default: []].append(position)
        }
      }
    }
  }

  private func single(_ node: Node, _ position: Int, _ graph: Graph) -> _Operation {
    var inputs = node.inputs
    for index in inputs.indices where OperatorTraits.isSetting(node, input: index) {
      inputs[index] = ""
    }
    var operation = _Operation(
      type: node.opType, domain: node.domain, nodes: [position], inputs: inputs,
      outputs: node.outputs)
    guard node.domain.isEmpty else { return operation }
    operation.isTransposed = node.opType == "Gemm" && (node.intAttribute("transB") ?? 0) != 0
    for (kind, index) in OperatorTraits.parameterKinds(node.opType) {
      guard let name = node.input(index) else { continue }
      if let source = constants.source(of: name) {
        operation.parameters[kind] = source
      } else if node.opType == "MatMul", let source = constants.transposedSource(of: name) {
        operation.parameters[kind] = source
        operation.isTransposed = true
      }
    }
    return operation
  }

  /// Operations that read any output of one, once each.
  func readers(of position: Int) -> Set<Int> {
    Set(list[position].outputs.flatMap { consumers[$0] ?? [] })
  }
}

/// Constant tensors of a graph, whether they are initializers or the output of a Constant node.
struct _Constants {
  private var tensors: [String: Tensor] = [:]
  private var forwarded: [String: String] = [:]
  private var transposed: [String: String] = [:]

  init(_ graph: Graph) {
    for (name, tensor) in graph.initializers { tensors[name] = tensor }
    for node in graph.nodes where node.domain.isEmpty {
      guard let output = node.outputs.first else { continue }
      switch node.opType {
      case "Constant": tensors[output] = node.constantValue
      case "Identity": forwarded[output] = node.input(0)
      case "Transpose": transposed[output] = node.input(0)
      default: break
      }
    }
  }

  /// The value of a constant by its own name.
  subscript(name: String) -> Tensor? { tensors[name] }

  /// The constant behind a name: itself, or the origin of a chain of Identity.
  func source(of name: String) -> String? {
    var name = name
    // A chain is at most as long as the map; a cycle cannot occur in a valid graph.
    for _ in 0...forwarded.count {
      if tensors[name] != nil { return name }
      guard let next = forwarded[name] else { return nil }
      name = next
    }
    return nil
  }

  /// The constant behind a Transpose.
  func transposedSource(of name: String) -> String? {
    transposed[name].flatMap { source(of: $0) }
  }

  /// A constant's value if it is one float.
  func scalar(_ name: String?) -> Float? {
    guard let name, let source = source(of: name), let tensor = tensors[source], tensor.count == 1
    else { return nil }
    return try? tensor.floats()[0]
  }
}

extension Node {
  /// The value of a Constant node, or nil if it is not a dense tensor.
  package var constantValue: Tensor? {
    guard isOperator("Constant") else { return nil }
    if case .tensor(let tensor)? = attributes["value"] { return tensor }
    if let value = floatAttribute("value_float") { return try? Tensor([value], shape: []) }
    if case .floats(let values)? = attributes["value_floats"] {
      return try? Tensor(values, shape: [values.count])
    }
    if case .int(let value)? = attributes["value_int"] {
      return try? Tensor(elements: [value], .int64, shape: [])
    }
    if case .ints(let values)? = attributes["value_ints"] { return try? Tensor(values) }
    return nil
  }
}
