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

  /// A loop over a part of one axis: `extent` turns that each move `step` indices along it.
  struct Factor: Equatable {
    var axis: Int
    var extent: Int
    var step: Int
  }

  /// The nest of loops that visits the elements in memory order, outermost first.
  ///
  /// Nil if the layout has padding or is not made of dense blocks.
  var factors: [Factor]? {
    guard raw.format_kind == dnnl_blocked, raw.offset0 == 0, paddingZeros == 0 else { return nil }
    let strides = strides
    let count = Int(raw.format_desc.blocking.inner_nblks)
    let blocks = Self.prefix(raw.format_desc.blocking.inner_blks, count)
    let axes = Self.prefix(raw.format_desc.blocking.inner_idxs, count)
    var outer = dimensions
    for (block, axis) in zip(blocks, axes) {
      guard block > 0, outer.indices.contains(axis), outer[axis] % block == 0 else { return nil }
      outer[axis] /= block
    }
    var nest: [Factor] = []
    for axis in outer.indices.sorted(by: { (strides[$0], -$0) > (strides[$1], -$1) }) {
      nest.append(Factor(axis: axis, extent: outer[axis], step: 1))
    }
    for (block, axis) in zip(blocks, axes) {
      nest.append(Factor(axis: axis, extent: block, step: 1))
    }
    // Steps: the product of the extents of the loops over the same axis further in.
    var inner = [Int](repeating: 1, count: rank)
    var span = 1
    for position in nest.indices.reversed() {
      let factor = nest[position]
      nest[position].step = inner[factor.axis]
      inner[factor.axis] *= factor.extent
      span *= factor.extent
    }
    return span == elementCount ? nest : nil
  }

  /// The loops that really turn, those over neighboring parts of one axis joined: two descriptors
  /// with the same walk place every element at the same offset.
  var walk: [Factor]? {
    guard let factors else { return nil }
    var walk: [Factor] = []
    for factor in factors where factor.extent > 1 {
      if let last = walk.last, last.axis == factor.axis {
        walk[walk.count - 1].extent *= factor.extent
        walk[walk.count - 1].step = factor.step
      } else {
        walk.append(factor)
      }
    }
    return walk
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
