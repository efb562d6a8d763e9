// SPDX-License-Identifier: Apache-2.0
// A JSON value with the path that leads to it, so that errors can name it.

import HalfstepNumerics
import OrderedCollections

/// A JSON value with the path that leads to it; every accessor fails with that path.
struct JSONCursor {
  /// The value.
  let value: JSONValue
  /// Keys and positions from the root, such as `op_type.Conv.params`.
  let path: String
  /// The kind of error to throw.
  let code: HalfstepError.Code

  /// A cursor at the root of a document.
  init(root: JSONValue, path: String = "", _ code: HalfstepError.Code) {
    self.init(root, path: path, code)
  }

  private init(_ value: JSONValue, path: String, _ code: HalfstepError.Code) {
    self.value = value
    self.path = path
    self.code = code
  }

  /// An error at this place.
  func failure(_ what: String) -> HalfstepError {
    HalfstepError(code, "\(path.isEmpty ? "the document" : path): \(what)")
  }

  private func mismatch(_ expected: String) -> HalfstepError {
    failure("expected \(expected), got \(value.kind)")
  }

  // MARK: Members

  /// The members of an object with any keys.
  func members() throws(HalfstepError) -> [(key: String, value: JSONCursor)] {
    guard case .object(let members) = value else { throw mismatch("an object") }
    return members.map { (key: $0.key, value: child($0.key, $0.value)) }
  }

  /// The members of an object whose keys must all be known.
  func members(
    known: Set<String>, required: Set<String> = []
  ) throws(HalfstepError) -> [String: JSONCursor] {
    guard case .object(let members) = value else { throw mismatch("an object") }
    for (key, value) in members where !known.contains(key) {
      throw child(key, value).failure("this key is not known")
    }
    for key in required.sorted() where members[key] == nil {
      throw failure("key '\(key)' is missing")
    }
    return Dictionary(uniqueKeysWithValues: members.map { ($0.key, child($0.key, $0.value)) })
  }

  /// The elements of an array.
  func elements() throws(HalfstepError) -> [JSONCursor] {
    guard case .array(let values) = value else { throw mismatch("an array") }
    return values.enumerated().map { index, value in
      JSONCursor(value, path: "\(path)[\(index)]", code)
    }
  }

  private func child(_ key: String, _ value: JSONValue) -> JSONCursor {
    JSONCursor(value, path: path.isEmpty ? key : "\(path).\(key)", code)
  }

  // MARK: Plain values

  /// A string.
  func string() throws(HalfstepError) -> String {
    guard case .string(let text) = value else { throw mismatch("a string") }
    return text
  }

  /// A boolean.
  func boolean() throws(HalfstepError) -> Bool {
    guard case .boolean(let flag) = value else { throw mismatch("true or false") }
    return flag
  }

  /// A boolean written as the string `True` or `False`.
  func spelledBoolean() throws(HalfstepError) -> Bool {
    switch value {
    case .string("True"): return true
    case .string("False"): return false
    case .string(let text): throw failure("expected \"True\" or \"False\", got \"\(text)\"")
    default: throw mismatch("\"True\" or \"False\"")
    }
  }

  /// A number.
  func number() throws(HalfstepError) -> Double {
    guard case .number(let number) = value else { throw mismatch("a number") }
    return number
  }

  /// A number without a fraction.
  func integer() throws(HalfstepError) -> Int {
    let number = try number()
    guard let integer = Int(exactly: number) else {
      throw failure("expected an integer, got \(number)")
    }
    return integer
  }
}
