// SPDX-License-Identifier: Apache-2.0
// Arrays of numbers nested to a rectangular shape, as encodings 2.0.0 writes scales.

import HalfstepNumerics

/// Numbers nested to a rectangular shape; a bare number has the empty shape.
struct NestedNumbers {
  /// Extents, outermost first.
  private(set) var shape: [Int] = []
  /// Numbers in row-major order.
  private(set) var values: [Double] = []

  /// Reads a number or nested arrays of numbers.
  ///
  /// - Throws: `HalfstepError` at the element that is no number or breaks the shape.
  init(_ cursor: JSONCursor) throws(HalfstepError) {
    var first = cursor
    while case .array = first.value {
      let elements = try first.elements()
      guard let head = elements.first else { throw first.failure("expected a number or more") }
      shape.append(elements.count)
      first = head
    }
    try collect(cursor, depth: 0)
  }

  private init(shape: [Int], values: [Double]) {
    self.shape = shape
    self.values = values
  }

  private mutating func collect(_ cursor: JSONCursor, depth: Int) throws(HalfstepError) {
    guard depth < shape.count else {
      values.append(try cursor.number())
      return
    }
    let elements = try cursor.elements()
    guard elements.count == shape[depth] else {
      throw cursor.failure("expected \(shape[depth]) elements, got \(elements.count)")
    }
    for element in elements { try collect(element, depth: depth + 1) }
  }

  /// The scales of an entry, in any of the ways in which versions 2.0.0 and 2.1.0 give them.
  static func scales(
    of entry: JSONCursor, _ keys: [String: JSONCursor]
  ) throws(HalfstepError) -> NestedNumbers {
    if let scale = keys["y_scale"] {
      guard case .object = scale.value else { return try NestedNumbers(scale) }
      // The scales are quantized themselves: integers with a float scale for each channel.
      let parts = try scale.members(known: ["x", "x_scale", "axis"], required: ["x", "x_scale"])
      let axis = try parts["axis"]?.integer() ?? 0
      return try NestedNumbers(parts["x"]!).scaled(
        by: NestedNumbers(parts["x_scale"]!), axis: axis, scale)
    }
    guard let integers = keys["per_block_int_scale"], let floats = keys["per_channel_float_scale"]
    else { throw entry.failure("key 'y_scale' is missing") }
    return try NestedNumbers(integers).scaled(by: NestedNumbers(floats), axis: 0, entry)
  }

  /// The product with the scale of each channel, given along `axis` or in the same rank.
  private func scaled(
    by factors: NestedNumbers, axis: Int, _ cursor: JSONCursor
  ) throws(HalfstepError) -> NestedNumbers {
    var axis = axis < 0 ? axis + shape.count : axis
    if factors.shape.count == shape.count, shape.count > 1 {
      axis = factors.shape.firstIndex { $0 != 1 } ?? 0
    }
    guard shape.indices.contains(axis), factors.values.count == shape[axis] else {
      throw cursor.failure(
        "integer scales of shape \(shape) and float scales of shape \(factors.shape) do not match")
    }
    let inner = shape[(axis + 1)...].reduce(1, *)
    let result = values.enumerated().map { index, value in
      value * factors.values[index / inner % shape[axis]]
    }
    return NestedNumbers(shape: shape, values: result)
  }
}
