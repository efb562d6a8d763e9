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
  let home: Home
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

  /// The floats. Only for steps of a bound plan.
  var floats: UnsafeMutablePointer<Float> { bytes.assumingMemoryBound(to: Float.self) }

  /// The bytes. Only for steps of a bound plan.
  var bytes: UnsafeMutableRawPointer {
    guard let address else { preconditionFailure("buffer used before its plan was bound") }
    return address
  }
}
