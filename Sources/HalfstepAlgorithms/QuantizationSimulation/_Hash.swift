// SPDX-License-Identifier: Apache-2.0
// A 64-bit hash that is the same on every machine and in every process.

import HalfstepGraph
import HalfstepNumerics

/// A 64-bit hash that is the same on every machine and in every process.
///
/// Words go through the multiply-and-rotate of an FNV-like mixer with a final avalanche; it guards
/// against mix-ups and damage, not against intent.
struct _Hash {
  private var state: UInt64 = 0xcbf2_9ce4_8422_2325

  /// The hash of everything added so far.
  var value: UInt64 {
    var word = state
    word = (word ^ (word >> 30)) &* 0xbf58_476d_1ce4_e5b9
    word = (word ^ (word >> 27)) &* 0x94d0_49bb_1331_11eb
    return word ^ (word >> 31)
  }

  /// The hash of a run of bytes.
  static func of(_ bytes: [UInt8]) -> UInt64 {
    var hash = _Hash()
    bytes.withUnsafeBytes { hash.add($0) }
    return hash.value
  }

  mutating func add(_ word: UInt64) {
    state = (state ^ word) &* 0x0000_0100_0000_01b3
    state = state << 27 | state >> 37
  }

  mutating func add(_ bytes: UnsafeRawBufferPointer) {
    add(UInt64(bytes.count))
    var offset = 0
    while offset + 8 <= bytes.count {
      add(UInt64(littleEndian: bytes.loadUnaligned(fromByteOffset: offset, as: UInt64.self)))
      offset += 8
    }
    var tail: UInt64 = 0
    while offset < bytes.count {
      tail = tail << 8 | UInt64(bytes[offset])
      offset += 1
    }
    add(tail)
  }

  mutating func add(_ text: String) {
    var text = text
    text.withUTF8 { add(UnsafeRawBufferPointer($0)) }
  }

  mutating func add(_ tensor: Tensor) {
    add(UInt64(UInt32(bitPattern: tensor.dataType.rawValue)))
    for extent in tensor.shape.dimensions { add(UInt64(extent)) }
    add(UnsafeRawBufferPointer(start: tensor.storage.baseAddress, count: tensor.byteCount))
    withExtendedLifetime(tensor.storage) {}
  }

  mutating func add(_ attribute: Attribute) {
    switch attribute {
    case .int(let value): add(UInt64(bitPattern: value))
    case .float(let value): add(UInt64(value.bitPattern))
    case .string(let bytes), .opaque(let bytes): bytes.withUnsafeBytes { add($0) }
    case .tensor(let tensor): add(tensor)
    case .ints(let values): for value in values { add(UInt64(bitPattern: value)) }
    case .floats(let values): for value in values { add(UInt64(value.bitPattern)) }
    case .strings(let values): for bytes in values { bytes.withUnsafeBytes { add($0) } }
    }
  }
}
