// SPDX-License-Identifier: Apache-2.0
// Elementwise operations on two or more tensors, with broadcasting.

import HalfstepGraph
import HalfstepNumerics

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// An operation on two elements.
enum Arithmetic: Hashable {
  case add, subtract, multiply, divide, minimum, maximum
  case power, remainder, floorRemainder, parametricRelu
  case equal, less, lessOrEqual, greater, greaterOrEqual
  case and, or, xor

  /// Whether the result is bool.
  var isComparison: Bool {
    switch self {
    case .equal, .less, .lessOrEqual, .greater, .greaterOrEqual: true
    default: false
    }
  }

  /// Whether two zeros make a zero, so that padding stays zero.
  var preservesZero: Bool {
    switch self {
    case .add, .subtract, .multiply, .minimum, .maximum, .parametricRelu: true
    default: false
    }
  }
}

let arithmeticOperators: [String: OperatorBuilder] = {
  var table: [String: OperatorBuilder] = [:]
  let binary: [(String, Arithmetic)] = [
    ("Add", .add), ("Sub", .subtract), ("Mul", .multiply), ("Div", .divide), ("Pow", .power),
    ("Equal", .equal), ("Less", .less), ("LessOrEqual", .lessOrEqual), ("Greater", .greater),
    ("GreaterOrEqual", .greaterOrEqual), ("And", .and), ("Or", .or), ("Xor", .xor),
  ]
  for (name, operation) in binary {
    table[name] = OperatorBuilder { (lowering, node) throws(HalfstepError) in
      let (a, b) = try lowering.alignedOperands(node)
      return [try lowering.arithmetic(operation, a, b)]
    }
  }
  table["Mod"] = OperatorBuilder { (lowering, node) throws(HalfstepError) in
    let (a, b) = try lowering.alignedOperands(node)
    let isC = (node.intAttribute("fmod") ?? 0) != 0
    return [try lowering.arithmetic(isC ? .remainder : .floorRemainder, a, b)]
  }
  let variadic: [(String, Arithmetic)] = [("Min", .minimum), ("Max", .maximum), ("Sum", .add)]
  for (name, operation) in variadic {
    table[name] = OperatorBuilder { (lowering, node) throws(HalfstepError) in
      [try lowering.variadic(operation, node)]
    }
  }
  table["Mean"] = OperatorBuilder { (lowering, node) throws(HalfstepError) in
    let sum = try lowering.variadic(.add, node)
    let count = try Tensor([Float(node.inputs.count)], shape: [])
    return [try lowering.arithmetic(.divide, sum, Value(constant: count, staticName: nil))]
  }
  table["Where"] = OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.select(node)]
  }
  table["Not"] = OperatorBuilder { (lowering, node) throws(HalfstepError) in
    let value = try lowering.input(node, 0)
    guard value.dataType == .bool else {
      throw HalfstepError(.typeMismatch, "input 0: expected bool, got \(value.dataType)")
    }
    let one = try Tensor(elements: [UInt8(1)], .bool, shape: [])
    return [try lowering.arithmetic(.xor, value, Value(constant: one, staticName: nil))]
  }
  return table
}()

extension Lowering {
  /// The two operands of a node; before opset 7 the second one is aligned at `axis`.
  func alignedOperands(_ node: Node) throws(HalfstepError) -> (Value, Value) {
    let a = try input(node, 0)
    let b = try input(node, 1)
    guard opset < 7, (node.intAttribute("broadcast") ?? 0) != 0,
      let axis = node.intAttribute("axis")
    else { return (a, b) }
    let start = try ShapeRules.axis(axis, rank: max(a.rank, 1))
    let trailing = a.rank - start - b.rank
    guard trailing >= 0 else {
      throw HalfstepError(.shapeMismatch, "shape \(b.shape) does not fit at axis \(axis)")
    }
    let shape = try Shape(b.dimensions + [Int](repeating: 1, count: trailing))
    return (a, try view(b, as: shape))
  }

  fileprivate func variadic(
    _ operation: Arithmetic, _ node: Node
  ) throws(HalfstepError) -> Value {
    var result = try input(node, 0)
    for index in 1..<max(node.inputs.count, 1) {
      result = try arithmetic(operation, result, input(node, index))
    }
    return result
  }

  fileprivate func select(_ node: Node) throws(HalfstepError) -> Value {
    let condition = try input(node, 0)
    guard condition.dataType == .bool else {
      throw HalfstepError(
        .typeMismatch, "input 0: expected bool, got \(condition.dataType)")
    }
    let a = try plain(input(node, 1))
    let b = try plain(input(node, 2))
    guard a.dataType == b.dataType else {
      throw HalfstepError(.typeMismatch, "inputs of \(a.dataType) and \(b.dataType)")
    }
    let width = try elementWidth(a)
    let shape = try ShapeRules.broadcast([condition.shape, a.shape, b.shape])
    let result = try makeValue(shape, a.dataType)
    let ca = BroadcastLoop.strides(of: condition.shape, in: shape)
    let sa = BroadcastLoop.strides(of: a.shape, in: shape)
    let sb = BroadcastLoop.strides(of: b.shape, in: shape)
    let buffers = (condition.buffer, a.buffer, b.buffer, result.buffer)
    emit("Where", reads: [condition, a, b], writes: [result]) { () throws(HalfstepError) in
      var index = OdometerIndex(shape.dimensions, [ca, sa, sb])
      let flags = try buffers.0.bytes.assumingMemoryBound(to: UInt8.self)
      let (first, second, to) = (try buffers.1.bytes, try buffers.2.bytes, try buffers.3.bytes)
      for position in 0..<shape.elementCount {
        let source =
          flags[index.offsets[0]] != 0
          ? first + index.offsets[1] * width : second + index.offsets[2] * width
        (to + position * width).copyMemory(from: source, byteCount: width)
        index.advance()
      }
    }
    return result
  }

  /// Appends an operation on two tensors, in the layout of the larger one where possible.
  func arithmetic(
    _ operation: Arithmetic, _ first: Value, _ second: Value
  ) throws(HalfstepError) -> Value {
    guard first.dataType == second.dataType else {
      if operation == .power, first.isFloat || first.dataType == .int64 || first.dataType == .int32
      {
        return try arithmetic(.power, first, converted(second, to: first.dataType))
      }
      throw HalfstepError(
        .typeMismatch, "operands of \(first.dataType) and \(second.dataType)")
    }
    try checkTypes(operation, first.dataType)
    let shape = try ShapeRules.broadcast([first.shape, second.shape])
    var a = first
    var b = second
    let type = operation.isComparison ? DataType.bool : first.dataType
    var layout: MemoryDescriptor?
    if !operation.isComparison,
      let leader = [a, b].first(where: { !$0.isPlain && $0.shape == shape })
    {
      layout = leader.layout
    }
    var nest: [MemoryDescriptor.Factor]?
    if let chosen = layout {
      if a.shape == shape { a = try arranged(a, chosen) }
      if b.shape == shape { b = try arranged(b, chosen) }
      let isSame = a.shape == shape && b.shape == shape
      if !isSame { nest = chosen.factors }
      if isSame ? chosen.paddingZeros > 0 && !operation.preservesZero : nest == nil {
        layout = nil
        nest = nil
      }
    }
    if layout == nil || a.shape != shape { a = try plain(a) }
    if layout == nil || b.shape != shape { b = try plain(b) }
    let result = try makeValue(shape, type, layout: layout)
    let loop: BroadcastLoop
    if let layout, nest == nil {
      loop = BroadcastLoop(vector: layout.elementCount)
    } else if let nest {
      loop = BroadcastLoop(shape, a: a.shape, b: b.shape, nest: nest)
    } else {
      loop = BroadcastLoop(shape, a: a.shape, b: b.shape)
    }
    let buffers = (a.buffer, b.buffer, result.buffer)
    let dataType = a.dataType
    // Only an operand of the full shape may share its memory with the result.
    let shared: Value? =
      a.shape == shape && !operation.isComparison
      ? a : b.shape == shape && !operation.isComparison ? b : nil
    emit(
      "\(operation)", reads: [a, b], writes: [result], inPlace: shared.map { ($0, result) }
    ) { () throws(HalfstepError) in
      ArithmeticKernel.run(
        operation, dataType, try buffers.0.bytes, try buffers.1.bytes, try buffers.2.bytes, loop)
    }
    return result
  }

  private func checkTypes(
    _ operation: Arithmetic, _ type: DataType
  ) throws(HalfstepError) {
    let isLogical = [.and, .or, .xor].contains(operation)
    if isLogical == (type == .bool) || (operation == .equal && type == .bool) {
      if type == .float32 || type == .bool || ArithmeticKernel.integerTypes.contains(type) {
        return
      }
    }
    throw HalfstepError(.typeMismatch, "operands of \(type) are not supported")
  }

  /// The tensor with elements of another type.
  func converted(_ value: Value, to type: DataType) throws(HalfstepError) -> Value {
    let source = try plain(value)
    let target = Conversion.runtimeType(type)
    if source.dataType == target { return source }
    try Conversion.check(source.dataType, target)
    let result = try makeValue(source.shape, target)
    let (from, to, count) = (source.buffer, result.buffer, source.count)
    let types = (source.dataType, target)
    emit("Cast", reads: [source], writes: [result]) { () throws(HalfstepError) in
      Conversion.run(types.0, try from.bytes, types.1, try to.bytes, count: count)
    }
    return result
  }

  /// Bytes of an element, for kernels that only move elements.
  func elementWidth(_ value: Value) throws(HalfstepError) -> Int {
    guard let bits = value.dataType.bitWidth, bits >= 8 else {
      throw HalfstepError(.typeMismatch, "tensors of \(value.dataType) are not supported")
    }
    return bits / 8
  }
}
