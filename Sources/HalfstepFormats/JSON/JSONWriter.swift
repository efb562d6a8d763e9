// SPDX-License-Identifier: Apache-2.0
// Writes JSON text that depends on nothing but the values.

import OrderedCollections

/// What `JSONWriter` writes: numbers come as text, so that each keeps its own precision.
indirect enum JSONText {
  /// Text that goes out as it is: a number, `true`, `false`.
  case literal(String)
  case string(String)
  case array([JSONText])
  case object([(String, JSONText)])

  static func integer(_ value: Int) -> JSONText { .literal(String(value)) }
  static func boolean(_ value: Bool) -> JSONText { .literal(value ? "true" : "false") }
  /// The shortest decimal that reads back as the same `Float`.
  static func float(_ value: Float) -> JSONText { .literal(value.description) }
  /// The shortest decimal that reads back as the same `Double`.
  static func double(_ value: Double) -> JSONText { .literal(value.description) }

  fileprivate var isPlain: Bool {
    switch self {
    case .literal, .string: true
    case .array, .object: false
    }
  }
}

/// Writes JSON text: two spaces of indentation, arrays of plain values on one line.
struct JSONWriter {
  /// The text so far, UTF-8.
  private(set) var bytes: [UInt8] = []

  /// Appends a document and a newline.
  mutating func append(_ value: JSONText) {
    append(value, indent: 0)
    bytes.append(0x0A)
  }

  private mutating func append(_ value: JSONText, indent: Int) {
    switch value {
    case .literal(let text): bytes.append(contentsOf: text.utf8)
    case .string(let text): append(quoted: text)
    case .array(let elements):
      if elements.allSatisfy(\.isPlain) {
        bytes.append(UInt8(ascii: "["))
        for (index, element) in elements.enumerated() {
          if index > 0 { bytes.append(contentsOf: ", ".utf8) }
          append(element, indent: 0)
        }
        bytes.append(UInt8(ascii: "]"))
        return
      }
      block("[", "]", elements, indent) { writer, element in
        writer.append(element, indent: indent + 2)
      }
    case .object(let members):
      block("{", "}", members, indent) { writer, member in
        writer.append(quoted: member.0)
        writer.bytes.append(contentsOf: ": ".utf8)
        writer.append(member.1, indent: indent + 2)
      }
    }
  }

  private mutating func block<Element>(
    _ open: StaticString, _ close: StaticString, _ elements: [Element], _ indent: Int,
    _ body: (inout JSONWriter, Element) -> Void
  ) {
    bytes.append(contentsOf: open.description.utf8)
    for (index, element) in elements.enumerated() {
      if index > 0 { bytes.append(UInt8(ascii: ",")) }
      newLine(indent + 2)
      body(&self, element)
    }
    if !elements.isEmpty { newLine(indent) }
    bytes.append(contentsOf: close.description.utf8)
  }

  private mutating func newLine(_ indent: Int) {
    bytes.append(0x0A)
    bytes.append(contentsOf: repeatElement(0x20, count: indent))
  }

  private mutating func append(quoted text: String) {
    bytes.append(UInt8(ascii: "\""))
    for byte in text.utf8 {
      switch byte {
      case UInt8(ascii: "\""), UInt8(ascii: "\\"):
        bytes.append(UInt8(ascii: "\\"))
        bytes.append(byte)
      case 0..<0x20:
        let digits = String(byte, radix: 16)
        bytes.append(contentsOf: "\\u00\(digits.utf8.count == 1 ? "0" : "")\(digits)".utf8)
      default: bytes.append(byte)
      }
    }
    bytes.append(UInt8(ascii: "\""))
  }
}
