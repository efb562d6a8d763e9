// SPDX-License-Identifier: Apache-2.0
// Memory that handles lend to callers.

import CHalfstep
import Halfstep

/// Allocations that live as long as this object.
final class LentMemory {
  private var blocks: [UnsafeMutableRawPointer] = []

  /// Copies a text, with a final NUL.
  func string(_ text: String) -> UnsafePointer<CChar> {
    array(text.utf8.map { CChar(bitPattern: $0) } + [0])
  }

  /// Copies an array; the result is never NULL, even for an empty one.
  func array<Element: BitwiseCopyable>(_ elements: [Element]) -> UnsafePointer<Element> {
    let block = UnsafeMutablePointer<Element>.allocate(capacity: max(elements.count, 1))
    block.initialize(from: elements, count: elements.count)
    blocks.append(UnsafeMutableRawPointer(block))
    return UnsafePointer(block)
  }

  deinit {
    for block in blocks { block.deallocate() }
  }
}

/// A list that a handle lends piece by piece: reports, inspections.
final class LentList<Item> {
  let items: [Item]
  private let memory: LentMemory

  init<Source>(_ source: [Source], _ lend: (Source, LentMemory) -> Item) {
    let memory = LentMemory()
    items = source.map { lend($0, memory) }
    self.memory = memory
  }
}

/// A handle that gives out bytes in two calls.
protocol LendsBytes: AnyObject {
  var pending: PendingBytes { get set }
}

/// Runs the body of an export that tells how many bytes its counterpart will copy.
func pendingSize<Handle: LendsBytes>(
  _ handle: OpaquePointer?, _ name: StaticString, _ outSize: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?, key: () throws(HalfstepError) -> String,
  make: (Handle, String) throws(HalfstepError) -> [UInt8]
) -> hs_status {
  outSize?.pointee = 0
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(handle, name, as: Handle.self)
    let key = try key()
    let out = try required(outSize, "out_size")
    // Taken out while `make` runs, which may read the handle.
    var pending = handle.pending
    defer { handle.pending = pending }
    out.pointee = try pending.size(key) { () throws(HalfstepError) in try make(handle, key) }
  }
}

/// Runs the body of an export that copies bytes to the caller's buffer.
func pendingCopy<Handle: LendsBytes>(
  _ handle: OpaquePointer?, _ name: StaticString, to buffer: UnsafeMutableRawPointer?,
  _ capacity: Int, _ outSize: UnsafeMutablePointer<Int>?, _ error: UnsafeMutablePointer<hs_error>?,
  key: () throws(HalfstepError) -> String,
  make: (Handle, String) throws(HalfstepError) -> [UInt8]
) -> hs_status {
  outSize?.pointee = 0
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(handle, name, as: Handle.self)
    let key = try key()
    var pending = handle.pending
    defer { handle.pending = pending }
    try pending.copy(key, to: buffer, capacity: capacity, outSize: outSize) {
      () throws(HalfstepError) in try make(handle, key)
    }
  }
}

/// Bytes between the call that asks for their size and the call that copies them.
struct PendingBytes {
  private var bytes: [UInt8]?
  private var key: String = ""

  /// Makes the bytes, or finds those of an earlier call with the same key.
  mutating func size(
    _ key: String, _ make: () throws(HalfstepError) -> [UInt8]
  ) throws(HalfstepError) -> Int {
    if let bytes, self.key == key { return bytes.count }
    let made = try make()
    bytes = made
    self.key = key
    return made.count
  }

  /// Copies the bytes and forgets them.
  mutating func copy(
    _ key: String, to buffer: UnsafeMutableRawPointer?, capacity: Int,
    outSize: UnsafeMutablePointer<Int>?, _ make: () throws(HalfstepError) -> [UInt8]
  ) throws(HalfstepError) {
    outSize?.pointee = 0
    let buffer = try required(buffer, "buffer")
    let outSize = try required(outSize, "out_size")
    let count = try size(key, make)
    guard try length(capacity, "capacity") >= count else {
      throw HalfstepError(.invalidArgument, "buffer: expected \(count) bytes, got \(capacity)")
    }
    bytes?.withUnsafeBytes { source in
      if let start = source.baseAddress { buffer.copyMemory(from: start, byteCount: count) }
    }
    outSize.pointee = count
    bytes = nil
  }

  /// Forgets the bytes: what they were made of changed.
  mutating func clear() { bytes = nil }
}
