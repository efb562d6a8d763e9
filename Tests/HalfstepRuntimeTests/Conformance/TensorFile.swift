// SPDX-License-Identifier: Apache-2.0
// Reads the tensors of ONNX's backend tests.

import Foundation
import HalfstepNumerics

/// Reads a `TensorProto` message from a file: the tensors of ONNX's backend tests.
struct TensorFile {
  struct Unreadable: Error { let reason: String }

  private let bytes: [UInt8]
  private var position = 0
  private var dimensions: [Int] = []
  private var typeNumber: Int32 = 0
  private var raw: [UInt8]?
  private var floats: [Float] = []
  private var doubles: [Double] = []
  private var integers: [Int64] = []

  static func read(_ url: URL) throws -> Tensor {
    var file = TensorFile(bytes: Array(try Data(contentsOf: url)))
    try file.parse()
    return try file.tensor()
  }

  private init(bytes: [UInt8]) { self.bytes = bytes }

  private mutating func varint() throws -> UInt64 {
    var result: UInt64 = 0
    for shift in stride(from: 0, through: 63, by: 7) {
      guard position < bytes.count else { throw Unreadable(reason: "ends early") }
      let byte = bytes[position]
      position += 1
      result |= UInt64(byte & 0x7F) << UInt64(shift)
      if byte & 0x80 == 0 { return result }
    }
    throw Unreadable(reason: "bad number")
  }

  private mutating func take(_ count: Int) throws -> [UInt8] {
    guard count >= 0, position + count <= bytes.count else {
      throw Unreadable(reason: "ends early")
    }
    defer { position += count }
    return Array(bytes[position..<(position + count)])
  }

  private mutating func parse() throws {
    while position < bytes.count {
      let tag = try varint()
      let field = tag >> 3
      switch tag & 7 {
      case 0: add(field, Int64(bitPattern: try varint()))
      case 1: doubles.append(decode(try take(8), Double.self)[0])
      case 5: floats.append(decode(try take(4), Float.self)[0])
      case 2:
        let payload = try take(Int(try varint()))
        switch field {
        case 4: floats += decode(payload, Float.self)
        case 10: doubles += decode(payload, Double.self)
        case 9: raw = payload
        case 1, 5, 7, 11:
          var inner = TensorFile(bytes: payload)
          while inner.position < payload.count { add(field, Int64(bitPattern: try inner.varint())) }
        default: break
        }
      default: throw Unreadable(reason: "unknown wire type")
      }
    }
  }

  private mutating func add(_ field: UInt64, _ value: Int64) {
    switch field {
    case 1: dimensions.append(Int(value))
    case 2: typeNumber = Int32(truncatingIfNeeded: value)
    case 5, 7, 11: integers.append(value)
    default: break
    }
  }

  private func decode<T>(_ payload: [UInt8], _: T.Type) -> [T] {
    payload.withUnsafeBytes { buffer in
      (0..<(buffer.count / MemoryLayout<T>.stride)).map {
        buffer.loadUnaligned(fromByteOffset: $0 * MemoryLayout<T>.stride, as: T.self)
      }
    }
  }

  private func tensor() throws -> Tensor {
    guard let type = DataType(rawValue: typeNumber), let bits = type.bitWidth, bits >= 8 else {
      throw Unreadable(reason: "element type \(typeNumber)")
    }
    if let raw {
      let tensor = try Tensor(uninitialized: type, shape: Shape(dimensions))
      guard raw.count == tensor.byteCount else { throw Unreadable(reason: "size") }
      raw.withUnsafeBytes { source in
        if let start = source.baseAddress {
          tensor.storage.baseAddress.copyMemory(from: start, byteCount: source.count)
        }
      }
      return tensor
    }
    switch type {
    case .float32: return try Tensor(floats, shape: dimensions)
    case .float64: return try Tensor(elements: doubles, .float64, shape: dimensions)
    case .int64: return try Tensor(elements: integers, .int64, shape: dimensions)
    case .int32:
      return try Tensor(elements: integers.map(Int32.init), .int32, shape: dimensions)
    case .uint8, .bool:
      return try Tensor(
        elements: integers.map { UInt8(truncatingIfNeeded: $0) }, type, shape: dimensions)
    case .int8:
      return try Tensor(
        elements: integers.map { Int8(truncatingIfNeeded: $0) }, type, shape: dimensions)
    default: throw Unreadable(reason: "\(type) without raw data")
    }
  }
}

extension Tensor {
  /// The elements as doubles, for comparisons.
  func doubles() throws -> [Double] {
    func all<T: BitwiseCopyable>(_: T.Type, _ convert: (T) -> Double) throws -> [Double] {
      try withElements(dataType) { (elements: UnsafeBufferPointer<T>) throws(HalfstepError) in
        elements.map(convert)
      }
    }
    switch dataType {
    case .float32: return try all(Float.self) { Double($0) }
    case .float64: return try all(Double.self) { $0 }
    case .float16: return try all(Float16.self) { Double($0) }
    case .bfloat16: return try all(UInt16.self) { Double(Float(bitPattern: UInt32($0) << 16)) }
    case .int8: return try all(Int8.self) { Double($0) }
    case .int16: return try all(Int16.self) { Double($0) }
    case .int32: return try all(Int32.self) { Double($0) }
    case .int64: return try all(Int64.self) { Double($0) }
    case .uint8, .bool: return try all(UInt8.self) { Double($0) }
    case .uint16: return try all(UInt16.self) { Double($0) }
    case .uint32: return try all(UInt32.self) { Double($0) }
    case .uint64: return try all(UInt64.self) { Double($0) }
    default: throw TensorFile.Unreadable(reason: "\(dataType)")
    }
  }
}
