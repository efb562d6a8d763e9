// SPDX-License-Identifier: Apache-2.0
// JSON text as a tree that keeps the order of keys.

import HalfstepNumerics
import OrderedCollections

/// A JSON value; objects keep the order of their keys.
indirect enum JSONValue: Hashable, Sendable {
  case null
  case boolean(Bool)
  case number(Double)
  case string(String)
  case array([JSONValue])
  case object(OrderedDictionary<String, JSONValue>)

  /// What messages call the kind of value.
  var kind: String {
    switch self {
    case .null: "null"
    case .boolean: "a boolean"
    case .number: "a number"
    case .string: "a string"
    case .array: "an array"
    case .object: "an object"
    }
  }

  /// Reads JSON text.
  ///
  /// - Throws: `HalfstepError` of the given kind with the line, for text that is no JSON, a repeated
  ///   key, a number beyond the range of `Double`, or nesting deeper than 64.
  init(parsing bytes: [UInt8], _ code: HalfstepError.Code) throws(HalfstepError) {
    var parser = JSONParser(bytes: bytes, code: code)
    self = try parser.parse()
  }
}

/// A recursive-descent parser of JSON; the depth is bounded.
private struct JSONParser {
  let bytes: [UInt8]
  let code: HalfstepError.Code
  var position = 0

  private static let depthLimit = 64

  init(bytes: [UInt8], code: HalfstepError.Code) {
    self.bytes = bytes
    self.code = code
    // Editors on Windows put a byte-order mark in front.
    if bytes.starts(with: [0xEF, 0xBB, 0xBF]) { position = 3 }
  }

  mutating func parse() throws(HalfstepError) -> JSONValue {
    let result = try value(depth: 0)
    skipSpace()
    guard position == bytes.count else { throw failure("text after the end") }
    return result
  }

  private mutating func value(depth: Int) throws(HalfstepError) -> JSONValue {
    guard depth < Self.depthLimit else { throw failure("nested too deeply") }
    skipSpace()
    guard position < bytes.count else { throw failure("the text ends early") }
    switch bytes[position] {
    case UInt8(ascii: "{"): return .object(try object(depth: depth))
    case UInt8(ascii: "["): return .array(try array(depth: depth))
    case UInt8(ascii: "\""): return .string(try string())
    case UInt8(ascii: "t"): return try word("true", .boolean(true))
    case UInt8(ascii: "f"): return try word("false", .boolean(false))
    case UInt8(ascii: "n"): return try word("null", .null)
    default: return .number(try number())
    }
  }

  private mutating func object(
    depth: Int
  ) throws(HalfstepError) -> OrderedDictionary<String, JSONValue> {
    var result: OrderedDictionary<String, JSONValue> = [:]
    position += 1
    if accept("}") { return result }
    while true {
      skipSpace()
      guard position < bytes.count, bytes[position] == UInt8(ascii: "\"") else {
        throw failure("expected a key")
      }
      let key = try string()
      try expect(":")
      guard result.updateValue(try value(depth: depth + 1), forKey: key) == nil else {
        throw failure("key '\(key)' is repeated")
      }
      if accept("}") { return result }
      try expect(",")
    }
  }

  private mutating func array(depth: Int) throws(HalfstepError) -> [JSONValue] {
    var result: [JSONValue] = []
    position += 1
    if accept("]") { return result }
    while true {
      result.append(try value(depth: depth + 1))
      if accept("]") { return result }
      try expect(",")
    }
  }

  private mutating func string() throws(HalfstepError) -> String {
    position += 1
    var content: [UInt8] = []
    while position < bytes.count {
      let byte = bytes[position]
      position += 1
      switch byte {
      case UInt8(ascii: "\""):
        guard let text = String(validating: content, as: UTF8.self) else {
          throw failure("a string is not UTF-8")
        }
        return text
      case UInt8(ascii: "\\"): try escape(into: &content)
      case 0..<0x20: throw failure("a control character in a string")
      default: content.append(byte)
      }
    }
    throw failure("a string does not end")
  }

  private mutating func escape(into content: inout [UInt8]) throws(HalfstepError) {
    guard position < bytes.count else { throw failure("a string does not end") }
    let byte = bytes[position]
    position += 1
    switch byte {
    case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): content.append(byte)
    case UInt8(ascii: "b"): content.append(0x08)
    case UInt8(ascii: "f"): content.append(0x0C)
    case UInt8(ascii: "n"): content.append(0x0A)
    case UInt8(ascii: "r"): content.append(0x0D)
    case UInt8(ascii: "t"): content.append(0x09)
    case UInt8(ascii: "u"):
      var scalar = try hexadecimal()
      // Beyond 16 bits a character takes two escapes.
      if (0xD800..<0xDC00).contains(scalar), position + 1 < bytes.count,
        bytes[position] == UInt8(ascii: "\\"), bytes[position + 1] == UInt8(ascii: "u")
      {
        position += 2
        let low = try hexadecimal()
        guard (0xDC00..<0xE000).contains(low) else { throw failure("a bad \\u escape") }
        scalar = 0x10000 + (scalar - 0xD800) << 10 + (low - 0xDC00)
      }
      guard let unicode = Unicode.Scalar(scalar) else { throw failure("a bad \\u escape") }
      content.append(contentsOf: UTF8.encode(unicode)!)
    default: throw failure("a bad escape")
    }
  }

  private mutating func hexadecimal() throws(HalfstepError) -> UInt32 {
    guard bytes.count - position >= 4,
      bytes[position..<position + 4].allSatisfy({ Character(Unicode.Scalar($0)).isHexDigit }),
      let value = UInt32(String(decoding: bytes[position..<position + 4], as: UTF8.self), radix: 16)
    else { throw failure("a bad \\u escape") }
    position += 4
    return value
  }

  private mutating func number() throws(HalfstepError) -> Double {
    let start = position
    var digits = 0
    if peek("-") { position += 1 }
    digits = skipDigits()
    // JSON has no leading zeros; Double would take them.
    let first = bytes[start] == UInt8(ascii: "-") ? start + 1 : start
    guard digits > 0, digits == 1 || bytes[first] != UInt8(ascii: "0") else {
      position = start
      throw failure("expected a value")
    }
    if peek(".") {
      position += 1
      guard skipDigits() > 0 else { throw failure("a bad number") }
    }
    if peek("e") || peek("E") {
      position += 1
      if peek("+") || peek("-") { position += 1 }
      guard skipDigits() > 0 else { throw failure("a bad number") }
    }
    guard let value = Double(String(decoding: bytes[start..<position], as: UTF8.self)),
      value.isFinite
    else { throw failure("a number is too large") }
    return value
  }

  private mutating func skipDigits() -> Int {
    let start = position
    while position < bytes.count, (0x30...0x39).contains(bytes[position]) { position += 1 }
    return position - start
  }

  private mutating func word(
    _ text: StaticString, _ value: JSONValue
  ) throws(HalfstepError) -> JSONValue {
    let matches = text.withUTF8Buffer { bytes[position...].starts(with: $0) }
    guard matches else { throw failure("expected a value") }
    position += text.utf8CodeUnitCount
    return value
  }

  private func peek(_ symbol: Unicode.Scalar) -> Bool {
    position < bytes.count && bytes[position] == UInt8(ascii: symbol)
  }

  private mutating func accept(_ symbol: Unicode.Scalar) -> Bool {
    skipSpace()
    guard peek(symbol) else { return false }
    position += 1
    return true
  }

  private mutating func expect(_ symbol: Unicode.Scalar) throws(HalfstepError) {
    guard accept(symbol) else { throw failure("expected '\(symbol)'") }
  }

  private mutating func skipSpace() {
    while position < bytes.count {
      switch bytes[position] {
      case 0x20, 0x09, 0x0A, 0x0D: position += 1
      default: return
      }
    }
  }

  private func failure(_ what: String) -> HalfstepError {
    let line = 1 + bytes[..<min(position, bytes.count)].reduce(0) { $0 + ($1 == 0x0A ? 1 : 0) }
    return HalfstepError(code, "not valid JSON: \(what) (line \(line))")
  }
}
