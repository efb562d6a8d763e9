// SPDX-License-Identifier: Apache-2.0
// Max and average pooling, over windows and over whole pictures.

import CDNNL
import HalfstepGraph
import HalfstepNumerics

let poolingOperators: [String: OperatorBuilder] = [
  "MaxPool": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.pool(node, isMax: true)]
  },
  "AveragePool": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.pool(node, isMax: false)]
  },
  "GlobalAveragePool": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.globalPool(node, isMax: false)]
  },
  "GlobalMaxPool": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.globalPool(node, isMax: true)]
  },
]

extension Lowering {
  fileprivate func poolInput(_ node: Node) throws(HalfstepError) -> Value {
    let value = try floatInput(node, 0)
    guard value.rank >= 3, value.count > 0 else {
      throw HalfstepError(.shapeMismatch, "input \(value.shape): expected rank 3 or more")
    }
    return value
  }

  fileprivate func globalPool(_ node: Node, isMax: Bool) throws(HalfstepError) -> Value {
    let value = try poolInput(node)
    let spatial = Array(value.dimensions[2...])
    let shape = try Shape(Array(value.dimensions[..<2]) + spatial.map { _ in 1 })
    if value.rank > 5 {
      return try reduce(
        value, axes: Array(2..<value.rank), keepsAxes: true, isMax ? .maximum : .mean)
    }
    let ones = spatial.map { _ in 1 }
    let zeros = spatial.map { _ in 0 }
    let window = Window(
      kernel: spatial, strides: ones, dilations: ones, padBegin: zeros, padEnd: zeros)
    let algorithm = isMax ? dnnl_pooling_max : dnnl_pooling_avg_exclude_padding
    return try pool(value, to: shape, window, algorithm)
  }

  fileprivate func pool(_ node: Node, isMax: Bool) throws(HalfstepError) -> Value {
    let value = try poolInput(node)
    let geometry = try WindowGeometry(node, input: Array(value.dimensions[2...]))
    for axis in geometry.kernel.indices
    where geometry.padBegin[axis] >= geometry.reach(axis)
      || geometry.padEnd[axis] >= geometry.reach(axis)
    {
      throw HalfstepError(
        .invalidGraph,
        "paddings \(geometry.padBegin) and \(geometry.padEnd) must be smaller than the kernel "
          + "\(geometry.kernel)")
    }
    let shape = try Shape(Array(value.dimensions[..<2]) + geometry.output)
    let includesPadding = (node.intAttribute("count_include_pad") ?? 0) != 0
    let touched = geometry.touchedPadEnd
    let isDilated = geometry.dilations.contains { $0 != 1 }
    // oneDNN counts all padding that a window touches, ONNX only what is declared; a window that
    // ends early would need a negative padding.
    let exceedsPadding = zip(touched, geometry.padEnd).contains { $0 > $1 }
    // oneDNN visits every tap, those in the padding as well.
    let taps = try Shape(geometry.kernel).elementCount
    let isMostlyPadding = taps > Self.largeWindow && taps > geometry.input.reduce(1, *)
    if value.rank > 5 || isDilated || isMostlyPadding || touched.contains(where: { $0 < 0 })
      || (!isMax && includesPadding && exceedsPadding)
      || zip(touched, geometry.kernel).contains(where: { $0 >= $1 })
    {
      return try plainPool(value, shape, geometry, isMax: isMax, includesPadding: includesPadding)
    }
    let window = Window(
      kernel: geometry.kernel, strides: geometry.strides, dilations: geometry.dilations,
      padBegin: geometry.padBegin, padEnd: touched)
    let average =
      includesPadding ? dnnl_pooling_avg_include_padding : dnnl_pooling_avg_exclude_padding
    return try pool(value, to: shape, window, isMax ? dnnl_pooling_max : average)
  }

  /// Taps of a window from which it matters how many of them lie in the padding.
  private static let largeWindow = 1 << 12

  fileprivate struct Window {
    let kernel: [Int]
    let strides: [Int]
    let dilations: [Int]
    let padBegin: [Int]
    let padEnd: [Int]
  }

  private func pool(
    _ value: Value, to shape: Shape, _ window: Window, _ algorithm: dnnl_alg_kind_t
  ) throws(HalfstepError) -> Value {
    let source = try value.descriptor()
    let any = try MemoryDescriptor.any(shape.dimensions)
    var operation = dnnl_pooling_v2_desc_t()
    let strides = window.strides.map(Int64.init)
    let kernel = window.kernel.map(Int64.init)
    let dilations = window.dilations.map { Int64($0 - 1) }
    let padBegin = window.padBegin.map(Int64.init)
    let padEnd = window.padEnd.map(Int64.init)
    let status = withDescriptors(source, any, nil, any) { source, any, _, _ in
      dnnl_pooling_v2_forward_desc_init(
        &operation, dnnl_forward_inference, algorithm, source, any, strides, kernel, dilations,
        padBegin, padEnd)
    }
    try Engine.check(status, "describing the pooling of \(value.shape)")
    guard
      let descriptor = try PrimitiveDescriptor(
        operation: &operation, attributes: PrimitiveAttributes()),
      let target = descriptor.descriptor(dnnl_query_dst_md)
    else { throw HalfstepError(.internalError, "oneDNN cannot pool \(value.shape)") }
    return try emit(
      descriptor, label: "pool", [(DNNL_ARG_SRC, source, value.buffer)], result: shape, target, nil)
  }

  /// Any pooling, one element at a time.
  private func plainPool(
    _ given: Value, _ shape: Shape, _ geometry: WindowGeometry, isMax: Bool, includesPadding: Bool
  ) throws(HalfstepError) -> Value {
    let value = try plain(given)
    let result = try makeValue(shape)
    let (source, target) = (value.buffer, result.buffer)
    let planes = shape[0] * shape[1]
    let inputStrides = try Shape(geometry.input).strides
    let inputSize = geometry.input.reduce(1, *)
    let outputSize = geometry.output.reduce(1, *)
    let rank = geometry.input.count
    let taps = (0..<rank).map { axis in
      (0..<geometry.output[axis]).map { Taps(geometry, axis: axis, position: $0) }
    }
    let steps = (0..<rank).map { geometry.dilations[$0] * inputStrides[$0] }
    emit("pool", reads: [value], writes: [result]) { () throws(HalfstepError) in
      let from = try source.floats
      let to = try target.floats
      Parallel.forEachRange(planes, grain: 1) { _, range in
        for plane in range {
          var position = CounterIndex(geometry.output)
          for index in 0..<outputSize {
            var first = plane * inputSize
            var counted = 1
            var extents: [Int] = []
            for axis in 0..<rank {
              let window = taps[axis][position.turns[axis]]
              first += window.start * inputStrides[axis]
              counted *= window.declaredCount
              extents.append(window.count)
            }
            let inside = extents.reduce(1, *)
            var walk = OdometerIndex(extents, [steps])
            var best = -Float.infinity
            var sum: Float = 0
            for _ in 0..<inside {
              let element = from[first + walk.offsets[0]]
              best = element > best || element.isNaN ? element : best
              sum += element
              walk.advance()
            }
            let divisor = includesPadding ? counted : inside
            to[plane * outputSize + index] = isMax ? best : sum / Float(max(divisor, 1))
            position.advance()
          }
        }
      }
    }
    return result
  }
}

/// The part of a window that lies on the input, along one axis.
private struct Taps {
  /// Coordinate of the first tap on the input.
  let start: Int
  /// Taps on the input.
  let count: Int
  /// Taps on the input or the declared padding.
  let declaredCount: Int

  init(_ geometry: WindowGeometry, axis: Int, position: Int) {
    let (kernel, step) = (geometry.kernel[axis], geometry.dilations[axis])
    let origin = position * geometry.strides[axis] - geometry.padBegin[axis]
    // Number of taps that lie before a coordinate.
    func taps(before end: Int) -> Int {
      end <= origin ? 0 : min((end - origin + step - 1) / step, kernel)
    }
    let first = taps(before: 0)
    start = origin + first * step
    count = taps(before: geometry.input[axis]) - first
    declaredCount = taps(before: geometry.input[axis] + geometry.padEnd[axis])
  }
}

/// Position in a nest of loops.
struct CounterIndex {
  private let extents: [Int]
  private(set) var turns: [Int]

  init(_ extents: [Int]) {
    self.extents = extents
    self.turns = [Int](repeating: 0, count: extents.count)
  }

  mutating func advance() {
    for axis in extents.indices.reversed() {
      turns[axis] += 1
      if turns[axis] < extents[axis] { return }
      turns[axis] = 0
    }
  }
}
