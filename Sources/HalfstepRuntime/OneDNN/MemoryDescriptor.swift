// SPDX-License-Identifier: Apache-2.0
// How a float tensor lies in memory, in oneDNN's terms.

import CDNNL
import HalfstepNumerics

/// How a float tensor lies in memory: extents, padded extents, strides and inner blocks.
struct MemoryDescriptor: Equatable {
  var raw: dnnl_memory_desc_t

  init(raw: dnnl_memory_desc_t) { self.raw = raw }

  /// Describes a tensor in row-major order, or with the given strides.
  ///
  /// - Throws: `HalfstepError.invalidArgument` for a rank outside 1...12 or an empty tensor.
  init(_ dimensions: [Int], strides: [Int]? = nil) throws(HalfstepError) {
    try Self.checkExtents(dimensions)
    var raw = dnnl_memory_desc_t()
    let strides = strides ?? Self.rowMajorStrides(dimensions)
    let status = dnnl_memory_desc_init_by_strides(
      &raw, Int32(dimensions.count), dimensions.map(Int64.init), dnnl_f32, strides.map(Int64.init))
    try Engine.check(status, "describing a tensor \(dimensions)")
    self.raw = raw
  }

  /// Describes a tensor in one of oneDNN's named layouts; `dnnl_format_tag_any` leaves the choice
  /// to a primitive.
  init(_ dimensions: [Int], tag: dnnl_format_tag_t) throws(HalfstepError) {
    try Self.checkExtents(dimensions)
    var raw = dnnl_memory_desc_t()
    let status = dnnl_memory_desc_init_by_tag(
      &raw, Int32(dimensions.count), dimensions.map(Int64.init), dnnl_f32, tag)
    try Engine.check(status, "describing a tensor \(dimensions)")
    self.raw = raw
  }

  /// Leaves the layout of a tensor to a primitive.
  static func any(_ dimensions: [Int]) throws(HalfstepError) -> MemoryDescriptor {
    try MemoryDescriptor(dimensions, tag: dnnl_format_tag_any)
  }

  private static func checkExtents(_ dimensions: [Int]) throws(HalfstepError) {
    guard (1...12).contains(dimensions.count) else {
      throw HalfstepError(
        .invalidArgument, "tensor \(dimensions): expected rank 1...12, got \(dimensions.count)")
    }
    // oneDNN's kernels keep extents in 32-bit integers.
    for extent in dimensions where extent < 1 || extent > Int(Int32.max) {
      throw HalfstepError(
        .invalidArgument, "tensor \(dimensions): expected extents in 1...\(Int32.max)")
    }
  }

  private static func rowMajorStrides(_ dimensions: [Int]) -> [Int] {
    var strides = [Int](repeating: 1, count: dimensions.count)
    for axis in stride(from: dimensions.count - 2, through: 0, by: -1) {
      // Saturating: the caller's Shape bounds the product, weights are bounded by their bytes.
      strides[axis] = strides[axis + 1].multipliedReportingOverflow(by: dimensions[axis + 1]).0
    }
    return strides
  }

  static func == (left: MemoryDescriptor, right: MemoryDescriptor) -> Bool {
    withUnsafePointer(to: left.raw) { a in
      withUnsafePointer(to: right.raw) { b in dnnl_memory_desc_equal(a, b) != 0 }
    }
  }

  /// Bytes from the first to the last element, with padding.
  var byteCount: Int { withUnsafePointer(to: raw) { Int(dnnl_memory_desc_get_size($0)) } }

  /// Floats from the first to the last element, with padding.
  var elementCount: Int { byteCount / 4 }

  var rank: Int { Int(raw.ndims) }
  var dimensions: [Int] { Self.prefix(raw.dims, rank) }
  var paddedDimensions: [Int] { Self.prefix(raw.padded_dims, rank) }

  /// Elements between neighbors along each dimension (between blocks, where it is split).
  var strides: [Int] { Self.prefix(raw.format_desc.blocking.strides, rank) }

  /// Zeros that the layout adds to the tensor.
  var paddingZeros: Int { elementCount - dimensions.reduce(1, *) }

  /// The same memory with size-1 dimensions and splits that change no order taken out, outermost
  /// first: two descriptors with the same walk place every element at the same offset.
  ///
  /// Nil if the layout is not made of dense blocks or has padding.
  var walk: [[Int]]? {
    guard raw.format_kind == dnnl_blocked, raw.offset0 == 0, paddingZeros == 0 else { return nil }
    let blocking = raw.format_desc.blocking
    let strides = Self.prefix(blocking.strides, rank)
    let count = Int(blocking.inner_nblks)
    let blocks = Self.prefix(blocking.inner_blks, count)
    let axes = Self.prefix(blocking.inner_idxs, count)
    var outer = dimensions
    for (block, axis) in zip(blocks, axes) { outer[axis] /= max(block, 1) }
    var walk: [[Int]] = []
    func append(_ axis: Int, _ extent: Int) {
      if extent == 1 { return }
      if let last = walk.last, last[0] == axis {
        walk[walk.count - 1][1] *= extent
      } else {
        walk.append([axis, extent])
      }
    }
    for axis in outer.indices.sorted(by: { (strides[$0], -$0) > (strides[$1], -$1) }) {
      append(axis, outer[axis])
    }
    for (block, axis) in zip(blocks, axes) { append(axis, block) }
    return walk
  }

  /// The block of channels that lie together if this is a layout such as nChw8c or nChw16c:
  /// channels split once, everything else in row-major order. Nil for any other layout.
  var channelBlock: Int? {
    guard raw.format_kind == dnnl_blocked, raw.offset0 == 0, rank >= 2 else { return nil }
    let blocking = raw.format_desc.blocking
    guard blocking.inner_nblks == 1, blocking.inner_idxs.0 == 1 else { return nil }
    let block = Int(blocking.inner_blks.0)
    let padded = paddedDimensions
    guard block > 1, padded[1] % block == 0 else { return nil }
    for axis in 0..<rank where axis != 1 && padded[axis] != dimensions[axis] { return nil }
    var expected = block
    let strides = Self.prefix(blocking.strides, rank)
    for axis in stride(from: rank - 1, through: 0, by: -1) {
      let extent = axis == 1 ? padded[1] / block : dimensions[axis]
      guard extent == 1 || strides[axis] == expected else { return nil }
      expected *= extent
    }
    return block
  }

  private static func prefix<Tuple, Element: BinaryInteger>(
    _ tuple: Tuple, _ count: Int, of: Element.Type
  ) -> [Int] {
    withUnsafeBytes(of: tuple) { bytes in
      bytes.bindMemory(to: Element.self).prefix(count).map { Int($0) }
    }
  }

  private static func prefix<Tuple>(_ tuple: Tuple, _ count: Int) -> [Int] {
    prefix(tuple, count, of: Int64.self)
  }
}
