// SPDX-License-Identifier: Apache-2.0
// Operators that move elements: transposes, slices, joins, paddings.

import CDNNL
import HalfstepGraph
import HalfstepNumerics

let movementOperators: [String: OperatorBuilder] = [
  "Transpose": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.transpose(node)]
  },
  "Slice": OperatorBuilder { (lowering, node) throws(HalfstepError) in [try lowering.slice(node)] },
  "Split": OperatorBuilder { (lowering, node) throws(HalfstepError) in try lowering.split(node) },
  "Concat": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.concatenate(node)]
  },
  "Expand": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    let value = try lowering.input(node, 0)
    guard let target = try lowering.constantIntegers(node, 1) else {
      throw HalfstepError(.invalidGraph, "input 1 is missing")
    }
    let shape = try ShapeRules.broadcast([value.shape, Shape(target)])
    let strides = BroadcastLoop.strides(of: value.shape, in: shape)
    return [try lowering.copy("Expand", value, shape, from: strides)]
  },
  "Tile": OperatorBuilder { (lowering, node) throws(HalfstepError) in [try lowering.tile(node)] },
  "Pad": OperatorBuilder { (lowering, node) throws(HalfstepError) in [try lowering.pad(node)] },
  "Gather": OperatorBuilder { (lowering, node) throws(HalfstepError) in [try lowering.gather(node)]
  },
  "DepthToSpace": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.depthToSpace(node)]
  },
  "SpaceToDepth": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.spaceToDepth(node)]
  },
  "Resize": OperatorBuilder { (lowering, node) throws(HalfstepError) in [try lowering.resize(node)]
  },
  "Upsample": OperatorBuilder { (lowering, node) throws(HalfstepError) in
    [try lowering.resize(node)]
  },
]

extension Lowering {
  /// Appends a copy to a new row-major tensor, reading with the given strides.
  func copy(
    _ label: String, _ value: Value, _ shape: Shape, from strides: [Int], start: Int = 0
  ) throws(HalfstepError) -> Value {
    let source = try plain(value)
    let width = try elementWidth(source)
    let result = try makeValue(shape, source.dataType)
    if shape.elementCount == 0 { return result }
    let copy = StridedCopy(
      shape.dimensions, from: strides, to: shape.strides, fromStart: start, width: width)
    let (from, to) = (source.buffer, result.buffer)
    emit(label, reads: [source], writes: [result]) { () throws(HalfstepError) in
      copy.run(try from.bytes, try to.bytes)
    }
    return result
  }

  fileprivate func transpose(_ node: Node) throws(HalfstepError) -> Value {
    let value = try input(node, 0)
    let order = node.intsAttribute("perm") ?? Array((0..<value.rank).reversed())
    guard order.sorted() == Array(0..<value.rank) else {
      throw HalfstepError(
        .invalidGraph, "perm \(order): expected a permutation of \(value.rank) axes")
    }
    let shape = try Shape(order.map { value.shape[$0] })
    let strides = value.shape.strides
    return try copy("Transpose", value, shape, from: order.map { strides[$0] })
  }

  fileprivate func slice(_ node: Node) throws(HalfstepError) -> Value {
    let value = try input(node, 0)
    let starts: [Int]
    let ends: [Int]
    var axes: [Int]?
    var steps: [Int]?
    if opset < 10 {
      starts = node.intsAttribute("starts") ?? []
      ends = node.intsAttribute("ends") ?? []
      axes = node.intsAttribute("axes")
    } else {
      starts = try constantIntegers(node, 1) ?? []
      ends = try constantIntegers(node, 2) ?? []
      axes = try constantIntegers(node, 3)
      steps = try constantIntegers(node, 4)
    }
    let list = axes ?? Array(0..<starts.count)
    guard starts.count == ends.count, list.count == starts.count,
      steps.map({ $0.count == starts.count }) ?? true
    else { throw HalfstepError(.invalidGraph, "starts, ends, axes and steps differ in length") }
    var dimensions = value.dimensions
    var strides = value.shape.strides
    var origin = 0
    var seen = Set<Int>()
    for (index, given) in list.enumerated() {
      let axis = try ShapeRules.axis(given, rank: value.rank)
      guard seen.insert(axis).inserted else {
        throw HalfstepError(.invalidGraph, "axes \(list): an axis occurs twice")
      }
      let extent = value.shape[axis]
      let step = steps?[index] ?? 1
      guard step != 0, step != Int.min else {
        throw HalfstepError(.invalidGraph, "steps: expected a number other than 0")
      }
      func clamped(_ position: Int, _ range: ClosedRange<Int>) -> Int {
        let absolute =
          position < 0 ? position.addingReportingOverflow(extent).partialValue : position
        return min(max(absolute, range.lowerBound), range.upperBound)
      }
      let count: Int
      let first: Int
      if step > 0 {
        first = clamped(starts[index], 0...extent)
        let end = clamped(ends[index], 0...extent)
        count = end > first ? (end - first - 1) / step + 1 : 0
      } else {
        first = clamped(starts[index], -1...max(extent - 1, -1))
        let end = clamped(ends[index], -1...max(extent - 1, -1))
        count = first > end ? (first - end - 1) / -step + 1 : 0
      }
      if count > 0 { origin += first * strides[axis] }
      dimensions[axis] = count
      strides[axis] = count > 1 ? strides[axis] * step : 0
    }
    return try copy("Slice", value, Shape(dimensions), from: strides, start: origin)
  }

  fileprivate func split(_ node: Node) throws(HalfstepError) -> [Value] {
    let value = try input(node, 0)
    let axis = try ShapeRules.axis(node.intAttribute("axis") ?? 0, rank: value.rank)
    let extent = value.shape[axis]
    let count = node.outputs.count
    var sizes = opset < 13 ? node.intsAttribute("split") : try constantIntegers(node, 1)
    if sizes == nil {
      // Equal parts, the last one smaller if they do not come out even (opset 18).
      let size = (extent + count - 1) / max(count, 1)
      sizes = (0..<count).map { max(0, min(size, extent - $0 * size)) }
    }
    guard let sizes, sizes.count == count, sizes.allSatisfy({ $0 >= 0 && $0 <= extent }),
      sizes.reduce(0, { $0.addingReportingOverflow($1).partialValue }) == extent
    else {
      throw HalfstepError(
        .shapeMismatch, "cannot split \(value.shape) along axis \(axis) into \(count) parts")
    }
    let strides = value.shape.strides
    var results: [Value] = []
    var start = 0
    for size in sizes {
      var dimensions = value.dimensions
      dimensions[axis] = size
      results.append(
        try copy("Split", value, Shape(dimensions), from: strides, start: start * strides[axis]))
      start += size
    }
    return results
  }

  fileprivate func concatenate(_ node: Node) throws(HalfstepError) -> Value {
    var values: [Value] = []
    for index in node.inputs.indices { values.append(try input(node, index)) }
    guard let first = values.first else {
      throw HalfstepError(.invalidGraph, "expected at least one input")
    }
    guard let given = node.intAttribute("axis") else {
      throw HalfstepError(.invalidGraph, "axis is missing")
    }
    let axis = try ShapeRules.axis(given, rank: first.rank)
    var extent = 0
    for value in values {
      var a = value.dimensions
      var b = first.dimensions
      guard a.count == b.count else {
        throw HalfstepError(.shapeMismatch, "cannot join \(first.shape) and \(value.shape)")
      }
      a[axis] = 0
      b[axis] = 0
      guard a == b, value.dataType == first.dataType else {
        throw HalfstepError(
          .shapeMismatch,
          "cannot join \(first.shape) of \(first.dataType) and \(value.shape) of "
            + "\(value.dataType) along axis \(axis)")
      }
      extent += value.shape[axis]
    }
    var dimensions = first.dimensions
    dimensions[axis] = extent
    let shape = try Shape(dimensions)
    if values.contains(where: { !$0.isPlain }), values.allSatisfy({ $0.count > 0 }),
      let joined = try concatenateInPlaceLayout(values, axis: axis, shape)
    {
      return joined
    }
    let width = try elementWidth(first)
    let result = try makeValue(shape, first.dataType)
    var start = 0
    var copies: [(StridedCopy, Buffer)] = []
    var sources: [Value] = []
    for value in values where value.count > 0 {
      let source = try plain(value)
      sources.append(source)
      copies.append(
        (
          StridedCopy(
            value.dimensions, from: value.shape.strides, to: shape.strides,
            toStart: start * shape.strides[axis], width: width), source.buffer
        ))
      start += value.shape[axis]
    }
    let target = result.buffer
    emit("Concat", reads: sources, writes: [result]) { () throws(HalfstepError) in
      for (copy, source) in copies { copy.run(try source.bytes, try target.bytes) }
    }
    return result
  }

  /// Joins tensors in the layout that one of them has; nil if oneDNN would do it slowly.
  private func concatenateInPlaceLayout(
    _ values: [Value], axis: Int, _ shape: Shape
  ) throws(HalfstepError) -> Value? {
    // The layout of the largest input that is not row-major, applied to all.
    guard let leader = values.filter({ !$0.isPlain }).max(by: { $0.count < $1.count }),
      let pattern = leader.layout, let nest = pattern.factors
    else { return nil }
    // Channels-last: joining pixels means joining runs of channels.
    guard pattern.raw.format_desc.blocking.inner_nblks == 0 else {
      return try concatenateBlocked(values, axis: axis, shape, pattern)
    }
    let order = nest.map(\.axis)
    func strides(_ dimensions: [Int]) -> [Int] {
      var result = [Int](repeating: 1, count: dimensions.count)
      var span = 1
      for axis in order.reversed() {
        result[axis] = span
        span *= dimensions[axis]
      }
      return result
    }
    let layout = try MemoryDescriptor(shape.dimensions, strides: strides(shape.dimensions))
    let result = try makeValue(shape, layout: layout)
    let to = strides(shape.dimensions)
    var start = 0
    var copies: [(StridedCopy, Buffer)] = []
    var sources: [Value] = []
    for value in values {
      let from = strides(value.dimensions)
      let source = try arranged(
        value, MemoryDescriptor(value.dimensions, strides: from))
      sources.append(source)
      copies.append(
        (
          StridedCopy(
            order.map { value.shape[$0] }, from: order.map { from[$0] }, to: order.map { to[$0] },
            toStart: start * to[axis], width: 4), source.buffer
        ))
      start += value.shape[axis]
    }
    let target = result.buffer
    emit("Concat", reads: sources, writes: [result]) { () throws(HalfstepError) in
      for (copy, source) in copies { copy.run(try source.bytes, try target.bytes) }
    }
    return result
  }

  private func concatenateBlocked(
    _ values: [Value], axis: Int, _ shape: Shape, _ pattern: MemoryDescriptor
  ) throws(HalfstepError) -> Value? {
    guard values.allSatisfy({ $0.layout != nil && $0.paddingZeros == 0 }) else { return nil }
    let engine = try Engine.shared().handle
    let attributes = try PrimitiveAttributes()
    let inputs = values.compactMap { $0.layout?.raw }
    var handle: OpaquePointer?
    let status = dnnl_concat_primitive_desc_create(
      &handle, nil, Int32(inputs.count), Int32(axis), inputs, attributes.handle, engine)
    guard status == dnnl_success, let handle else { return nil }
    let descriptor = PrimitiveDescriptor(owning: handle)
    guard let target = descriptor.descriptor(dnnl_query_dst_md),
      target.dimensions == shape.dimensions, !descriptor.implementation.contains("ref")
    else { return nil }
    var reads: [Binding] = []
    for (index, value) in values.enumerated() {
      guard let layout = value.layout else { return nil }
      reads.append((DNNL_ARG_MULTIPLE_SRC + Int32(index), layout, value.buffer))
    }
    return try emit(descriptor, label: "concat", reads, result: shape, target, nil)
  }

  fileprivate func tile(_ node: Node) throws(HalfstepError) -> Value {
    let value = try input(node, 0)
    guard let repeats = try constantIntegers(node, 1), repeats.count == value.rank,
      repeats.allSatisfy({ $0 >= 0 })
    else {
      throw HalfstepError(
        .invalidGraph, "repeats: expected \(value.rank) numbers of 0 or more")
    }
    var split: [Int] = []
    var strides: [Int] = []
    var dimensions: [Int] = []
    let own = value.shape.strides
    for axis in 0..<value.rank {
      split += [repeats[axis], value.shape[axis]]
      strides += [0, own[axis]]
      let (product, overflow) = repeats[axis].multipliedReportingOverflow(by: value.shape[axis])
      guard !overflow else {
        throw HalfstepError(.invalidGraph, "repeats \(repeats): too many elements")
      }
      dimensions.append(product)
    }
    let shape = try Shape(dimensions)
    return try view(copy("Tile", value, Shape(split), from: strides), as: shape)
  }

  fileprivate func gather(_ node: Node) throws(HalfstepError) -> Value {
    let value = try plain(input(node, 0))
    let indices = try input(node, 1)
    guard indices.dataType == .int64 || indices.dataType == .int32 else {
      throw HalfstepError(
        .typeMismatch, "input 1: expected integers, got \(indices.dataType)")
    }
    let axis = try ShapeRules.axis(node.intAttribute("axis") ?? 0, rank: value.rank)
    let width = try elementWidth(value)
    let shape = try Shape(
      Array(value.dimensions[..<axis]) + indices.dimensions
        + Array(value.dimensions[(axis + 1)...]))
    let extent = value.shape[axis]
    let outer = value.dimensions[..<axis].reduce(1, *)
    let run = value.dimensions[(axis + 1)...].reduce(1, *) * width
    let result = try makeValue(shape, value.dataType)
    let buffers = (value.buffer, indices.buffer, result.buffer)
    let count = indices.count
    let isLong = indices.dataType == .int64
    let label = node.label
    // Nothing to copy: an outer axis may then have any extent, since no element backs it.
    let rows = run == 0 ? 0 : outer
    emit("Gather", reads: [value, indices], writes: [result]) { () throws(HalfstepError) in
      let (from, list, to) = (try buffers.0.bytes, try buffers.1.bytes, try buffers.2.bytes)
      for position in 0..<count {
        let given =
          isLong
          ? Int(list.assumingMemoryBound(to: Int64.self)[position])
          : Int(list.assumingMemoryBound(to: Int32.self)[position])
        guard given >= -extent, given < extent else {
          throw HalfstepError(
            .invalidArgument, "node '\(label)': index \(given) is outside 0..<\(extent)",
            node: label)
        }
        let index = given < 0 ? given + extent : given
        for row in 0..<rows {
          (to + (row * count + position) * run).copyMemory(
            from: from + (row * extent + index) * run, byteCount: run)
        }
      }
    }
    return result
  }

  private func pictures(
    _ node: Node
  ) throws(HalfstepError) -> (value: Value, block: Int) {
    let value = try input(node, 0)
    guard value.rank == 4, value.count > 0 else {
      throw HalfstepError(.shapeMismatch, "input \(value.shape): expected rank 4 and elements")
    }
    guard let block = node.intAttribute("blocksize"), block > 0,
      block <= WindowGeometry.attributeLimit
    else { throw HalfstepError(.invalidGraph, "blocksize: expected a positive number") }
    return (value, block)
  }

  fileprivate func depthToSpace(_ node: Node) throws(HalfstepError) -> Value {
    let (value, block) = try pictures(node)
    let (n, c, h, w) = (value.shape[0], value.shape[1], value.shape[2], value.shape[3])
    guard c % (block * block) == 0 else {
      throw HalfstepError(.shapeMismatch, "\(c) channels do not divide by \(block)²")
    }
    let depth = c / (block * block)
    let s = value.shape.strides
    let isColumnFirst = node.stringAttribute("mode") == "CRD"
    // Result axes: n, depth, h, block row, w, block column.
    let (channel, row, column) =
      isColumnFirst
      ? (block * block * s[1], block * s[1], s[1]) : (s[1], block * depth * s[1], depth * s[1])
    let moved = try copy(
      node.opType, value, Shape([n, depth, h, block, w, block]),
      from: [s[0], channel, s[2], row, s[3], column])
    return try view(moved, as: Shape([n, depth, h * block, w * block]))
  }

  fileprivate func spaceToDepth(_ node: Node) throws(HalfstepError) -> Value {
    let (value, block) = try pictures(node)
    let (n, c, h, w) = (value.shape[0], value.shape[1], value.shape[2], value.shape[3])
    guard h % block == 0, w % block == 0 else {
      throw HalfstepError(.shapeMismatch, "\(value.shape) does not divide by \(block)")
    }
    let s = value.shape.strides
    let isColumnFirst = node.stringAttribute("mode") == "CRD"
    let moved = try copy(
      node.opType, value,
      Shape(
        isColumnFirst
          ? [n, c, block, block, h / block, w / block]
          : [n, block, block, c, h / block, w / block]),
      from: isColumnFirst
        ? [s[0], s[1], s[2], s[3], block * s[2], block * s[3]]
        : [s[0], s[2], s[3], s[1], block * s[2], block * s[3]])
    return try view(moved, as: Shape([n, c * block * block, h / block, w / block]))
  }
}
