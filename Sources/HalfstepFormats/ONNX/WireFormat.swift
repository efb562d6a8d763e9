// SPDX-License-Identifier: Apache-2.0
// Splits and joins protocol-buffer messages at the level of fields, without decoding them.

import HalfstepNumerics

/// Walks over the fields of one protocol-buffer message.
///
/// Weights go from the file into tensors through this walk, so that no message object ever holds
/// them.
struct WireReader {
  /// One field as it lies in the message.
  struct Field {
    /// The number from the `.proto` file.
    var number: Int
    /// Tag, length and content.
    var whole: Range<Int>
    /// The content of a length-delimited field; nil for plain numbers.
    var content: Range<Int>?
  }

  private let bytes: UnsafeRawBufferPointer
  private let end: Int
  private var position: Int

  /// Walks over the message that lies at `range` of `bytes`.
  init(_ bytes: UnsafeRawBufferPointer, _ range: Range<Int>) {
    self.bytes = bytes
    self.position = range.lowerBound
    self.end = range.upperBound
  }

  /// The next field, or nil at the end of the message.
  ///
  /// - Throws: `HalfstepError.malformedFile` giving the offset.
  mutating func next() throws(HalfstepError) -> Field? {
    guard position < end else { return nil }
    let start = position
    let tag = try varint()
    guard tag >> 3 >= 1, tag >> 3 < 1 << 29 else { throw malformed(start, "bad field number") }
    var content: Range<Int>?
    switch tag & 7 {
    case 0:
      _ = try varint()
    case 1:
      try skip(8)
    case 2:
      let length = try varint()
      guard length <= UInt64(end - position) else {
        throw malformed(
          start, "a field declares \(length) bytes where \(end - position) are left")
      }
      let first = position
      try skip(Int(length))
      content = first..<position
    case 5:
      try skip(4)
    default:
      throw malformed(start, "bad wire type \(tag & 7)")
    }
    return Field(number: Int(tag >> 3), whole: start..<position, content: content)
  }

  private mutating func varint() throws(HalfstepError) -> UInt64 {
    let start = position
    var value: UInt64 = 0
    var shift: UInt64 = 0
    while position < end, shift < 64 {
      let byte = bytes[position]
      position += 1
      value |= UInt64(byte & 0x7F) << shift
      if byte < 0x80 { return value }
      shift += 7
    }
    throw malformed(start, "a number does not end")
  }

  private mutating func skip(_ count: Int) throws(HalfstepError) {
    guard count <= end - position else { throw malformed(position, "the data ends early") }
    position += count
  }

  private func malformed(_ offset: Int, _ what: String) -> HalfstepError {
    HalfstepError(.malformedFile, "not a valid ONNX model: \(what) (byte \(offset))")
  }
}

/// Appends fields of a protocol-buffer message.
struct WireWriter {
  private(set) var bytes: [UInt8] = []

  /// Appends bytes that are whole fields already.
  mutating func append(_ fields: some Sequence<UInt8>) { bytes.append(contentsOf: fields) }

  /// Appends a length-delimited field.
  mutating func append(field number: Int, _ content: [UInt8]) {
    appendHeader(field: number, count: content.count)
    bytes.append(contentsOf: content)
  }

  /// Appends tag and length of a field whose `count` bytes of content follow elsewhere.
  mutating func appendHeader(field number: Int, count: Int) {
    varint(UInt64(number) << 3 | 2)
    varint(UInt64(count))
  }

  private mutating func varint(_ value: UInt64) {
    var rest = value
    while rest >= 0x80 {
      bytes.append(UInt8(truncatingIfNeeded: rest) | 0x80)
      rest >>= 7
    }
    bytes.append(UInt8(rest))
  }
}
