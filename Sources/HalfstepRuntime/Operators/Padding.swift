// SPDX-License-Identifier: Apache-2.0
// Pad.

import HalfstepGraph
import HalfstepNumerics

extension Lowering {
  func pad(_ node: Node) throws(HalfstepError) -> Value {
    let value = try input(node, 0)
    var pads: [Int]
    var fill: Float = 0
    if opset < 11 {
      pads = node.intsAttribute("pads") ?? node.intsAttribute("paddings") ?? []
      fill = node.floatAttribute("value") ?? 0
    } else {
      pads = try constantIntegers(node, 1) ?? []
      if let constant = try optionalInput(node, 2) {
        guard let tensor = constant.constant, tensor.count == 1 else {
          throw HalfstepError(.unsupportedOperator, "input 2: expected a constant scalar")
        }
        fill = try Conversion.convert(tensor, to: .float32).floats()[0]
      }
      if opset >= 18, let axes = try constantIntegers(node, 3) {
        guard pads.count == 2 * axes.count else {
          throw HalfstepError(.invalidGraph, "pads: expected \(2 * axes.count) numbers")
        }
        var full = [Int](repeating: 0, count: 2 * value.rank)
        for (index, given) in axes.enumerated() {
          let axis = try ShapeRules.axis(given, rank: value.rank)
          full[axis] = pads[index]
          full[value.rank + axis] = pads[axes.count + index]
        }
        pads = full
      }
    }
    guard pads.count == 2 * value.rank else {
      throw HalfstepError(.invalidGraph, "pads: expected \(2 * value.rank) numbers")
    }
    for number in pads where abs(number.clamped) > WindowGeometry.attributeLimit {
      throw HalfstepError(.invalidGraph, "pads \(pads): out of range")
    }
    let before = Array(pads[..<value.rank])
    let after = Array(pads[value.rank...])
    let mode = node.stringAttribute("mode") ?? "constant"
    if mode == "constant" { return try padded(value, before: before, after: after, value: fill) }
    guard ["reflect", "edge", "wrap"].contains(mode) else {
      throw HalfstepError(.invalidGraph, "mode '\(mode)' is not known")
    }
    return try mapped(value, before: before, after: after, mode: mode)
  }

  private func paddedShape(
    _ value: Value, _ before: [Int], _ after: [Int]
  ) throws(HalfstepError) -> Shape {
    var dimensions: [Int] = []
    for axis in 0..<value.rank {
      dimensions.append(value.shape[axis] + before[axis] + after[axis])
    }
    return try Shape(dimensions)
  }

  /// Appends a padding with a constant; negative numbers crop.
  func padded(
    _ value: Value, before: [Int], after: [Int], value fill: Float
  ) throws(HalfstepError) -> Value {
    let shape = try paddedShape(value, before, after)
    let source = try plain(value)
    let width = try elementWidth(source)
    let result = try makeValue(shape, source.dataType)
    let (inStrides, outStrides) = (source.shape.strides, shape.strides)
    var extents: [Int] = []
    var fromStart = 0
    var toStart = 0
    for axis in 0..<value.rank {
      let skipped = max(0, -before[axis])
      extents.append(
        max(0, value.shape[axis] - skipped - max(0, -after[axis])))
      fromStart += skipped * inStrides[axis]
      toStart += max(0, before[axis]) * outStrides[axis]
    }
    let copy = StridedCopy(
      extents, from: inStrides, to: outStrides, fromStart: fromStart, toStart: toStart,
      width: width)
    let isEmpty = extents.contains(0)
    let (from, to) = (source.buffer, result.buffer)
    let type = source.dataType
    let count = shape.elementCount
    emit("Pad", reads: [source], writes: [result]) { () throws(HalfstepError) in
      if type == .float32 {
        try to.floats.update(repeating: fill, count: count)
      } else {
        // One element converted, then repeated.
        var number = fill
        Conversion.run(.float32, &number, type, try to.bytes, count: min(count, 1))
        for index in 1..<max(count, 1) {
          (try to.bytes + index * width).copyMemory(from: try to.bytes, byteCount: width)
        }
      }
      if !isEmpty { copy.run(try from.bytes, try to.bytes) }
    }
    return result
  }

  /// Appends a padding that repeats the tensor's own elements.
  private func mapped(
    _ value: Value, before: [Int], after: [Int], mode: String
  ) throws(HalfstepError) -> Value {
    let shape = try paddedShape(value, before, after)
    let source = try plain(value)
    guard source.count > 0 else {
      throw HalfstepError(.shapeMismatch, "input \(value.shape): expected elements")
    }
    let width = try elementWidth(source)
    let result = try makeValue(shape, source.dataType)
    // For each axis, the source offset of each position of the result.
    var tables: [[Int]] = []
    for axis in 0..<value.rank {
      let extent = value.shape[axis]
      let stride = source.shape.strides[axis]
      var table: [Int] = []
      for position in 0..<shape[axis] {
        let place = position - before[axis]
        let index: Int
        switch mode {
        case "edge": index = min(max(place, 0), extent - 1)
        case "wrap": index = ((place % extent) + extent) % extent
        default:
          let period = max(2 * (extent - 1), 1)
          let phase = ((place % period) + period) % period
          index = extent == 1 ? 0 : phase < extent ? phase : period - phase
        }
        table.append(index * stride)
      }
      tables.append(table)
    }
    let (from, to) = (source.buffer, result.buffer)
    let rank = value.rank
    emit("Pad", reads: [source], writes: [result]) { () throws(HalfstepError) in
      var position = CounterIndex(shape.dimensions)
      let (from, to) = (try from.bytes, try to.bytes)
      for index in 0..<shape.elementCount {
        var offset = 0
        for axis in 0..<rank { offset += tables[axis][position.turns[axis]] }
        (to + index * width).copyMemory(from: from + offset * width, byteCount: width)
        position.advance()
      }
    }
    return result
  }
}

extension Int {
  /// The number, with the one that has no opposite moved by one.
  fileprivate var clamped: Int { self == .min ? .min + 1 : self }
}
