// SPDX-License-Identifier: Apache-2.0
// Shapes that operators produce: broadcasting, reshaping, axes.

import HalfstepNumerics

/// Shapes that operators produce.
package enum ShapeRules {
  /// The common shape of operands after broadcasting as NumPy does.
  ///
  /// - Throws: `HalfstepError.shapeMismatch` if extents differ and none is 1.
  package static func broadcast(_ shapes: [Shape]) throws(HalfstepError) -> Shape {
    let rank = shapes.map(\.rank).max() ?? 0
    var result = [Int](repeating: 1, count: rank)
    for shape in shapes {
      for axis in 0..<shape.rank {
        let target = rank - shape.rank + axis
        let extent = shape[axis]
        if extent == result[target] || extent == 1 { continue }
        guard result[target] == 1 else {
          let list = shapes.map(\.description).joined(separator: " and ")
          throw HalfstepError(.shapeMismatch, "shapes \(list) do not broadcast")
        }
        result[target] = extent
      }
    }
    return try Shape(result)
  }

  /// The shape that `Reshape` produces: 0 keeps an extent, −1 takes what is left.
  ///
  /// - Throws: `HalfstepError.shapeMismatch` if the elements do not fit.
  package static func reshape(
    _ shape: Shape, to target: [Int], allowZero: Bool
  ) throws(HalfstepError) -> Shape {
    var result: [Int] = []
    var open: Int?
    for (axis, extent) in target.enumerated() {
      switch extent {
      case -1:
        guard open == nil else {
          throw HalfstepError(.shapeMismatch, "reshape to \(target): -1 occurs twice")
        }
        open = axis
        result.append(1)
      case 0 where !allowZero:
        guard axis < shape.rank else {
          throw HalfstepError(
            .shapeMismatch, "reshape of \(shape) to \(target): 0 at axis \(axis) has no source")
        }
        result.append(shape[axis])
      default:
        result.append(extent)
      }
    }
    let partial = try Shape(result)
    if let open {
      let others = partial.elementCount
      guard others > 0, shape.elementCount % others == 0 else {
        throw HalfstepError(.shapeMismatch, "cannot reshape \(shape) to \(target)")
      }
      result[open] = shape.elementCount / others
    }
    let final = try Shape(result)
    guard final.elementCount == shape.elementCount else {
      throw HalfstepError(.shapeMismatch, "cannot reshape \(shape) to \(target)")
    }
    return final
  }

  /// An axis counted from the front.
  ///
  /// - Throws: `HalfstepError.invalidGraph` if it is outside −rank...rank−1.
  package static func axis(_ axis: Int, rank: Int) throws(HalfstepError) -> Int {
    guard axis >= -rank, axis < rank else {
      throw HalfstepError(.invalidGraph, "axis \(axis) is outside rank \(rank)")
    }
    return axis < 0 ? axis + rank : axis
  }

  /// Axes counted from the front, in ascending order.
  ///
  /// - Throws: `HalfstepError.invalidGraph` if one is out of range or repeated.
  package static func axes(_ axes: [Int], rank: Int) throws(HalfstepError) -> [Int] {
    var result: [Int] = []
    for item in axes { result.append(try axis(item, rank: rank)) }
    guard Set(result).count == result.count else {
      throw HalfstepError(.invalidGraph, "axes \(axes): an axis occurs twice")
    }
    return result.sorted()
  }
}
