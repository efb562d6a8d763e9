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
    if value.rank > 5 || isDilated || touched.contains(where: { $0 < 0 })
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
    let kernelCount = try Shape(geometry.kernel).elementCount
    let inputSize = geometry.input.reduce(1, *)
    let outputSize = geometry.output.reduce(1, *)
    let rank = geometry.input.count
    emit("pool", reads: [value], writes: [result]) { () throws(HalfstepError) in
      let from = try source.floats
      let to = try target.floats
      Parallel.forEachRange(planes, grain: 1) { _, range in
        for plane in range {
          var position = CounterIndex(geometry.output)
          for index in 0..<outputSize {
            var best = -Float.infinity
            var sum: Float = 0
            var inside = 0
            var counted = 0
            var tap = CounterIndex(geometry.kernel)
            for _ in 0..<kernelCount {
              var offset = 0
              var isInside = true
              var isDeclared = true
              for axis in 0..<rank {
                let place =
                  position.turns[axis] * geometry.strides[axis]
                  + tap.turns[axis] * geometry.dilations[axis] - geometry.padBegin[axis]
                if place < 0 || place >= geometry.input[axis] {
                  isInside = false
                  if place >= geometry.input[axis] + geometry.padEnd[axis] { isDeclared = false }
                }
                offset += place * inputStrides[axis]
              }
              if isInside {
                let element = from[plane * inputSize + offset]
                best = element > best || element.isNaN ? element : best
                sum += element
                inside += 1
              }
              if isDeclared { counted += 1 }
              tap.advance()
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
