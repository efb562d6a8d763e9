// SPDX-License-Identifier: Apache-2.0
// Resize and Upsample: nearest neighbor and linear.

import HalfstepGraph
import HalfstepNumerics

extension Lowering {
  func resize(_ node: Node) throws(HalfstepError) -> Value {
    let value = try floatInput(node, 0)
    guard value.count > 0 else {
      throw HalfstepError(.shapeMismatch, "input \(value.shape): expected elements")
    }
    let mode = node.stringAttribute("mode") ?? "nearest"
    guard mode == "nearest" || mode == "linear" else {
      throw HalfstepError(.unsupportedOperator, "mode '\(mode)' is not supported")
    }
    for key in ["antialias", "exclude_outside"] where (node.intAttribute(key) ?? 0) != 0 {
      throw HalfstepError(.unsupportedOperator, "\(key) is not supported")
    }
    let policy = node.stringAttribute("keep_aspect_ratio_policy") ?? "stretch"
    guard policy == "stretch" else {
      throw HalfstepError(.unsupportedOperator, "policy '\(policy)' is not supported")
    }
    var scales: [Float]?
    var sizes: [Int]?
    if node.opType == "Upsample" {
      if opset < 9 {
        if case .floats(let list)? = node.attributes["scales"] { scales = list }
      } else {
        scales = try constantFloats(node, 1)
      }
    } else if opset < 11 {
      scales = try constantFloats(node, 1)
    } else {
      scales = try constantFloats(node, 2)
      if scales?.isEmpty ?? true {
        scales = nil
        sizes = try constantIntegers(node, 3)
      }
    }
    let given = node.intsAttribute("axes") ?? Array(0..<value.rank)
    var axes: [Int] = []
    for axis in given { axes.append(try ShapeRules.axis(axis, rank: value.rank)) }
    var dimensions = value.dimensions
    var factors = [Double](repeating: 1, count: value.rank)
    guard (scales?.count ?? sizes?.count) == axes.count else {
      throw HalfstepError(.invalidGraph, "expected \(axes.count) scales or sizes")
    }
    for (index, axis) in axes.enumerated() {
      if let scales {
        let scale = Double(scales[index])
        let extent = (Double(value.shape[axis]) * scale).rounded(.down)
        guard scale > 0, extent >= 1, extent < Double(WindowGeometry.attributeLimit) else {
          throw HalfstepError(.invalidGraph, "scales \(scales): out of range")
        }
        factors[axis] = scale
        dimensions[axis] = Int(extent)
      } else if let sizes {
        guard (1...WindowGeometry.attributeLimit).contains(sizes[index]) else {
          throw HalfstepError(.invalidGraph, "sizes \(sizes): out of range")
        }
        factors[axis] = Double(sizes[index]) / Double(value.shape[axis])
        dimensions[axis] = sizes[index]
      }
    }
    let isOld = node.opType == "Upsample" || opset < 11
    let transform =
      isOld ? "asymmetric" : node.stringAttribute("coordinate_transformation_mode") ?? "half_pixel"
    let nearest = isOld ? "floor" : node.stringAttribute("nearest_mode") ?? "round_prefer_floor"
    let shape = try Shape(dimensions)
    guard shape.elementCount <= limit / 4 else {
      throw HalfstepError(.outOfMemory, "result \(shape): too large")
    }
    var tables: [[Tap]] = []
    for axis in 0..<value.rank {
      tables.append(
        try Tap.table(
          from: value.shape[axis], to: dimensions[axis], scale: factors[axis],
          stride: value.shape.strides[axis], transform: transform, isLinear: mode == "linear",
          nearest: nearest))
    }
    return try resample(value, shape, tables)
  }

  private func resample(
    _ given: Value, _ shape: Shape, _ tables: [[Tap]]
  ) throws(HalfstepError) -> Value {
    let value = try plain(given)
    let result = try makeValue(shape)
    let (source, target) = (value.buffer, result.buffer)
    // Axes that really change; the others contribute an offset only.
    let blended = tables.indices.filter { axis in tables[axis].contains { $0.weight != 0 } }
    let rank = tables.count
    guard rank > 0 else { return value }
    guard blended.count <= 4 else {
      throw HalfstepError(
        .unsupportedOperator, "linear resizing of \(blended.count) axes is not supported")
    }
    let inner = shape[rank - 1]
    emit("Resize", reads: [value], writes: [result]) { () throws(HalfstepError) in
      let from = try source.floats
      let to = try target.floats
      Parallel.forEachRange(shape.elementCount / inner, grain: 16) { _, range in
        var turns = [Int](repeating: 0, count: rank)
        for row in range {
          var rest = row
          for axis in stride(from: rank - 2, through: 0, by: -1) {
            turns[axis] = rest % shape[axis]
            rest /= shape[axis]
          }
          for column in 0..<inner {
            turns[rank - 1] = column
            var base = 0
            for axis in 0..<rank { base += tables[axis][turns[axis]].low }
            if blended.isEmpty {
              to[row * inner + column] = from[base]
              continue
            }
            var sum: Float = 0
            for corner in 0..<(1 << blended.count) {
              var offset = base
              var weight: Float = 1
              for (bit, axis) in blended.enumerated() {
                let tap = tables[axis][turns[axis]]
                if corner >> bit & 1 == 1 {
                  offset += tap.high - tap.low
                  weight *= tap.weight
                } else {
                  weight *= 1 - tap.weight
                }
              }
              sum += weight * from[offset]
            }
            to[row * inner + column] = sum
          }
        }
      }
    }
    return result
  }
}

/// The two source positions that a result position lies between, as offsets, and the share of the
/// second one.
private struct Tap {
  var low: Int
  var high: Int
  var weight: Float

  static func table(
    from: Int, to: Int, scale: Double, stride: Int, transform: String, isLinear: Bool,
    nearest: String
  ) throws(HalfstepError) -> [Tap] {
    var table: [Tap] = []
    table.reserveCapacity(to)
    for position in 0..<to {
      let x = Double(position)
      var source: Double
      switch transform {
      case "half_pixel": source = (x + 0.5) / scale - 0.5
      case "half_pixel_symmetric":
        let adjustment = Double(to) / (scale * Double(from))
        let center = Double(from) / 2
        source = center * (1 - adjustment) + (x + 0.5) / scale - 0.5
      case "pytorch_half_pixel": source = to > 1 ? (x + 0.5) / scale - 0.5 : 0
      case "asymmetric": source = x / scale
      case "align_corners":
        // The exact length counts, not the one that was rounded down.
        let length = scale * Double(from)
        source = length > 1 ? x * Double(from - 1) / (length - 1) : 0
      default:
        throw HalfstepError(
          .unsupportedOperator, "coordinate transformation '\(transform)' is not supported")
      }
      if !source.isFinite { source = 0 }
      let limit = Double(from - 1)
      if isLinear {
        let inside = min(max(source, 0), limit)
        let low = inside.rounded(.down)
        let next = min(low + 1, limit)
        table.append(
          Tap(low: Int(low) * stride, high: Int(next) * stride, weight: Float(inside - low)))
      } else {
        let rounded: Double
        switch nearest {
        case "floor": rounded = source.rounded(.down)
        case "ceil": rounded = source.rounded(.up)
        case "round_prefer_ceil": rounded = (source + 0.5).rounded(.down)
        default: rounded = (source - 0.5).rounded(.up)
        }
        let index = Int(min(max(rounded, 0), limit)) * stride
        table.append(Tap(low: index, high: index, weight: 0))
      }
    }
    return table
  }
}
