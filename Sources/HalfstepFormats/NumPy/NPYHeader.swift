// SPDX-License-Identifier: Apache-2.0
// The header of an NPY file.

import HalfstepNumerics

/// The header of an NPY file: a magic number, a version and a Python dictionary in text.
struct NPYHeader {
  /// First bytes of every NPY file.
  static let magic: [UInt8] = [0x93] + Array("NUMPY".utf8)

  /// Type of the elements.
  let dataType: DataType
  /// Whether elements are in the other byte order.
  let isSwapped: Bool
  /// Whether the first index runs fastest.
  let isFortranOrder: Bool
  /// Extents.
  let shape: Shape
  /// Where the elements begin.
  let dataOffset: Int

  /// Reads the header at the start of `bytes`.
  ///
  /// - Throws: `HalfstepError.malformedFile`.
  init(_ bytes: UnsafeRawBufferPointer) throws(HalfstepError) {
    guard bytes.count >= 10, bytes.starts(with: Self.magic) else {
      throw HalfstepError(.malformedFile, "not an NPY file")
    }
    let version = bytes[6]
    guard (1...3).contains(version) else {
      throw HalfstepError(.unsupportedVersion, "NPY version \(version): expected 1 to 3")
    }
    let widthOfLength = version == 1 ? 2 : 4
    guard bytes.count >= 8 + widthOfLength else {
      throw HalfstepError(.malformedFile, "the NPY header ends early")
    }
    var length = 0
    for index in 0..<widthOfLength { length |= Int(bytes[8 + index]) << (8 * index) }
    let start = 8 + widthOfLength
    guard length <= bytes.count - start else {
      throw HalfstepError(.malformedFile, "the NPY header ends early")
    }
    dataOffset = start + length
    var parser = PythonLiteralParser(bytes[start..<start + length])
    guard case .dictionary(let entries) = try parser.parse() else {
      throw HalfstepError(.malformedFile, "the NPY header is not a dictionary")
    }
    guard case .text(let descriptor)? = entries["descr"],
      case .boolean(let isFortranOrder)? = entries["fortran_order"],
      case .tuple(let extents)? = entries["shape"]
    else {
      throw HalfstepError(
        .malformedFile, "the NPY header lacks a plain descr, fortran_order or shape")
    }
    self.isFortranOrder = isFortranOrder
    let order = descriptor.utf8.first
    guard let dataType = Self.types[String(descriptor.dropFirst())],
      let order, "<>|=".utf8.contains(order)
    else {
      throw HalfstepError(.malformedFile, "element type '\(descriptor)' is not supported")
    }
    self.dataType = dataType
    isSwapped = order == UInt8(ascii: ">") && dataType.bitWidth != 8
    do throws(HalfstepError) {
      shape = try Shape(extents)
    } catch {
      throw HalfstepError(.malformedFile, error.message)
    }
  }

  /// The header of a file that holds `tensor`.
  ///
  /// - Throws: `HalfstepError.typeMismatch` for an element type that NumPy lacks.
  static func serialize(_ tensor: Tensor) throws(HalfstepError) -> [UInt8] {
    guard let code = types.first(where: { $0.value == tensor.dataType })?.key else {
      throw HalfstepError(.typeMismatch, "NPY files cannot hold \(tensor.dataType)")
    }
    let order = tensor.dataType.bitWidth == 8 ? "|" : "<"
    let extents = tensor.shape.dimensions
    let shape =
      extents.count == 1
      ? "(\(extents[0]),)"
      : "(" + extents.map(String.init).joined(separator: ", ") + ")"
    var text = "{'descr': '\(order)\(code)', 'fortran_order': False, 'shape': \(shape), }"
    // Elements start at a multiple of 64; the header ends with a newline.
    let unpadded = magic.count + 4 + text.utf8.count + 1
    text += String(repeating: " ", count: (64 - unpadded % 64) % 64) + "\n"
    let length = text.utf8.count
    return magic + [1, 0, UInt8(length & 0xFF), UInt8(length >> 8)] + Array(text.utf8)
  }

  private static let types: [String: DataType] = [
    "f2": .float16, "f4": .float32, "f8": .float64, "i1": .int8, "u1": .uint8, "i2": .int16,
    "u2": .uint16, "i4": .int32, "u4": .uint32, "i8": .int64, "u8": .uint64, "b1": .bool,
    "c8": .complex64, "c16": .complex128,
  ]
}

/// Reads the few Python literals that NPY headers are made of.
private struct PythonLiteralParser {
  enum Value {
    case text(String)
    case boolean(Bool)
    case tuple([Int])
    case dictionary([String: Value])
  }

  private var rest: Slice<UnsafeRawBufferPointer>

  init(_ text: Slice<UnsafeRawBufferPointer>) { rest = text }

  mutating func parse() throws(HalfstepError) -> Value {
    let value = try dictionary()
    skipSpace()
    guard rest.isEmpty else { throw malformed() }
    return value
  }

  private mutating func dictionary() throws(HalfstepError) -> Value {
    var entries: [String: Value] = [:]
    try expect("{")
    while !accept("}") {
      let key = try text()
      try expect(":")
      guard entries.updateValue(try value(), forKey: key) == nil else { throw malformed() }
      if !accept(",") {
        try expect("}")
        break
      }
    }
    return .dictionary(entries)
  }

  private mutating func value() throws(HalfstepError) -> Value {
    skipSpace()
    switch rest.first {
    case UInt8(ascii: "("): return .tuple(try tuple())
    case UInt8(ascii: "T"):
      for letter in "True" { try expect(letter) }
      return .boolean(true)
    case UInt8(ascii: "F"):
      for letter in "False" { try expect(letter) }
      return .boolean(false)
    case UInt8(ascii: "["):
      throw HalfstepError(.malformedFile, "structured element types are not supported")
    default: return .text(try text())
    }
  }

  private mutating func tuple() throws(HalfstepError) -> [Int] {
    var values: [Int] = []
    try expect("(")
    while !accept(")") {
      skipSpace()
      var value = 0
      var digits = 0
      while let byte = rest.first, (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte) {
        let (product, overflow) = value.multipliedReportingOverflow(by: 10)
        let (sum, carry) = product.addingReportingOverflow(Int(byte - UInt8(ascii: "0")))
        guard !overflow, !carry else { throw malformed() }
        value = sum
        digits += 1
        rest.removeFirst()
      }
      guard digits > 0 else { throw malformed() }
      values.append(value)
      // Python 2 wrote long integers with an L.
      if rest.first == UInt8(ascii: "L") { rest.removeFirst() }
      if !accept(",") {
        try expect(")")
        break
      }
    }
    return values
  }

  private mutating func text() throws(HalfstepError) -> String {
    skipSpace()
    guard let quote = rest.first, quote == UInt8(ascii: "'") || quote == UInt8(ascii: "\"") else {
      throw malformed()
    }
    rest.removeFirst()
    guard let end = rest.firstIndex(of: quote) else { throw malformed() }
    let result = String(decoding: rest[..<end], as: UTF8.self)
    rest = rest[(end + 1)...]
    return result
  }

  private mutating func skipSpace() {
    while let byte = rest.first, byte == 0x20 || (0x09...0x0D).contains(byte) {
      rest.removeFirst()
    }
  }

  private mutating func accept(_ symbol: Character) -> Bool {
    skipSpace()
    guard rest.first == symbol.asciiValue else { return false }
    rest.removeFirst()
    return true
  }

  private mutating func expect(_ symbol: Character) throws(HalfstepError) {
    guard accept(symbol) else { throw malformed() }
  }

  private func malformed() -> HalfstepError {
    HalfstepError(.malformedFile, "the NPY header cannot be read")
  }
}
