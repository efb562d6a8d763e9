// SPDX-License-Identifier: Apache-2.0
// State of one compilation: values by name, and the steps emitted so far.

import CDNNL
import HalfstepGraph
import HalfstepNumerics

/// State of one compilation: values by name, and the steps emitted so far.
final class Lowering {
  let opset: Int
  let constants: ConstantStore
  /// Bytes that intermediate tensors may take together.
  let limit: Int
  /// Whether steps will run, so that weights are copied to the layouts that they are read in.
  let isForRuns: Bool
  private(set) var values: [String: Value] = [:]
  private(set) var steps: [Step] = []
  /// Name of the node at work, for messages.
  private(set) var currentNode = ""
  /// Bytes of the constants that this compilation has computed.
  private var foldedBytes = 0

  init(opset: Int, constants: ConstantStore, limit: Int, isForRuns: Bool = true) {
    self.opset = opset
    self.constants = constants
    self.limit = limit
    self.isForRuns = isForRuns
  }

  // MARK: Values by name

  func define(_ name: String, _ value: Value) { values[name] = value }

  func value(named name: String) -> Value? { values[name] }

  /// A node's input, or nil if it is omitted.
  func optionalInput(_ node: Node, _ index: Int) throws(HalfstepError) -> Value? {
    guard let name = node.input(index) else { return nil }
    guard let value = values[name] else {
      throw HalfstepError(
        .invalidGraph, "node '\(node.label)' reads '\(name)', which nothing provides",
        node: node.label)
    }
    return value
  }

  /// A node's input.
  ///
  /// - Throws: `HalfstepError.invalidGraph` if it is omitted.
  func input(_ node: Node, _ index: Int) throws(HalfstepError) -> Value {
    guard let value = try optionalInput(node, index) else {
      throw HalfstepError(
        .invalidGraph, "node '\(node.label)': input \(index) is missing", node: node.label)
    }
    return value
  }

  /// A node's input, which must hold floats.
  func floatInput(_ node: Node, _ index: Int) throws(HalfstepError) -> Value {
    try requireFloat(input(node, index), node, index)
  }

  /// A node's input, which must hold floats if it is there.
  func optionalFloatInput(_ node: Node, _ index: Int) throws(HalfstepError) -> Value? {
    guard let value = try optionalInput(node, index) else { return nil }
    return try requireFloat(value, node, index)
  }

  private func requireFloat(
    _ value: Value, _ node: Node, _ index: Int
  ) throws(HalfstepError) -> Value {
    guard value.isFloat else {
      throw HalfstepError(
        .typeMismatch,
        "node '\(node.label)' input \(index): expected float32, got \(value.dataType)",
        node: node.label)
    }
    return value
  }

  /// The integers of an input that must be known before the network runs.
  func constantIntegers(_ node: Node, _ index: Int) throws(HalfstepError) -> [Int]? {
    guard let value = try optionalInput(node, index) else { return nil }
    guard let tensor = value.constant else {
      throw HalfstepError(
        .unsupportedOperator,
        "node '\(node.label)' input \(index): expected a constant, got a computed tensor",
        node: node.label)
    }
    guard tensor.dataType == .int64 || tensor.dataType == .int32 else {
      throw HalfstepError(
        .typeMismatch,
        "node '\(node.label)' input \(index): expected integers, got \(tensor.dataType)",
        node: node.label)
    }
    return try tensor.integers()
  }

  /// The floats of an input that must be known before the network runs.
  func constantFloats(_ node: Node, _ index: Int) throws(HalfstepError) -> [Float]? {
    guard let value = try optionalInput(node, index) else { return nil }
    guard let tensor = value.constant, tensor.dataType == .float32 else {
      throw HalfstepError(
        .unsupportedOperator,
        "node '\(node.label)' input \(index): expected constant floats", node: node.label)
    }
    return try tensor.floats()
  }

  /// Counts a constant that was computed.
  ///
  /// - Throws: `HalfstepError.outOfMemory` if they exceed a quarter of the limit together: a small
  ///   file can ask for any number of large ones.
  func count(folded tensor: Tensor) throws(HalfstepError) {
    let (sum, overflow) = foldedBytes.addingReportingOverflow(tensor.byteCount)
    guard !overflow, sum <= limit / 4 else {
      throw HalfstepError(
        .outOfMemory, "node '\(currentNode)': constants exceed \(limit / 4) bytes",
        node: currentNode)
    }
    foldedBytes = sum
  }

  // MARK: Making values and steps

  /// A new tensor in the arena, row-major unless a layout is given.
  func makeValue(
    _ shape: Shape, _ dataType: DataType = .float32, layout: MemoryDescriptor? = nil
  ) throws(HalfstepError) -> Value {
    let bytes = layout?.byteCount ?? Tensor.byteCount(of: dataType, count: shape.elementCount)
    guard bytes <= limit else {
      throw HalfstepError(
        .outOfMemory,
        "node '\(currentNode)': a tensor \(shape) exceeds the limit of \(limit) bytes",
        node: currentNode)
    }
    var layout = layout
    if let given = layout, let plain = try? MemoryDescriptor(shape.dimensions), given == plain {
      layout = nil
    }
    return Value(shape: shape, dataType: dataType, buffer: Buffer(arena: bytes), layout: layout)
  }

  /// Another shape over the memory of a row-major value.
  func view(_ value: Value, as shape: Shape) throws(HalfstepError) -> Value {
    if let tensor = value.constant {
      return Value(constant: try tensor.reshaped(shape), staticName: nil)
    }
    let source = try plain(value)
    return Value(shape: shape, dataType: source.dataType, buffer: source.buffer)
  }

  func emit(_ step: Step) { steps.append(step) }

  /// Appends a step of our own kernels.
  func emit(
    _ label: String, reads: [Value], writes: [Value], inPlace: (Value, Value)? = nil,
    _ body: @escaping () throws(HalfstepError) -> Void
  ) {
    steps.append(
      Step(
        label: "\(label) '\(currentNode)'", reads: reads.map(\.buffer),
        writes: writes.map(\.buffer),
        inPlace: inPlace.map { ($0.0.buffer, $0.1.buffer) }, body: body))
  }

  /// Names the node that the following steps belong to.
  func begin(_ node: Node) { currentNode = node.label }

  // MARK: Layouts

  /// The value in row-major order.
  func plain(_ value: Value) throws(HalfstepError) -> Value {
    if value.isPlain { return value }
    return try arranged(value, nil)
  }

  /// The value in a given layout; nil means row-major.
  func arranged(_ value: Value, _ target: MemoryDescriptor?) throws(HalfstepError) -> Value {
    let from = try value.descriptor()
    let to: MemoryDescriptor
    if let target { to = target } else { to = try MemoryDescriptor(value.dimensions) }
    if from == to { return value }
    if let copy = value.copies.first(where: { copy in
      copy.layout == target || (copy.layout.map { $0 == to } ?? false)
    }) {
      return copy.value
    }
    if let tensor = value.constant {
      let storage = try constants.arranged(tensor, name: value.staticName, from: from, to: to)
      let copy = Value(
        shape: value.shape, dataType: .float32,
        buffer: Buffer(constant: storage, byteCount: to.byteCount), layout: target)
      value.copies.append((target, copy))
      return copy
    }
    let copy: Value
    if let walk = from.walk, walk == to.walk {
      copy = Value(shape: value.shape, dataType: .float32, buffer: value.buffer, layout: target)
    } else {
      copy = try makeValue(value.shape, layout: to)
      try emitReorder(from: value.buffer, from, to: copy.buffer, to)
    }
    value.copies.append((target, copy))
    return copy
  }

  private func emitReorder(
    from source: Buffer, _ from: MemoryDescriptor, to target: Buffer, _ to: MemoryDescriptor
  ) throws(HalfstepError) {
    let descriptor = try PrimitiveDescriptor.reorder(from: from, to: to)
    try emit(
      descriptor, label: "reorder",
      [(DNNL_ARG_FROM, from, source)], [(DNNL_ARG_TO, to, target)])
  }

  typealias Binding = (argument: Int32, descriptor: MemoryDescriptor, buffer: Buffer)

  /// Appends a primitive; its scratchpad becomes a buffer that lives for this step.
  func emit(
    _ descriptor: PrimitiveDescriptor, label: String, _ reads: [Binding], _ writes: [Binding],
    inPlace: (input: Buffer, output: Buffer)? = nil, copiesFirst: Bool = false
  ) throws(HalfstepError) {
    var bindings = reads + writes
    var written = writes.map(\.buffer)
    if let scratchpad = descriptor.descriptor(dnnl_query_scratchpad_md), scratchpad.byteCount > 0 {
      let buffer = Buffer(arena: scratchpad.byteCount)
      bindings.append((DNNL_ARG_SCRATCHPAD, scratchpad, buffer))
      written.append(buffer)
    }
    let name = "\(label) '\(currentNode)' \(descriptor.implementation)"
    let call = try PrimitiveCall(Primitive(descriptor), label: name, bindings)
    let reading = reads.map(\.buffer) + (copiesFirst ? [inPlace?.input].compactMap { $0 } : [])
    steps.append(
      Step(label: name, reads: reading, writes: written, inPlace: inPlace) {
        () throws(HalfstepError) in
        if copiesFirst, let (source, target) = inPlace, try source.bytes != target.bytes {
          try target.bytes.copyMemory(from: source.bytes, byteCount: target.byteCount)
        }
        try call.run()
      })
  }
}

extension PrimitiveDescriptor {
  /// A copy between layouts.
  static func reorder(
    from: MemoryDescriptor, to: MemoryDescriptor
  ) throws(HalfstepError) -> PrimitiveDescriptor {
    let engine = try Engine.shared().handle
    let attributes = try PrimitiveAttributes()
    var handle: OpaquePointer?
    let status = withUnsafePointer(to: from.raw) { source in
      withUnsafePointer(to: to.raw) { target in
        dnnl_reorder_primitive_desc_create(
          &handle, source, engine, target, engine, attributes.handle)
      }
    }
    try Engine.check(status, "reordering \(from.dimensions)")
    guard let handle else { throw HalfstepError(.internalError, "oneDNN: no reorder") }
    return PrimitiveDescriptor(owning: handle)
  }
}
