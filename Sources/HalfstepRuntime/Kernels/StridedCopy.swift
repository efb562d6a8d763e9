// SPDX-License-Identifier: Apache-2.0
// Copies elements between two regular grids of addresses.

import HalfstepNumerics

/// A copy between two regular grids of addresses: transposes, slices, expansions, joins.
struct StridedCopy {
  /// Extents, outermost first, never empty.
  private(set) var extents: [Int]
  private(set) var from: [Int]
  private(set) var to: [Int]
  /// First element read and first element written.
  let fromStart: Int
  let toStart: Int
  /// Bytes of an element.
  let width: Int

  /// - Parameters:
  ///   - from: Elements between neighbors along each axis in the source; negative walks backward.
  ///   - to: The same in the target.
  init(
    _ extents: [Int], from: [Int], to: [Int], fromStart: Int = 0, toStart: Int = 0, width: Int
  ) {
    self.fromStart = fromStart
    self.toStart = toStart
    self.width = width
    // Joins neighboring loops that walk both sides without a jump.
    var merged: [(extent: Int, from: Int, to: Int)] = []
    for axis in extents.indices where extents[axis] != 1 {
      let next = (extent: extents[axis], from: from[axis], to: to[axis])
      if let last = merged.last, last.from == next.from * next.extent,
        last.to == next.to * next.extent
      {
        merged[merged.count - 1] = (last.extent * next.extent, next.from, next.to)
      } else {
        merged.append(next)
      }
    }
    if merged.isEmpty { merged = [(extent: 1, from: 0, to: 0)] }
    self.extents = merged.map(\.extent)
    self.from = merged.map(\.from)
    self.to = merged.map(\.to)
  }

  /// Copies; every address that the loops reach is inside its buffer.
  func run(_ source: UnsafeRawPointer, _ target: UnsafeMutableRawPointer) {
    switch width {
    case 1: run(source, target, UInt8.self)
    case 2: run(source, target, UInt16.self)
    case 4: run(source, target, UInt32.self)
    default: run(source, target, UInt64.self)
    }
  }

  private func run<T: BitwiseCopyable>(
    _ source: UnsafeRawPointer, _ target: UnsafeMutableRawPointer, _: T.Type
  ) {
    let source = source.assumingMemoryBound(to: T.self) + fromStart
    let target = target.assumingMemoryBound(to: T.self) + toStart
    let last = extents.count - 1
    let inner = extents[last]
    let (sf, st) = (from[last], to[last])
    let rows = extents[..<last].reduce(1, *)
    if rows == 0 || inner == 0 { return }
    let outer = Array(extents[..<last])
    let strides = [Array(from[..<last]), Array(to[..<last])]
    Parallel.forEachRange(rows, grain: max(1, (1 << 14) / inner)) { _, range in
      var index = OdometerIndex(outer, strides, start: range.lowerBound)
      for _ in range {
        let x = source + index.offsets[0]
        let y = target + index.offsets[1]
        if sf == 1, st == 1 {
          y.update(from: x, count: inner)
        } else {
          for i in 0..<inner { y[i * st] = x[i * sf] }
        }
        index.advance()
      }
    }
  }
}
