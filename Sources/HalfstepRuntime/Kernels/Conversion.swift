// SPDX-License-Identifier: Apache-2.0
// Conversion between element types.

import HalfstepNumerics

/// Conversion between element types.
enum Conversion {
  /// Types that the runtime computes with as float32.
  static func isHalfOrDouble(_ type: DataType) -> Bool {
    type == .float16 || type == .bfloat16 || type == .float64
  }

  /// The type that tensors of a declared type have at run time.
  static func runtimeType(_ type: DataType) -> DataType { isHalfOrDouble(type) ? .float32 : type }

  /// Types that `run` takes.
  static func isSupported(_ type: DataType) -> Bool {
    switch type {
    case .float32, .float64, .float16, .bfloat16, .int8, .int16, .int32, .int64, .uint8, .uint16,
      .uint32, .uint64, .bool:
      true
    default: false
    }
  }

  /// A tensor with its elements converted.
  static func convert(_ tensor: Tensor, to type: DataType) throws(HalfstepError) -> Tensor {
    if tensor.dataType == type { return tensor }
    try check(tensor.dataType, type)
    let result = try Tensor(uninitialized: type, shape: tensor.shape)
    run(
      tensor.dataType, tensor.storage.baseAddress, type, result.storage.baseAddress,
      count: tensor.count)
    withExtendedLifetime(tensor) {}
    return result
  }

  static func check(_ from: DataType, _ to: DataType) throws(HalfstepError) {
    guard isSupported(from), isSupported(to) else {
      throw HalfstepError(.typeMismatch, "conversion from \(from) to \(to) is not supported")
    }
  }

  /// Converts `count` elements of supported types; floats are truncated to integers, saturating.
  static func run(
    _ from: DataType, _ source: UnsafeRawPointer, _ to: DataType,
    _ target: UnsafeMutableRawPointer, count: Int
  ) {
    if from == to {
      target.copyMemory(from: source, byteCount: Tensor.byteCount(of: to, count: count))
      return
    }
    switch from {
    case .float32: store(to, target, count) { Double(read(source, $0) as Float) }
    case .float64: store(to, target, count) { read(source, $0) as Double }
    case .float16: store(to, target, count) { Double(read(source, $0) as Float16) }
    case .bfloat16:
      store(to, target, count) {
        Double(Float(bitPattern: UInt32(read(source, $0) as UInt16) << 16))
      }
    case .int8: store(to, target, count) { Int64(read(source, $0) as Int8) }
    case .int16: store(to, target, count) { Int64(read(source, $0) as Int16) }
    case .int32: store(to, target, count) { Int64(read(source, $0) as Int32) }
    case .int64: store(to, target, count) { read(source, $0) as Int64 }
    case .uint8, .bool: store(to, target, count) { Int64(read(source, $0) as UInt8) }
    case .uint16: store(to, target, count) { Int64(read(source, $0) as UInt16) }
    case .uint32: store(to, target, count) { Int64(read(source, $0) as UInt32) }
    case .uint64: store(to, target, count) { Int64(truncatingIfNeeded: read(source, $0) as UInt64) }
    default: break
    }
  }

  @inline(__always)
  private static func read<T: BitwiseCopyable>(_ source: UnsafeRawPointer, _ index: Int) -> T {
    source.assumingMemoryBound(to: T.self)[index]
  }

  private static func store(
    _ to: DataType, _ target: UnsafeMutableRawPointer, _ count: Int, _ value: (Int) -> Double
  ) {
    switch to {
    case .float32: fill(target, count) { Float(value($0)) }
    case .float64: fill(target, count) { value($0) }
    case .float16: fill(target, count) { Float16(value($0)) }
    case .bfloat16: fill(target, count) { bfloat16(Float(value($0))) }
    case .bool: fill(target, count) { value($0) == 0 ? 0 : 1 as UInt8 }
    case .int64: fill(target, count) { saturated(value($0)) as Int64 }
    case .int32: fill(target, count) { saturated(value($0)) as Int32 }
    case .int16: fill(target, count) { saturated(value($0)) as Int16 }
    case .int8: fill(target, count) { saturated(value($0)) as Int8 }
    case .uint64: fill(target, count) { saturated(value($0)) as UInt64 }
    case .uint32: fill(target, count) { saturated(value($0)) as UInt32 }
    case .uint16: fill(target, count) { saturated(value($0)) as UInt16 }
    case .uint8: fill(target, count) { saturated(value($0)) as UInt8 }
    default: break
    }
  }

  private static func store(
    _ to: DataType, _ target: UnsafeMutableRawPointer, _ count: Int, _ value: (Int) -> Int64
  ) {
    switch to {
    case .float32: fill(target, count) { Float(value($0)) }
    case .float64: fill(target, count) { Double(value($0)) }
    case .float16: fill(target, count) { Float16(value($0)) }
    case .bfloat16: fill(target, count) { bfloat16(Float(value($0))) }
    case .bool: fill(target, count) { value($0) == 0 ? 0 : 1 as UInt8 }
    case .int64: fill(target, count) { value($0) }
    case .int32: fill(target, count) { Int32(truncatingIfNeeded: value($0)) }
    case .int16: fill(target, count) { Int16(truncatingIfNeeded: value($0)) }
    case .int8: fill(target, count) { Int8(truncatingIfNeeded: value($0)) }
    case .uint64: fill(target, count) { UInt64(truncatingIfNeeded: value($0)) }
    case .uint32: fill(target, count) { UInt32(truncatingIfNeeded: value($0)) }
    case .uint16: fill(target, count) { UInt16(truncatingIfNeeded: value($0)) }
    case .uint8: fill(target, count) { UInt8(truncatingIfNeeded: value($0)) }
    default: break
    }
  }

  private static func fill<T: BitwiseCopyable>(
    _ target: UnsafeMutableRawPointer, _ count: Int, _ value: (Int) -> T
  ) {
    let elements = target.assumingMemoryBound(to: T.self)
    for index in 0..<count { elements[index] = value(index) }
  }

  /// Truncates toward zero; NaN becomes 0, values outside the type its nearest bound.
  static func saturated<T: FixedWidthInteger>(_ value: Double) -> T {
    if value.isNaN { return 0 }
    let whole = value.rounded(.towardZero)
    if let exact = T(exactly: whole) { return exact }
    return whole < 0 ? T.min : T.max
  }

  /// The upper half of a float's bits, rounded half to even.
  private static func bfloat16(_ value: Float) -> UInt16 {
    let bits = value.bitPattern
    if value.isNaN { return UInt16(truncatingIfNeeded: bits >> 16) | 0x40 }
    let rounded = bits &+ 0x7FFF &+ ((bits >> 16) & 1)
    return UInt16(truncatingIfNeeded: rounded >> 16)
  }
}
