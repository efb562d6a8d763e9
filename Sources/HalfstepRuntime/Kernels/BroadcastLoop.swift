// SPDX-License-Identifier: Apache-2.0
// The loop nest of an elementwise operation on two tensors with broadcasting.

import HalfstepNumerics

/// The loop nest of an elementwise operation on two tensors; the result is written in order.
struct BroadcastLoop {
  /// Extents, outermost first, never empty.
  private(set) var extents: [Int]
  private(set) var strideA: [Int]
  private(set) var strideB: [Int]

  /// Operands and result are alike: one loop.
  init(vector count: Int) {
    extents = [count]
    strideA = [1]
    strideB = [1]
  }

  /// Row-major operands.
  init(_ shape: Shape, a: Shape, b: Shape) {
    extents = shape.dimensions
    strideA = Self.strides(of: a, in: shape)
    strideB = Self.strides(of: b, in: shape)
    merge()
  }

  /// A result visited by a nest of loops; an operand of the full shape lies the same way, another
  /// one is row-major.
  init(_ shape: Shape, a: Shape, b: Shape, nest: [MemoryDescriptor.Factor]) {
    func strides(_ operand: Shape) -> [Int] {
      var span = 1
      var own = [Int](repeating: 0, count: nest.count)
      if operand == shape {
        for position in nest.indices.reversed() {
          own[position] = span
          span *= nest[position].extent
        }
      } else {
        let plain = Self.strides(of: operand, in: shape)
        for (position, factor) in nest.enumerated() {
          own[position] = plain[factor.axis] * factor.step
        }
      }
      return own
    }
    extents = nest.map(\.extent)
    strideA = strides(a)
    strideB = strides(b)
    merge()
  }

  /// Elements between neighbors along each axis of `shape`; 0 where the operand is repeated.
  static func strides(of operand: Shape, in shape: Shape) -> [Int] {
    var result = [Int](repeating: 0, count: shape.rank)
    let own = operand.strides
    let lead = shape.rank - operand.rank
    for axis in 0..<operand.rank where operand[axis] != 1 { result[lead + axis] = own[axis] }
    return result
  }

  /// Joins neighboring loops that both operands walk through without a jump, and drops loops of one
  /// turn.
  private mutating func merge() {
    var merged: [(extent: Int, a: Int, b: Int)] = []
    for axis in extents.indices where extents[axis] != 1 {
      let next = (extent: extents[axis], a: strideA[axis], b: strideB[axis])
      if let last = merged.last, last.a == next.a * next.extent, last.b == next.b * next.extent {
        merged[merged.count - 1] = (last.extent * next.extent, next.a, next.b)
      } else {
        merged.append(next)
      }
    }
    if merged.isEmpty { merged = [(extent: 1, a: 0, b: 0)] }
    extents = merged.map(\.extent)
    strideA = merged.map(\.a)
    strideB = merged.map(\.b)
  }

  /// Elements of the result.
  var count: Int { extents.reduce(1, *) }
}

/// Position in a nest of loops, with an offset for each of several operands.
struct OdometerIndex {
  private let extents: [Int]
  private let strides: [[Int]]
  private var turns: [Int]
  private(set) var offsets: [Int]

  init(_ extents: [Int], _ strides: [[Int]], start: Int = 0) {
    self.extents = extents
    self.strides = strides
    turns = [Int](repeating: 0, count: extents.count)
    offsets = [Int](repeating: 0, count: strides.count)
    var rest = start
    for axis in extents.indices.reversed() where extents[axis] > 0 {
      turns[axis] = rest % extents[axis]
      rest /= extents[axis]
      for operand in strides.indices { offsets[operand] += turns[axis] * strides[operand][axis] }
    }
  }

  @inline(__always)
  mutating func advance() {
    var axis = extents.count - 1
    while axis >= 0 {
      turns[axis] += 1
      for operand in strides.indices { offsets[operand] += strides[operand][axis] }
      if turns[axis] < extents[axis] { return }
      for operand in strides.indices {
        offsets[operand] -= strides[operand][axis] * extents[axis]
      }
      turns[axis] = 0
      axis -= 1
    }
  }
}
