// SPDX-License-Identifier: Apache-2.0
// Operators that make tensors out of attributes and shapes.

import HalfstepGraph
import HalfstepNumerics

let constantOperators: [String: OperatorBuilder] = [
  "Constant": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    let tensor: Tensor
    guard let (key, attribute) = node.attributes.first(where: { $0.key.hasPrefix("value") }) else {
      throw HalfstepError(.invalidGraph, "value is missing")
    }
    switch attribute {
    case .tensor(let given):
      tensor = try Conversion.convert(given, to: Conversion.runtimeType(given.dataType))
    case .float(let number): tensor = try Tensor([number], shape: [])
    case .floats(let numbers): tensor = try Tensor(numbers, shape: [numbers.count])
    case .int(let number): tensor = try Tensor(elements: [number], .int64, shape: [])
    case .ints(let numbers): tensor = try Tensor(numbers)
    default:
      throw HalfstepError(.unsupportedOperator, "attribute '\(key)' is not supported")
    }
    return [Value(constant: tensor, staticName: node.outputs.first)]
  },
  "ConstantOfShape": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    guard let dimensions = try lowering.constantIntegers(node, 0) else {
      throw HalfstepError(.invalidGraph, "input 0 is missing")
    }
    var element = try Tensor([0], shape: [1])
    if case .tensor(let given)? = node.attributes["value"] {
      guard given.count == 1 else {
        throw HalfstepError(.invalidGraph, "value \(given.shape): expected one element")
      }
      element = try Conversion.convert(given, to: Conversion.runtimeType(given.dataType))
    }
    let shape = try Shape(dimensions)
    let scalar = Value(constant: element, staticName: nil)
    let strides = [Int](repeating: 0, count: shape.rank)
    return [try lowering.copy("ConstantOfShape", scalar, shape, from: strides)]
  },
  "Shape": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    let value = try lowering.input(node, 0)
    func bound(_ key: String, _ fallback: Int) -> Int {
      let given = node.intAttribute(key) ?? fallback
      let absolute = given < 0 ? given.addingReportingOverflow(value.rank).partialValue : given
      return min(max(absolute, 0), value.rank)
    }
    let start = bound("start", 0)
    let end = max(start, bound("end", value.rank))
    let extents = value.dimensions[start..<end].map(Int64.init)
    return [Value(constant: try Tensor(extents), staticName: nil)]
  },
  "Size": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    let count = Int64(try lowering.input(node, 0).count)
    return [Value(constant: try Tensor(elements: [count], .int64, shape: []), staticName: nil)]
  },
  "Range": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    var bounds: [Tensor] = []
    for index in 0..<3 {
      guard let tensor = try lowering.input(node, index).constant, tensor.count == 1 else {
        throw HalfstepError(.unsupportedOperator, "input \(index): expected a constant scalar")
      }
      bounds.append(tensor)
    }
    var numbers: [Double] = []
    for tensor in bounds {
      let wide = try Conversion.convert(tensor, to: .float64)
      numbers.append(
        try wide.withElements(.float64) { (v: UnsafeBufferPointer<Double>) in v[0] })
    }
    let count = ((numbers[1] - numbers[0]) / numbers[2]).rounded(.up)
    guard numbers[2] != 0, count < Double(1 << 24) else {
      throw HalfstepError(.invalidGraph, "range \(numbers): too many elements")
    }
    // An end on the wrong side of the start, however far, makes an empty range.
    let total = Int(max(0, count))
    let values = (0..<total).map { numbers[0] + Double($0) * numbers[2] }
    let tensor = try Tensor(elements: values, .float64, shape: [total])
    let result = try Conversion.convert(tensor, to: bounds[0].dataType)
    return [Value(constant: result, staticName: nil)]
  },
]
