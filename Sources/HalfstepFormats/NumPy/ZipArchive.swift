// SPDX-License-Identifier: Apache-2.0
// The members of a ZIP archive in memory.

import CZlib
import HalfstepNumerics

/// The members of a ZIP archive in memory: stored or deflated, with 64-bit sizes where present.
struct ZipArchive {
  /// One file of the archive.
  struct Member {
    let name: String
    fileprivate let flags: Int
    fileprivate let method: Int
    fileprivate let checksum: Int
    fileprivate let compressed: Int
    fileprivate let uncompressed: Int
    fileprivate let offset: Int
  }

  /// Members in the order of the archive's directory.
  let members: [Member]
  private let bytes: UnsafeRawBufferPointer

  /// Whether the bytes begin like an archive.
  static func isArchive(_ bytes: UnsafeRawBufferPointer) -> Bool {
    bytes.starts(with: [0x50, 0x4B, 3, 4]) || bytes.starts(with: [0x50, 0x4B, 5, 6])
  }

  /// Reads the directory.
  ///
  /// - Throws: `HalfstepError.malformedFile`.
  init(_ bytes: UnsafeRawBufferPointer) throws(HalfstepError) {
    self.bytes = bytes
    let end = try Self.endRecord(bytes)
    var entries = try bytes.integer(at: end + 10, width: 2)
    var start = try bytes.integer(at: end + 16, width: 4)
    if entries == 0xFFFF || start == 0xFFFF_FFFF, end >= 20,
      try bytes.integer(at: end - 20, width: 4) == 0x0706_4B50
    {
      let record = try bytes.integer(at: end - 12, width: 8)
      guard try bytes.integer(at: record, width: 4) == 0x0606_4B50 else { throw Self.malformed() }
      entries = try bytes.integer(at: record + 32, width: 8)
      start = try bytes.integer(at: record + 48, width: 8)
    }
    // A directory entry takes 46 bytes or more.
    guard entries <= bytes.count / 46 else { throw Self.malformed() }
    var members: [Member] = []
    var position = start
    for _ in 0..<entries { members.append(try Self.member(bytes, &position)) }
    self.members = members
  }

  /// Where a stored member's bytes lie; nil if it is compressed.
  ///
  /// - Throws: `HalfstepError.malformedFile` also for a wrong checksum.
  func stored(_ member: Member) throws(HalfstepError) -> Range<Int>? {
    guard member.method == 0 else { return nil }
    let range = try data(member)
    guard member.compressed == member.uncompressed else { throw Self.malformed() }
    try check(UnsafeRawBufferPointer(rebasing: bytes[range]), member)
    return range
  }

  /// The bytes of a deflated member.
  ///
  /// - Throws: `HalfstepError.malformedFile` also for a wrong checksum; `.outOfMemory`.
  func inflated(_ member: Member) throws(HalfstepError) -> TensorStorage {
    guard member.method == 8 else {
      throw HalfstepError(.malformedFile, "compression method \(member.method) is not supported")
    }
    let range = try data(member)
    // Deflate shrinks to 1/1032 at best: a larger claim is a lie, and allocating for it an attack.
    guard member.uncompressed / 1032 <= member.compressed else { throw Self.malformed() }
    let storage = try TensorStorage(byteCount: member.uncompressed)
    var stream = z_stream()
    guard
      inflateInit2_(&stream, -MAX_WBITS, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size)) == Z_OK
    else { throw HalfstepError(.outOfMemory, "cannot start decompression") }
    defer { inflateEnd(&stream) }
    let source = UnsafeMutableRawPointer(mutating: bytes.baseAddress! + range.lowerBound)
      .assumingMemoryBound(to: UInt8.self)
    let target = storage.baseAddress.assumingMemoryBound(to: UInt8.self)
    var read = 0
    var written = 0
    while true {
      // zlib counts in 32 bits.
      let input = min(range.count - read, 1 << 30)
      let output = min(member.uncompressed - written, 1 << 30)
      stream.next_in = source + read
      stream.avail_in = UInt32(input)
      stream.next_out = target + written
      stream.avail_out = UInt32(output)
      let status = inflate(&stream, Z_NO_FLUSH)
      let consumed = input - Int(stream.avail_in)
      let produced = output - Int(stream.avail_out)
      read += consumed
      written += produced
      if status == Z_STREAM_END { break }
      guard status == Z_OK, consumed + produced > 0 else { throw Self.malformed() }
    }
    guard written == member.uncompressed else { throw Self.malformed() }
    try check(UnsafeRawBufferPointer(start: storage.baseAddress, count: written), member)
    return storage
  }

  private func check(
    _ content: UnsafeRawBufferPointer, _ member: Member
  ) throws(HalfstepError) {
    let sum = crc32_z(0, content.baseAddress?.assumingMemoryBound(to: UInt8.self), content.count)
    guard Int(sum) == member.checksum else {
      throw HalfstepError(.malformedFile, "its checksum is wrong")
    }
  }

  private func data(_ member: Member) throws(HalfstepError) -> Range<Int> {
    guard member.flags & 1 == 0 else {
      throw HalfstepError(.malformedFile, "encrypted archives are not supported")
    }
    let offset = member.offset
    guard try bytes.integer(at: offset, width: 4) == 0x0403_4B50 else { throw Self.malformed() }
    let start =
      try offset + 30 + bytes.integer(at: offset + 26, width: 2)
      + bytes.integer(at: offset + 28, width: 2)
    guard start <= bytes.count, member.compressed <= bytes.count - start else {
      throw Self.malformed()
    }
    return start..<start + member.compressed
  }

  // MARK: Directory

  private static func endRecord(_ bytes: UnsafeRawBufferPointer) throws(HalfstepError) -> Int {
    // The record takes 22 bytes and a comment of up to 65,535.
    var position = bytes.count - 22
    let lowest = max(0, position - 0xFFFF)
    while position >= lowest {
      if try bytes.integer(at: position, width: 4) == 0x0605_4B50 { return position }
      position -= 1
    }
    throw malformed()
  }

  private static func member(
    _ bytes: UnsafeRawBufferPointer, _ position: inout Int
  ) throws(HalfstepError) -> Member {
    let start = position
    guard try bytes.integer(at: start, width: 4) == 0x0201_4B50 else { throw malformed() }
    var compressed = try bytes.integer(at: start + 20, width: 4)
    var uncompressed = try bytes.integer(at: start + 24, width: 4)
    var offset = try bytes.integer(at: start + 42, width: 4)
    let nameCount = try bytes.integer(at: start + 28, width: 2)
    let extraCount = try bytes.integer(at: start + 30, width: 2)
    let commentCount = try bytes.integer(at: start + 32, width: 2)
    let nameEnd = start + 46 + nameCount
    position = nameEnd + extraCount + commentCount
    guard position <= bytes.count else { throw malformed() }
    var extra = nameEnd
    while extra + 4 <= nameEnd + extraCount {
      let kind = try bytes.integer(at: extra, width: 2)
      let size = try bytes.integer(at: extra + 2, width: 2)
      var field = extra + 4
      extra = field + size
      guard kind == 1 else { continue }
      // Only the sizes that do not fit in 32 bits are there, in this order.
      if uncompressed == 0xFFFF_FFFF {
        uncompressed = try bytes.integer(at: field, width: 8)
        field += 8
      }
      if compressed == 0xFFFF_FFFF {
        compressed = try bytes.integer(at: field, width: 8)
        field += 8
      }
      if offset == 0xFFFF_FFFF { offset = try bytes.integer(at: field, width: 8) }
    }
    return Member(
      name: String(decoding: bytes[start + 46..<nameEnd], as: UTF8.self),
      flags: try bytes.integer(at: start + 8, width: 2),
      method: try bytes.integer(at: start + 10, width: 2),
      checksum: try bytes.integer(at: start + 16, width: 4),
      compressed: compressed, uncompressed: uncompressed, offset: offset)
  }

  fileprivate static func malformed() -> HalfstepError {
    HalfstepError(.malformedFile, "the archive is damaged")
  }
}

extension UnsafeRawBufferPointer {
  /// The little-endian number at an offset.
  fileprivate func integer(at offset: Int, width: Int) throws(HalfstepError) -> Int {
    guard offset >= 0, offset <= count - width else { throw ZipArchive.malformed() }
    var value: UInt64 = 0
    for index in 0..<width { value |= UInt64(self[offset + index]) << UInt64(8 * index) }
    // Bounding every number by 2^62 keeps sums of a few of them from overflowing.
    guard value < 1 << 62 else { throw ZipArchive.malformed() }
    return Int(value)
  }
}
