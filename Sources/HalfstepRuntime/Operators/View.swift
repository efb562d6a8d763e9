// SPDX-License-Identifier: Apache-2.0
// Operators that change a tensor's shape and leave its elements where they are.

import HalfstepGraph
import HalfstepNumerics

let viewOperators: [String: OperatorBuilder] = [
  "Identity": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.input(node, 0)]
  },
  "Dropout": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    if let mode = try lowering.optionalInput(node, 2) {
      guard let tensor = mode.constant, tensor.dataType == .bool, tensor.count == 1,
        tensor.storage.baseAddress.load(as: UInt8.self) == 0
      else {
        throw HalfstepError(.unsupportedOperator, "training mode is not supported")
      }
    }
    return [try lowering.input(node, 0)]
  },
  "Reshape": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    let value = try lowering.input(node, 0)
    let target: [Int]
    if lowering.opset < 5 {
      target = node.intsAttribute("shape") ?? []
    } else {
      guard let given = try lowering.constantIntegers(node, 1) else {
        throw HalfstepError(.invalidGraph, "input 1 is missing")
      }
      target = given
    }
    let allowsZero = (node.intAttribute("allowzero") ?? 0) != 0
    let shape = try ShapeRules.reshape(value.shape, to: target, allowZero: allowsZero)
    return [try lowering.view(value, as: shape)]
  },
  "Flatten": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    let value = try lowering.input(node, 0)
    let given = node.intAttribute("axis") ?? 1
    let axis =
      given == value.rank ? given : try ShapeRules.axis(given, rank: max(value.rank, 1))
    let outer = value.dimensions.prefix(axis).reduce(1, *)
    let inner = value.dimensions.dropFirst(axis).reduce(1, *)
    return [try lowering.view(value, as: Shape([outer, inner]))]
  },
  "Squeeze": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    let value = try lowering.input(node, 0)
    let given = try lowering.axes(node)
    let axes =
      given == nil
      ? value.dimensions.indices.filter { value.shape[$0] == 1 }
      : try ShapeRules.axes(given ?? [], rank: value.rank)
    for axis in axes where value.shape[axis] != 1 {
      throw HalfstepError(
        .shapeMismatch, "axis \(axis) of \(value.shape): expected an extent of 1")
    }
    let kept = value.dimensions.indices.filter { !axes.contains($0) }.map { value.shape[$0] }
    return [try lowering.view(value, as: Shape(kept))]
  },
  "Unsqueeze": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    let value = try lowering.input(node, 0)
    guard let given = try lowering.axes(node) else {
      throw HalfstepError(.invalidGraph, "axes are missing")
    }
    let axes = try ShapeRules.axes(given, rank: value.rank + given.count)
    var dimensions = value.dimensions
    for axis in axes { dimensions.insert(1, at: axis) }
    return [try lowering.view(value, as: Shape(dimensions))]
  },
  "Cast": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    let value = try lowering.input(node, 0)
    guard let number = node.intAttribute("to"), let raw = Int32(exactly: number),
      let type = DataType(rawValue: raw)
    else { throw HalfstepError(.invalidGraph, "to: expected an element type") }
    return [try lowering.converted(value, to: type)]
  },
  "CastLike": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.converted(lowering.input(node, 0), to: lowering.input(node, 1).dataType)]
  },
]

extension Lowering {
  /// Axes of Squeeze and Unsqueeze: an attribute before opset 13, then an input.
  fileprivate func axes(_ node: Node) throws(HalfstepError) -> [Int]? {
    opset < 13 ? node.intsAttribute("axes") : try constantIntegers(node, 1)
  }
}
