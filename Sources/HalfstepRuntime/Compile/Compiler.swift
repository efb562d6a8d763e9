// SPDX-License-Identifier: Apache-2.0
// Turns a graph into a plan for given input shapes.

import HalfstepGraph
import HalfstepNumerics

/// What stays the same between the plans of a session.
struct Program {
  let graph: Graph
  let quantized: [String: Encoding]
  let observed: Set<String>
  /// Names to return, in order.
  let results: [String]
  let fusion: Fusion
  /// Whether each node contributes to something that was asked for.
  let needed: [Bool]
  let constants: ConstantStore
  let observer: ObserverSlot
  let limit: Int
  /// Whether plans will run.
  let isForRuns: Bool
}

/// Where the steps of a plan find the observer of the current run.
final class ObserverSlot {
  var current: (any TensorObserver)?
}

extension Program {
  /// Compiles the graph for inputs of given shapes and (run-time) types.
  func compile(
    _ inputs: [(name: String, shape: Shape, dataType: DataType)]
  ) throws(HalfstepError) -> Plan {
    let lowering = Lowering(
      opset: graph.opset, constants: constants, limit: limit, isForRuns: isForRuns)
    let units = units
    var buffers: [(name: String, buffer: Buffer)] = []
    var done = 0
    // What is wrong with the network shows below, where it is compiled as a whole.
    if let front = try? compileFront(inputs, units) {
      buffers = front.inputs
      done = front.unitCount
      for (name, value) in front.values { lowering.define(name, value) }
      lowering.emit(front.step)
    } else {
      for input in inputs {
        let bytes = Tensor.byteCount(of: input.dataType, count: input.shape.elementCount)
        let value = Value(
          shape: input.shape, dataType: input.dataType, buffer: Buffer(external: bytes))
        buffers.append((input.name, value.buffer))
        try finish(input.name, value, lowering)
      }
    }
    defineInitializers(lowering)
    for unit in units[done...] { try compile(unit, lowering) }
    var outputs: [(name: String, value: Value, dataType: DataType)] = []
    for name in results {
      guard let value = lowering.value(named: name) else {
        throw HalfstepError(.invalidGraph, "output '\(name)' is never written")
      }
      let declared = graph.outputs.first { $0.name == name }?.dataType
      let dataType = declared.map { Conversion.isHalfOrDouble($0) } == true ? declared : nil
      outputs.append((name, value, value.isFloat ? dataType ?? .float32 : value.dataType))
    }
    return try Plan(inputs: buffers, steps: lowering.steps, outputs: outputs, limit: limit)
  }

  /// Defines the graph's constants, except where an input replaces one.
  func defineInitializers(_ lowering: Lowering) {
    for (name, tensor) in graph.initializers where lowering.value(named: name) == nil {
      lowering.define(name, Value(constant: tensor, staticName: name))
    }
  }

  /// Compiles a node or a chain.
  func compile(_ unit: Unit, _ lowering: Lowering) throws(HalfstepError) {
    if unit.isChain {
      try compile(unit.positions, lowering)
    } else {
      try compile(unit.positions[0], lowering)
    }
  }

  /// Compiles the node at a position.
  private func compile(_ position: Int, _ lowering: Lowering) throws(HalfstepError) {
    let node = graph.nodes[position]
    lowering.begin(node)
    do {
      let outputs: [Value]
      if let folded = try fold(node, lowering) {
        outputs = folded
      } else {
        outputs = try build(node, lowering)
      }
      for (name, value) in zip(node.outputs, outputs) where !name.isEmpty {
        try finish(name, value, lowering)
      }
    } catch {
      throw error.named(node)
    }
  }

  private func build(_ node: Node, _ lowering: Lowering) throws(HalfstepError) -> [Value] {
    guard let builder = OperatorTable.builder(for: node) else {
      throw HalfstepError(.unsupportedOperator, "operator \(node.opType) is not supported")
    }
    return try builder.build(lowering, node)
  }

  /// Compiles a chain: the leader with as many followers as one primitive takes, then the rest.
  private func compile(_ chain: [Int], _ lowering: Lowering) throws(HalfstepError) {
    let leader = graph.nodes[chain[0]]
    lowering.begin(leader)
    var consumed = 1
    do {
      if let folded = try fold(leader, lowering) {
        try finish(leader.outputs[0], folded[0], lowering)
      } else {
        let reader = ChainReader(lowering: lowering, graph: graph, quantized: quantized)
        let layer = try FusedLayer(leader, lowering)
        let (operations, nodes) = try reader.operations(
          of: chain, shape: layer.outputShape, observed: observed)
        let value = try layer.build(operations)
        consumed = nodes
        let name = graph.nodes[chain[nodes - 1]].outputs[0]
        // What the operations did not round is an observed tensor.
        try finish(name, value, lowering, isRounded: !observed.contains(name))
      }
    } catch {
      throw error.named(leader)
    }
    for position in chain.dropFirst(consumed) { try compile(position, lowering) }
  }

  /// Defines a tensor: shows it to the observer and rounds it to its grid.
  func finish(
    _ name: String, _ value: Value, _ lowering: Lowering, isRounded: Bool = false
  ) throws(HalfstepError) {
    if observed.contains(name), value.isFloat {
      let count = value.storedCount
      let zeros = value.paddingZeros
      let buffer = value.buffer
      let slot = observer
      lowering.emit("observe \(name)", reads: [value], writes: []) { () throws(HalfstepError) in
        guard let observer = slot.current else { return }
        observer.observe(
          name, values: UnsafeBufferPointer(start: try buffer.floats, count: count),
          paddingZeros: zeros)
      }
    }
    guard let encoding = quantized[name], !isRounded else {
      lowering.define(name, value)
      return
    }
    guard value.isFloat else {
      throw HalfstepError(
        .typeMismatch, "tensor '\(name)' of \(value.dataType) cannot be quantized")
    }
    lowering.define(name, try lowering.fakeQuantize(value, encoding))
  }

  /// Computes a node now if all that it reads is known; nil if it is not.
  private func fold(_ node: Node, _ lowering: Lowering) throws(HalfstepError) -> [Value]? {
    var isStatic = node.opType != "Shape"
    for name in node.inputs where !name.isEmpty {
      guard let value = lowering.value(named: name) else { return nil }
      if value.constant == nil { return nil }
      if value.staticName == nil { isStatic = false }
    }
    if node.opType == "Constant" || node.opType == "Shape" || node.opType == "Size" {
      return try build(node, lowering)
    }
    let names = node.outputs
    if isStatic, !names.isEmpty {
      let known = names.compactMap { constants.folded[$0] }
      if known.count == names.count {
        return zip(known, names).map { Value(constant: $0, staticName: $1) }
      }
    }
    let scratch = Lowering(opset: graph.opset, constants: constants, limit: limit / 4)
    for name in node.inputs where !name.isEmpty {
      if let value = lowering.value(named: name) { scratch.define(name, value) }
    }
    scratch.begin(node)
    let values = try build(node, scratch)
    var outputs: [(name: String, value: Value, dataType: DataType)] = []
    for (position, value) in values.enumerated() {
      outputs.append((String(position), value, value.dataType))
    }
    let plan = try Plan(inputs: [], steps: scratch.steps, outputs: outputs, limit: limit / 4)
    let arena = try TensorStorage(byteCount: plan.arenaBytes)
    try plan.bind(arena.baseAddress)
    try plan.run()
    let tensors = try plan.collect()
    withExtendedLifetime(arena) {}
    var folded: [Value] = []
    for position in values.indices {
      guard let tensor = tensors[String(position)] else { return nil }
      try lowering.count(folded: tensor)
      let name = position < names.count ? names[position] : ""
      if isStatic, !name.isEmpty { constants.folded[name] = tensor }
      folded.append(Value(constant: tensor, staticName: isStatic && !name.isEmpty ? name : nil))
    }
    return folded
  }
}

extension HalfstepError {
  /// The same error with the node's name, unless it has one.
  func named(_ node: Node) -> HalfstepError {
    if self.node != nil { return self }
    let prefix = "node '\(node.label)'"
    let text = message.hasPrefix(prefix) ? message : "\(prefix): \(message)"
    return HalfstepError(code, text, node: node.label)
  }
}
