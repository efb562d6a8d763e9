// SPDX-License-Identifier: Apache-2.0
// The quantizers of a graph while a configuration is applied to them.

import HalfstepNumerics
import OrderedCollections

/// The quantizers of a graph while a configuration is applied to them.
///
/// Starts with every quantizer off. Tied tensors end up with the same quantizer.
struct _QuantizerBoard {
  /// A quantizer that may be on or off.
  struct Quantizer {
    /// The tensor it was made for.
    let tensor: String
    let role: QuantizerSite.Role
    var isEnabled = false
    var spec: QuantizerSpec
    var minimum: Double?
    var maximum: Double?

    var isConstrained: Bool { minimum != nil || maximum != nil }
    func hasSameConstraint(as other: Quantizer) -> Bool {
      minimum == other.minimum && maximum == other.maximum
    }
  }

  let graph: Graph
  let operations: _Operations
  let types: ElementTypes
  private(set) var quantizers: [Quantizer] = []
  /// Which quantizer a tensor has, in the order in which the graph defines the tensors.
  private(set) var assignment: OrderedDictionary<String, Int> = [:]
  /// Inputs of the graph that are data.
  private(set) var graphInputs: [String] = []
  /// Constants that are data and not parameters.
  private(set) var constantData: [String] = []

  init(_ graph: Graph, operations: _Operations, parameterBits: Int, activationBits: Int) {
    self.graph = graph
    self.operations = operations
    self.types = ElementTypes(graph)
    let parameters = Set(operations.list.flatMap { $0.parameters.values })
    let settings = Self.dynamicSettings(graph)
    let unquantized = Self.unquantizableOutputs(graph)
    let activation = QuantizerSpec(bits: activationBits, isSymmetric: false)

    for input in graph.inputs
    where types.isQuantizable(input.name) && operations.constants[input.name] == nil
      && !settings.contains(input.name)
    {
      graphInputs.append(input.name)
      add(input.name, .activation, activation)
    }
    for operation in operations.list {
      // A weight reaches its operator through a Transpose or Identity under another name.
      for name in operation.parameters.values where types.isQuantizable(name) {
        add(name, .parameter, QuantizerSpec(bits: parameterBits, isSymmetric: false))
      }
      for name in operation.inputs
      where operations.constants[name] != nil && types.isQuantizable(name)
        && !parameters.contains(name) && assignment[name] == nil && !settings.contains(name)
      {
        constantData.append(name)
        add(name, .activation, activation)
      }
      for name in operation.outputs
      where types.isQuantizable(name) && !settings.contains(name) && !unquantized.contains(name) {
        add(name, .activation, activation)
      }
    }
  }

  private mutating func add(_ tensor: String, _ role: QuantizerSite.Role, _ spec: QuantizerSpec) {
    guard assignment[tensor] == nil else { return }
    assignment[tensor] = quantizers.count
    quantizers.append(Quantizer(tensor: tensor, role: role, spec: spec))
  }

  /// Tensors that size a Resize or Upsample, even if they are computed.
  private static func dynamicSettings(_ graph: Graph) -> Set<String> {
    var names: Set<String> = []
    for node in graph.nodes where ["Resize", "Upsample"].contains(node.opType) {
      names.formUnion(node.inputs.dropFirst().filter { $0 != node.inputs[0] })
    }
    return names
  }

  private static func unquantizableOutputs(_ graph: Graph) -> Set<String> {
    var names: Set<String> = []
    for node in graph.nodes where OperatorTraits.neverQuantizedOutputs.contains(node.opType) {
      names.formUnion(node.outputs)
    }
    return names
  }

  // MARK: Access

  /// Changes the quantizer of a tensor if it has one.
  mutating func update(_ tensor: String, _ body: (inout Quantizer) -> Void) {
    if let index = assignment[tensor] { body(&quantizers[index]) }
  }

  /// The quantizer of a tensor, on or off.
  subscript(tensor: String) -> Quantizer? { assignment[tensor].map { quantizers[$0] } }

  func isEnabled(_ tensor: String) -> Bool { self[tensor]?.isEnabled ?? false }

  /// Changes every quantizer of a role, or all of them.
  mutating func updateAll(_ role: QuantizerSite.Role? = nil, _ body: (inout Quantizer) -> Void) {
    for index in quantizers.indices where role == nil || quantizers[index].role == role {
      body(&quantizers[index])
    }
  }

  /// Gives a tensor the quantizer of another one.
  mutating func tie(_ tensor: String, to leader: String) {
    if let index = assignment[leader], assignment[tensor] != nil { assignment[tensor] = index }
  }

  /// Gives every tensor that has one quantizer another one.
  mutating func replaceQuantizer(_ old: Int, by new: Int) {
    for (tensor, index) in assignment where index == old { assignment[tensor] = new }
  }

  /// The tensor whose quantizer shapes the values of `tensor`: itself, or one upstream through
  /// operations that keep the grid; with the positions of those operations.
  func effectiveQuantizer(of tensor: String) -> (tensor: String, path: [Int])? {
    var name = tensor
    var path: [Int] = []
    while true {
      if isEnabled(name) { return (name, path) }
      guard let position = operations.producer[name], !path.contains(position) else { return nil }
      let operation = operations.list[position]
      guard let input = operation.input(0),
        OperatorTraits.preservesGrid(operation.type, domain: operation.domain)
          || isFloatCast(operation, input)
      else { return nil }
      path.append(position)
      name = input
    }
  }

  private func isFloatCast(_ operation: _Operation, _ input: String) -> Bool {
    operation.type == "Cast" && types.isQuantizable(input)
      && types.isQuantizable(operation.outputs[0])
  }
}
