// SPDX-License-Identifier: Apache-2.0
// Inner loops of operations on two tensors.

import HalfstepNumerics

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// Inner loops of operations on two tensors.
enum ArithmeticKernel {
  static let integerTypes: Set<DataType> = [
    .int8, .int16, .int32, .int64, .uint8, .uint16, .uint32, .uint64,
  ]

  /// Runs an operation; buffers hold what the loop visits, the result may be one of the operands.
  static func run(
    _ operation: Arithmetic, _ type: DataType, _ a: UnsafeRawPointer, _ b: UnsafeRawPointer,
    _ result: UnsafeMutableRawPointer, _ loop: BroadcastLoop
  ) {
    switch type {
    case .float32: runFloats(operation, a, b, result, loop)
    case .int8: runIntegers(operation, Int8.self, a, b, result, loop)
    case .int16: runIntegers(operation, Int16.self, a, b, result, loop)
    case .int32: runIntegers(operation, Int32.self, a, b, result, loop)
    case .int64: runIntegers(operation, Int64.self, a, b, result, loop)
    case .uint8, .bool: runIntegers(operation, UInt8.self, a, b, result, loop)
    case .uint16: runIntegers(operation, UInt16.self, a, b, result, loop)
    case .uint32: runIntegers(operation, UInt32.self, a, b, result, loop)
    case .uint64: runIntegers(operation, UInt64.self, a, b, result, loop)
    default: break
    }
  }

  private static func runFloats(
    _ operation: Arithmetic, _ a: UnsafeRawPointer, _ b: UnsafeRawPointer,
    _ result: UnsafeMutableRawPointer, _ loop: BroadcastLoop
  ) {
    typealias F = Float
    switch operation {
    case .add: each(a, b, result, loop) { (x: F, y: F) -> F in x + y }
    case .subtract: each(a, b, result, loop) { (x: F, y: F) -> F in x - y }
    case .multiply: each(a, b, result, loop) { (x: F, y: F) -> F in x * y }
    case .divide: each(a, b, result, loop) { (x: F, y: F) -> F in x / y }
    case .minimum: each(a, b, result, loop) { (x: F, y: F) -> F in x < y ? x : y }
    case .maximum: each(a, b, result, loop) { (x: F, y: F) -> F in x > y ? x : y }
    case .power:
      each(a, b, result, loop) { (x: F, y: F) -> F in y == 2 ? x * x : powf(x, y) }
    case .remainder: each(a, b, result, loop) { (x: F, y: F) -> F in fmodf(x, y) }
    case .floorRemainder:
      each(a, b, result, loop) { (x: F, y: F) -> F in
        let rest = fmodf(x, y)
        return rest != 0 && (rest < 0) != (y < 0) ? rest + y : rest
      }
    case .parametricRelu: each(a, b, result, loop) { (x: F, y: F) -> F in x < 0 ? x * y : x }
    case .equal: each(a, b, result, loop) { (x: F, y: F) -> UInt8 in x == y ? 1 : 0 }
    case .less: each(a, b, result, loop) { (x: F, y: F) -> UInt8 in x < y ? 1 : 0 }
    case .lessOrEqual: each(a, b, result, loop) { (x: F, y: F) -> UInt8 in x <= y ? 1 : 0 }
    case .greater: each(a, b, result, loop) { (x: F, y: F) -> UInt8 in x > y ? 1 : 0 }
    case .greaterOrEqual: each(a, b, result, loop) { (x: F, y: F) -> UInt8 in x >= y ? 1 : 0 }
    case .and, .or, .xor: break
    }
  }

  /// Wraps on overflow; a division by 0 gives 0.
  private static func runIntegers<I: FixedWidthInteger & BitwiseCopyable>(
    _ operation: Arithmetic, _: I.Type, _ a: UnsafeRawPointer, _ b: UnsafeRawPointer,
    _ result: UnsafeMutableRawPointer, _ loop: BroadcastLoop
  ) {
    switch operation {
    case .add: each(a, b, result, loop) { (x: I, y: I) -> I in x &+ y }
    case .subtract: each(a, b, result, loop) { (x: I, y: I) -> I in x &- y }
    case .multiply: each(a, b, result, loop) { (x: I, y: I) -> I in x &* y }
    case .divide:
      each(a, b, result, loop) { (x: I, y: I) -> I in
        y == 0 ? 0 : x.dividedReportingOverflow(by: y).partialValue
      }
    case .minimum: each(a, b, result, loop) { (x: I, y: I) -> I in min(x, y) }
    case .maximum: each(a, b, result, loop) { (x: I, y: I) -> I in max(x, y) }
    case .power: each(a, b, result, loop) { (x: I, y: I) -> I in power(x, y) }
    case .remainder:
      each(a, b, result, loop) { (x: I, y: I) -> I in
        y == 0 ? 0 : x.remainderReportingOverflow(dividingBy: y).partialValue
      }
    case .floorRemainder:
      each(a, b, result, loop) { (x: I, y: I) -> I in
        if y == 0 { return 0 }
        let rest = x.remainderReportingOverflow(dividingBy: y).partialValue
        return rest != 0 && (rest < 0) != (y < 0) ? rest &+ y : rest
      }
    case .parametricRelu: each(a, b, result, loop) { (x: I, y: I) -> I in x < 0 ? x &* y : x }
    case .equal: each(a, b, result, loop) { (x: I, y: I) -> UInt8 in x == y ? 1 : 0 }
    case .less: each(a, b, result, loop) { (x: I, y: I) -> UInt8 in x < y ? 1 : 0 }
    case .lessOrEqual: each(a, b, result, loop) { (x: I, y: I) -> UInt8 in x <= y ? 1 : 0 }
    case .greater: each(a, b, result, loop) { (x: I, y: I) -> UInt8 in x > y ? 1 : 0 }
    case .greaterOrEqual: each(a, b, result, loop) { (x: I, y: I) -> UInt8 in x >= y ? 1 : 0 }
    case .and: each(a, b, result, loop) { (x: I, y: I) -> I in x != 0 && y != 0 ? 1 : 0 }
    case .or: each(a, b, result, loop) { (x: I, y: I) -> I in x != 0 || y != 0 ? 1 : 0 }
    case .xor: each(a, b, result, loop) { (x: I, y: I) -> I in (x != 0) != (y != 0) ? 1 : 0 }
    }
  }

  private static func power<I: FixedWidthInteger>(_ base: I, _ exponent: I) -> I {
    if exponent < 0 { return base == 1 ? 1 : 0 }
    var result: I = 1
    var square = base
    var rest = exponent
    while rest != 0 {
      if rest & 1 == 1 { result = result &* square }
      square = square &* square
      rest >>= 1
    }
    return result
  }

  @inline(__always)
  private static func each<T: BitwiseCopyable, R: BitwiseCopyable>(
    _ a: UnsafeRawPointer, _ b: UnsafeRawPointer, _ result: UnsafeMutableRawPointer,
    _ loop: BroadcastLoop, _ operation: (T, T) -> R
  ) {
    let a = a.assumingMemoryBound(to: T.self)
    let b = b.assumingMemoryBound(to: T.self)
    let result = result.assumingMemoryBound(to: R.self)
    let count = loop.count
    if count == 0 { return }
    let last = loop.extents.count - 1
    let inner = loop.extents[last]
    let (sa, sb) = (loop.strideA[last], loop.strideB[last])
    if last == 0 {
      Parallel.forEachRange(count, grain: 1 << 14) { _, range in
        row(
          a + range.lowerBound * sa, b + range.lowerBound * sb, result + range.lowerBound,
          range.count, sa, sb, operation)
      }
      return
    }
    let outer = Array(loop.extents[..<last])
    let strides = [Array(loop.strideA[..<last]), Array(loop.strideB[..<last])]
    Parallel.forEachRange(count / inner, grain: max(1, (1 << 14) / inner)) { _, range in
      var index = OdometerIndex(outer, strides, start: range.lowerBound)
      for position in range {
        row(
          a + index.offsets[0], b + index.offsets[1], result + position * inner, inner, sa, sb,
          operation)
        index.advance()
      }
    }
  }

  @inline(__always)
  private static func row<T: BitwiseCopyable, R: BitwiseCopyable>(
    _ a: UnsafePointer<T>, _ b: UnsafePointer<T>, _ result: UnsafeMutablePointer<R>, _ count: Int,
    _ sa: Int, _ sb: Int, _ operation: (T, T) -> R
  ) {
    if sa == 1, sb == 1 {
      for i in 0..<count { result[i] = operation(a[i], b[i]) }
    } else if sa == 1, sb == 0 {
      let y = b[0]
      for i in 0..<count { result[i] = operation(a[i], y) }
    } else if sa == 0, sb == 1 {
      let x = a[0]
      for i in 0..<count { result[i] = operation(x, b[i]) }
    } else {
      for i in 0..<count { result[i] = operation(a[i * sa], b[i * sb]) }
    }
  }
}
