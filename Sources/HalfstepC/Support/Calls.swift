// SPDX-License-Identifier: Apache-2.0
// What every exported function shares: errors, handles, arguments.

import CHalfstep
import Halfstep

/// Runs the body of an exported function, and turns what it throws into a status and a message.
func report(
  to error: UnsafeMutablePointer<hs_error>?, _ body: () throws(HalfstepError) -> Void
) -> hs_status {
  let previousThreads = ThreadCount.apply()
  defer { ThreadCount.restore(previousThreads) }
  do throws(HalfstepError) {
    try body()
    return hs_status(HS_OK)
  } catch let failure {
    if let error { fill(error, with: failure) }
    return failure.code.rawValue
  }
}

/// Writes status and message, cut at a character boundary.
private func fill(_ error: UnsafeMutablePointer<hs_error>, with failure: HalfstepError) {
  let offset = MemoryLayout<hs_error>.offset(of: \.message) ?? 4
  let capacity = MemoryLayout<hs_error>.size - offset - 1
  error.pointee.status = failure.code.rawValue
  let text = UnsafeMutableRawPointer(error) + offset
  var message = failure.message
  var length = message.withUTF8 { utf8 in
    var length = min(utf8.count, capacity)
    // A continuation byte after the cut means that the cut is inside a character.
    while length > 0, length < utf8.count, utf8[length] & 0xC0 == 0x80 { length -= 1 }
    if let start = utf8.baseAddress { text.copyMemory(from: start, byteCount: length) }
    return length
  }
  // Bytes after the text are NUL, so that nothing of an older message is left.
  while length <= capacity {
    text.storeBytes(of: 0, toByteOffset: length, as: UInt8.self)
    length += 1
  }
}

/// The error for an argument that must not be NULL.
func nullArgument(_ name: StaticString) -> HalfstepError {
  HalfstepError(.invalidArgument, "argument '\(name)' is NULL")
}

/// The pointer behind an argument that must not be NULL.
func required<Pointer>(
  _ pointer: Pointer?, _ name: StaticString
) throws(HalfstepError) -> Pointer {
  guard let pointer else { throw nullArgument(name) }
  return pointer
}

/// The text of an argument, which must be valid UTF-8.
func text(
  _ pointer: UnsafePointer<CChar>?, _ name: StaticString
) throws(HalfstepError) -> String {
  guard let text = String(validatingCString: try required(pointer, name)) else {
    throw HalfstepError(.invalidArgument, "argument '\(name)' is not UTF-8")
  }
  return text
}

/// The texts of an argument; NULL is allowed if there are none.
func texts(
  _ pointer: UnsafePointer<UnsafePointer<CChar>?>?, _ count: Int, _ name: StaticString
) throws(HalfstepError) -> [String] {
  var result: [String] = []
  if count == 0 { return result }
  let pointer = try required(pointer, name)
  for index in 0..<(try length(count, name)) { result.append(try text(pointer[index], name)) }
  return result
}

/// Checks the length that goes with a pointer.
func length(_ count: Int, _ name: StaticString) throws(HalfstepError) -> Int {
  // C's size_t arrives as a signed integer: the upper half of its range is negative here.
  guard count >= 0 else { throw HalfstepError(.invalidArgument, "argument '\(name)' is too large") }
  return count
}

/// The element of an indexed getter.
func element<Element>(
  _ items: some RandomAccessCollection<Element>, at index: Int
) throws(HalfstepError) -> Element {
  guard index >= 0, index < items.count else {
    throw HalfstepError(
      .invalidArgument, "index \(UInt(bitPattern: index)): expected less than \(items.count)")
  }
  return items[items.index(items.startIndex, offsetBy: index)]
}

/// Reads an options struct: the fields that the caller's header knew, defaults (zeros) for the rest.
///
/// - Throws: `HalfstepError.invalidArgument` for a size that no header had, or for a newer header's
///   fields that are not 0.
func options<Options: BitwiseCopyable>(
  _ pointer: UnsafePointer<Options>?, _ zero: Options
) throws(HalfstepError) -> Options {
  var result = zero
  guard let pointer else { return result }
  let raw = UnsafeRawPointer(pointer)
  let size = raw.load(as: Int.self)
  // Every options struct holds a size_t, so its size is a multiple of 8.
  guard (8...4096).contains(size), size % 8 == 0 else {
    throw HalfstepError(
      .invalidArgument,
      "\(Options.self).struct_size: expected \(MemoryLayout<Options>.size), got \(UInt(bitPattern: size))"
    )
  }
  let known = min(size, MemoryLayout<Options>.size)
  withUnsafeMutableBytes(of: &result) { $0.baseAddress?.copyMemory(from: raw, byteCount: known) }
  for offset in known..<size where raw.load(fromByteOffset: offset, as: UInt8.self) != 0 {
    throw HalfstepError(
      .invalidArgument, "\(Options.self): byte \(offset) is set, which this version does not know")
  }
  return result
}

/// Gives an object to the caller, who owns it from now on.
func handOver(_ object: AnyObject) -> OpaquePointer {
  OpaquePointer(Unmanaged.passRetained(object).toOpaque())
}

/// The object behind a handle.
func object<Object: AnyObject>(
  _ handle: OpaquePointer?, _ name: StaticString, as type: Object.Type = Object.self
) throws(HalfstepError) -> Object {
  let handle = try required(handle, name)
  return Unmanaged<Object>.fromOpaque(UnsafeRawPointer(handle)).takeUnretainedValue()
}

/// Ends the caller's ownership; NULL is a no-op.
func release(_ handle: OpaquePointer?) {
  guard let handle else { return }
  Unmanaged<AnyObject>.fromOpaque(UnsafeRawPointer(handle)).release()
}

/// Runs the body of a getter that gives a number of elements.
func count(
  _ outCount: UnsafeMutablePointer<Int>?, _ error: UnsafeMutablePointer<hs_error>?,
  _ body: () throws(HalfstepError) -> Int
) -> hs_status {
  outCount?.pointee = 0
  return report(to: error) { () throws(HalfstepError) in
    let count = try body()
    try required(outCount, "out_count").pointee = count
  }
}

/// Runs the body of a getter that gives one element of a list.
func item<Item>(
  _ outItem: UnsafeMutablePointer<Item>?, _ zero: Item, _ outName: StaticString, _ index: Int,
  _ error: UnsafeMutablePointer<hs_error>?, _ body: () throws(HalfstepError) -> [Item]
) -> hs_status {
  outItem?.pointee = zero
  return report(to: error) { () throws(HalfstepError) in
    let items = try body()
    try required(outItem, outName).pointee = try element(items, at: index)
  }
}
