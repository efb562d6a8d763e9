// SPDX-License-Identifier: Apache-2.0
// Reductions over axes.

import HalfstepGraph
import HalfstepNumerics

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// What a reduction computes.
enum Reduction: Hashable {
  case sum, mean, maximum, minimum, product, sumOfSquares, sumOfMagnitudes, norm, logSum, logSumExp
}

let reductionOperators: [String: OperatorBuilder] = {
  var table: [String: OperatorBuilder] = [:]
  let kinds: [(String, Reduction, axesAreInputSince: Int)] = [
    ("ReduceSum", .sum, 13), ("ReduceMean", .mean, 18), ("ReduceMax", .maximum, 18),
    ("ReduceMin", .minimum, 18), ("ReduceProd", .product, 18),
    ("ReduceSumSquare", .sumOfSquares, 18), ("ReduceL1", .sumOfMagnitudes, 18),
    ("ReduceL2", .norm, 18), ("ReduceLogSum", .logSum, 18), ("ReduceLogSumExp", .logSumExp, 18),
  ]
  for (name, reduction, version) in kinds {
    table[name] = OperatorBuilder { (lowering, node) throws(HalfstepError) in
      let value = try lowering.input(node, 0)
      var axes = node.intsAttribute("axes") ?? []
      if lowering.opset >= version { axes = try lowering.constantIntegers(node, 1) ?? axes }
      if axes.isEmpty {
        if (node.intAttribute("noop_with_empty_axes") ?? 0) != 0 {
          return [try lowering.reduce(value, axes: [], keepsAxes: true, reduction)]
        }
        axes = Array(0..<value.rank)
      }
      let sorted = try ShapeRules.axes(axes, rank: value.rank)
      let keepsAxes = (node.intAttribute("keepdims") ?? 1) != 0
      return [try lowering.reduce(value, axes: sorted, keepsAxes: keepsAxes, reduction)]
    }
  }
  for (name, isMaximum) in [("ArgMax", true), ("ArgMin", false)] {
    table[name] = OperatorBuilder { (lowering, node) throws(HalfstepError) in
      [try lowering.argument(node, isMaximum: isMaximum)]
    }
  }
  return table
}()

/// The elements that one result of a reduction is made of, as runs with a constant stride.
///
/// A list of all offsets would take twice the memory of the tensor itself.
private struct ReducedElements {
  /// Elements of a result.
  let count: Int
  /// Elements of a run, and the distance between them.
  let runLength: Int
  let runStride: Int
  /// Extents and strides of the loops around the runs.
  private let extents: [Int]
  private let strides: [Int]

  /// - Parameters:
  ///   - extents: Extents of the axes that are reduced, outermost first.
  ///   - strides: Elements between neighbors along each of them.
  init(_ extents: [Int], _ strides: [Int]) {
    count = extents.contains(0) ? 0 : extents.reduce(1, *)
    var loops: [(extent: Int, stride: Int)] = []
    for (extent, stride) in zip(extents, strides) where extent != 1 {
      if let last = loops.last, last.stride == stride * extent {
        loops[loops.count - 1] = (last.extent * extent, stride)
      } else {
        loops.append((extent, stride))
      }
    }
    let run = loops.popLast() ?? (extent: 1, stride: 0)
    (runLength, runStride) = (run.extent, run.stride)
    self.extents = loops.map(\.extent)
    self.strides = loops.map(\.stride)
  }

  /// Where the runs begin; none if there are no elements.
  func runOffsets() -> [Int] {
    guard count > 0 else { return [] }
    var position = OdometerIndex(extents, [strides])
    return (0..<count / runLength).map { _ in
      defer { position.advance() }
      return position.offsets[0]
    }
  }
}

/// x to the power y; here so that other files need not import the C library.
func powerOf(_ x: Float, _ y: Float) -> Float { powf(x, y) }

extension Lowering {
  /// Appends a reduction, accumulated in double precision.
  func reduce(
    _ given: Value, axes: [Int], keepsAxes: Bool, _ reduction: Reduction
  ) throws(HalfstepError) -> Value {
    let type = given.dataType
    let isInteger = ArithmeticKernel.integerTypes.contains(type)
    guard given.isFloat || isInteger else {
      throw HalfstepError(.typeMismatch, "input 0: tensors of \(type) are not supported")
    }
    // Integers up to 2^24 pass through floats unchanged, which covers counts and extents.
    let value = try plain(converted(given, to: .float32))
    let reduced = Set(axes)
    var kept: [Int] = []
    var full: [Int] = []
    for axis in 0..<value.rank {
      full.append(reduced.contains(axis) ? 1 : value.shape[axis])
      if !reduced.contains(axis) { kept.append(value.shape[axis]) }
    }
    let shape = try Shape(keepsAxes ? full : kept)
    let strides = value.shape.strides
    let outerAxes = (0..<value.rank).filter { !reduced.contains($0) }
    let outerExtents = outerAxes.map { value.shape[$0] }
    let outerStrides = outerAxes.map { strides[$0] }
    let walk = ReducedElements(axes.map { value.shape[$0] }, axes.map { strides[$0] })
    let total = shape.elementCount
    let result = try makeValue(shape)
    let (source, target) = (value.buffer, result.buffer)
    emit("\(reduction)", reads: [value], writes: [result]) { () throws(HalfstepError) in
      if total == 0 { return }
      let from = try source.floats
      let to = try target.floats
      let offsets = walk.runOffsets()
      Parallel.forEachRange(total, grain: max(1, (1 << 13) / max(walk.count, 1))) { _, range in
        var position = OdometerIndex(outerExtents, [outerStrides], start: range.lowerBound)
        for index in range {
          to[index] = Self.reduce(from + position.offsets[0], offsets, walk, reduction)
          position.advance()
        }
      }
    }
    return isInteger ? try converted(result, to: type) : result
  }

  private static func reduce(
    _ from: UnsafePointer<Float>, _ offsets: [Int], _ walk: ReducedElements, _ reduction: Reduction
  ) -> Float {
    func fold(_ start: Double, _ body: (Double, Double) -> Double) -> Double {
      var state = start
      for offset in offsets {
        let run = from + offset
        for index in 0..<walk.runLength {
          state = body(state, Double(run[index * walk.runStride]))
        }
      }
      return state
    }
    switch reduction {
    case .sum: return Float(fold(0) { $0 + $1 })
    case .mean: return Float(fold(0) { $0 + $1 } / Double(walk.count))
    case .maximum: return Float(fold(-.infinity) { $1 > $0 || $1.isNaN ? $1 : $0 })
    case .minimum: return Float(fold(.infinity) { $1 < $0 || $1.isNaN ? $1 : $0 })
    case .product: return Float(fold(1) { $0 * $1 })
    case .sumOfSquares: return Float(fold(0) { $0 + $1 * $1 })
    case .sumOfMagnitudes: return Float(fold(0) { $0 + abs($1) })
    case .norm: return Float(fold(0) { $0 + $1 * $1 }.squareRoot())
    case .logSum: return Float(log(fold(0) { $0 + $1 }))
    case .logSumExp:
      let top = fold(-.infinity) { max($0, $1) }
      if !top.isFinite { return Float(top) }
      return Float(top + log(fold(0) { $0 + exp($1 - top) }))
    }
  }

  fileprivate func argument(_ node: Node, isMaximum: Bool) throws(HalfstepError) -> Value {
    let value = try plain(floatInput(node, 0))
    let axis = try ShapeRules.axis(node.intAttribute("axis") ?? 0, rank: value.rank)
    let takesLast = (node.intAttribute("select_last_index") ?? 0) != 0
    var dimensions = value.dimensions
    dimensions[axis] = 1
    if (node.intAttribute("keepdims") ?? 1) == 0 { dimensions.remove(at: axis) }
    let extent = value.shape[axis]
    guard extent > 0 else {
      throw HalfstepError(.shapeMismatch, "input \(value.shape): axis \(axis) is empty")
    }
    let inner = value.dimensions[(axis + 1)...].reduce(1, *)
    let shape = try Shape(dimensions)
    let result = try makeValue(shape, .int64)
    let (source, target) = (value.buffer, result.buffer)
    emit("argument", reads: [value], writes: [result]) { () throws(HalfstepError) in
      let from = try source.floats
      let to = try target.bytes.assumingMemoryBound(to: Int64.self)
      for index in 0..<shape.elementCount {
        let start = (index / inner) * extent * inner + index % inner
        var best = 0
        for turn in 1..<max(extent, 1) {
          let (x, y) = (from[start + turn * inner], from[start + best * inner])
          if (isMaximum ? x > y : x < y) || (takesLast && x == y) { best = turn }
        }
        to[index] = Int64(best)
      }
    }
    return result
  }
}
