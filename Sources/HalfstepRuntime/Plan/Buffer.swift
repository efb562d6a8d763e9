// SPDX-License-Identifier: Apache-2.0
// A piece of memory that steps of a plan read and write.

import HalfstepNumerics

/// A piece of memory that steps of a plan read and write; its address is known once it is bound.
final class Buffer {
  enum Home {
    /// A part of the session's arena, shared with buffers that live at other times.
    case arena
    /// Memory of a constant; never written.
    case constant(TensorStorage)
    /// Memory that the caller provides for each run; never written.
    case external
  }

  let byteCount: Int
  private(set) var home: Home
  /// Where the bytes are now; nil until bound.
  private(set) var address: UnsafeMutableRawPointer?
  /// oneDNN objects that must follow the address.
  private var followers: [Memory] = []

  // What the memory planner knows.
  var firstStep = Int.max
  var lastStep = -1
  var offset = 0

  init(arena byteCount: Int) {
    self.byteCount = byteCount
    self.home = .arena
  }

  init(external byteCount: Int) {
    self.byteCount = byteCount
    self.home = .external
  }

  init(constant storage: TensorStorage, byteCount: Int) {
    self.byteCount = byteCount
    self.home = .constant(storage)
    self.address = storage.baseAddress
  }

  var isArena: Bool { if case .arena = home { true } else { false } }

  /// Takes the buffer out of the arena, before buffers are placed; `bind` then says where it is.
  func leaveArena() { home = .external }

  /// Makes a oneDNN object point here, now and after each later `bind`.
  func follow(_ memory: Memory) throws(HalfstepError) {
    followers.append(memory)
    if let address { try memory.point(to: address) }
  }

  /// Says where the bytes are.
  func bind(_ address: UnsafeMutableRawPointer) throws(HalfstepError) {
    if self.address == address { return }
    self.address = address
    for memory in followers { try memory.point(to: address) }
  }

  /// The floats.
  ///
  /// - Throws: `HalfstepError.internalError` before the plan was bound.
  var floats: UnsafeMutablePointer<Float> {
    get throws(HalfstepError) { try bytes.assumingMemoryBound(to: Float.self) }
  }

  /// The bytes.
  ///
  /// - Throws: `HalfstepError.internalError` before the plan was bound.
  var bytes: UnsafeMutableRawPointer {
    get throws(HalfstepError) {
      guard let address else {
        throw HalfstepError(.internalError, "a buffer was used before its plan was bound")
      }
      return address
    }
  }
}
