// SPDX-License-Identifier: Apache-2.0
// QuantizeLinear and DequantizeLinear.

import HalfstepGraph
import HalfstepNumerics

let quantizationOperators: [String: OperatorBuilder] = [
  "QuantizeLinear": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.quantize(node)]
  },
  "DequantizeLinear": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.dequantize(node)]
  },
]

/// How a tensor's elements map to scales.
private struct ScaleMap {
  let channels: Int
  let inner: Int
  let scales: [Float]
  let zeros: [Int64]

  @inline(__always)
  func group(_ index: Int) -> Int { channels == 1 ? 0 : index / inner % channels }
}

extension Lowering {
  private func scaleMap(
    _ node: Node, _ value: Value
  ) throws(HalfstepError) -> (map: ScaleMap, type: DataType?) {
    guard let scales = try constantFloats(node, 1) else {
      throw HalfstepError(.invalidGraph, "input 1 is missing")
    }
    if (node.intAttribute("block_size") ?? 0) != 0 {
      throw HalfstepError(.unsupportedOperator, "block_size is not supported")
    }
    var zeros = [Int64](repeating: 0, count: scales.count)
    var type: DataType?
    if let zero = try optionalInput(node, 2) {
      guard let tensor = zero.constant, ArithmeticKernel.integerTypes.contains(tensor.dataType),
        tensor.count == scales.count
      else {
        throw HalfstepError(
          .unsupportedOperator, "input 2: expected \(scales.count) constant integers")
      }
      type = tensor.dataType
      zeros = try Conversion.convert(tensor, to: .int64).integers().map(Int64.init)
    }
    if scales.count == 1 {
      return (ScaleMap(channels: 1, inner: 1, scales: scales, zeros: zeros), type)
    }
    let axis = try ShapeRules.axis(node.intAttribute("axis") ?? 1, rank: value.rank)
    guard value.shape[axis] == scales.count else {
      throw HalfstepError(
        .shapeMismatch, "expected \(value.shape[axis]) scales, got \(scales.count)")
    }
    let inner = value.dimensions[(axis + 1)...].reduce(1, *)
    return (ScaleMap(channels: scales.count, inner: inner, scales: scales, zeros: zeros), type)
  }

  fileprivate func quantize(_ node: Node) throws(HalfstepError) -> Value {
    let value = try plain(floatInput(node, 0))
    let (map, given) = try scaleMap(node, value)
    var type = given ?? .uint8
    if given == nil, let number = node.intAttribute("output_dtype"), number != 0 {
      guard let raw = Int32(exactly: number), let declared = DataType(rawValue: raw) else {
        throw HalfstepError(.invalidGraph, "output_dtype \(number) is not known")
      }
      type = declared
    }
    let bounds: (Float, Float)
    switch type {
    case .uint8: bounds = (0, 255)
    case .int8: bounds = (-128, 127)
    case .uint16: bounds = (0, 65535)
    case .int16: bounds = (-32768, 32767)
    default:
      throw HalfstepError(.unsupportedOperator, "codes of \(type) are not supported")
    }
    // Codes as floats first, which are exact up to 2^24.
    let codes = try makeValue(value.shape)
    let (source, target, count) = (value.buffer, codes.buffer, value.count)
    emit("QuantizeLinear", reads: [value], writes: [codes], inPlace: (value, codes)) {
      () throws(HalfstepError) in
      let from = try source.floats
      let to = try target.floats
      for index in 0..<count {
        let group = map.group(index)
        let code = (from[index] / map.scales[group]).rounded(.toNearestOrEven)
        to[index] = min(max(code + Float(map.zeros[group]), bounds.0), bounds.1)
      }
    }
    return try converted(codes, to: type)
  }

  fileprivate func dequantize(_ node: Node) throws(HalfstepError) -> Value {
    let codes = try input(node, 0)
    guard ArithmeticKernel.integerTypes.contains(codes.dataType) else {
      throw HalfstepError(
        .typeMismatch, "input 0: codes of \(codes.dataType) are not supported")
    }
    let value = try plain(codes)
    let (map, _) = try scaleMap(node, value)
    let result = try makeValue(value.shape)
    let (source, target, count, type) = (value.buffer, result.buffer, value.count, value.dataType)
    let wide = Buffer(arena: Tensor.byteCount(of: .int64, count: count))
    emit(
      Step(
        label: "DequantizeLinear '\(currentNode)'", reads: [source], writes: [target, wide]
      ) { () throws(HalfstepError) in
        Conversion.run(type, try source.bytes, .int64, try wide.bytes, count: count)
        let from = try wide.bytes.assumingMemoryBound(to: Int64.self)
        let to = try target.floats
        for index in 0..<count {
          let group = map.group(index)
          to[index] = Float(from[index] &- map.zeros[group]) * map.scales[group]
        }
      })
    return result
  }
}
