// SPDX-License-Identifier: Apache-2.0
// A 128-bit hash of much data.

import HalfstepNumerics

/// A 128-bit hash of much data, the same on every machine and in every process.
///
/// Four words at a time, each folded into a state of its own by a full multiplication. It tells
/// contents apart, at about the speed of memory; it does not withstand intent.
struct ContentHash {
  private static let factors: [UInt64] = [
    0x9e37_79b9_7f4a_7c15, 0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb, 0xd6e8_feb8_6659_fd93,
  ]
  private var state = (
    factors[1], factors[2], factors[3], factors[0]
  )
  private var count: UInt64 = 0

  @inline(__always)
  private static func fold(_ a: UInt64, _ b: UInt64) -> UInt64 {
    let product = a.multipliedFullWidth(by: b)
    return product.high ^ product.low
  }

  @inline(__always)
  private static func turned(_ word: UInt64) -> UInt64 { word << 29 | word >> 35 }

  mutating func add(_ a: UInt64, _ b: UInt64 = 0, _ c: UInt64 = 0, _ d: UInt64 = 0) {
    // A word that cancels a state would wipe out all that came before, were it not added again.
    state.0 = Self.fold(state.0 ^ a, 0x9e37_79b9_7f4a_7c15) ^ Self.turned(state.0 &+ a)
    state.1 = Self.fold(state.1 ^ b, 0xbf58_476d_1ce4_e5b9) ^ Self.turned(state.1 &+ b)
    state.2 = Self.fold(state.2 ^ c, 0x94d0_49bb_1331_11eb) ^ Self.turned(state.2 &+ c)
    state.3 = Self.fold(state.3 ^ d, 0xd6e8_feb8_6659_fd93) ^ Self.turned(state.3 &+ d)
    count &+= 1
  }

  mutating func add(_ bytes: UnsafeRawBufferPointer) {
    add(UInt64(bytes.count))
    func word(_ offset: Int) -> UInt64 {
      UInt64(littleEndian: bytes.loadUnaligned(fromByteOffset: offset, as: UInt64.self))
    }
    var offset = 0
    while offset &+ 32 <= bytes.count {
      add(word(offset), word(offset &+ 8), word(offset &+ 16), word(offset &+ 24))
      offset &+= 32
    }
    while offset < bytes.count {
      add(UInt64(bytes[offset]))
      offset += 1
    }
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

  /// The hash as 32 hexadecimal digits.
  var text: String {
    let left = Self.fold(state.0 ^ count, state.1 ^ 0xd6e8_feb8_6659_fd93)
    let right = Self.fold(state.2 ^ 0x94d0_49bb_1331_11eb, state.3 ^ 0x9e37_79b9_7f4a_7c15)
    let high = Self.fold(left ^ 0xbf58_476d_1ce4_e5b9, right ^ 0x9e37_79b9_7f4a_7c15)
    let low = Self.fold(left ^ Self.turned(right), 0x94d0_49bb_1331_11eb) ^ right
    return [high, low].map { word in
      let digits = String(word, radix: 16)
      return String(repeating: "0", count: 16 - digits.count) + digits
    }.joined()
  }
}
