// SPDX-License-Identifier: Apache-2.0
// Reading and writing of NumPy's array files.

import Foundation
import HalfstepFormats
import HalfstepNumerics
import OrderedCollections
import Testing

@Suite struct NumPyFileTests {
  @Test(arguments: [[], [0], [3], [2, 3], [4, 1, 5], [2, 3, 4, 5]] as [[Int]])
  func savedArrayLoads(shape: [Int]) throws {
    try withTemporaryFolder { folder in
      let count = shape.reduce(1, *)
      let tensor = try Tensor((0..<count).map { Float($0) * 0.25 - 3 }, shape: shape)
      try NumPyFile.save(tensor, path: "\(folder)/a.npy")
      let loaded = try #require(NumPyFile.load(path: "\(folder)/a.npy")[""])
      #expect(isSame(loaded, tensor))
    }
  }

  @Test func headerIsNumPysOwn() throws {
    try withTemporaryFolder { folder in
      try NumPyFile.save(Tensor([1, 2, 3], shape: [3]), path: "\(folder)/a.npy")
      let bytes = try AtomicFile.read("\(folder)/a.npy")
      let text = "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }"
      #expect(Array(bytes[0..<10]) == [0x93] + Array("NUMPY".utf8) + [1, 0, 118, 0])
      #expect(
        String(decoding: bytes[10..<128], as: UTF8.self)
          == text.padding(toLength: 117, withPad: " ", startingAt: 0) + "\n")
      #expect(bytes.count == 128 + 12)
    }
  }

  // [[1, 2, 3], [4, 5, 6]] with the first index fastest is 1 4 2 5 3 6.
  @Test func columnMajorBecomesRowMajor() throws {
    let bytes = npy("{'descr': '|u1', 'fortran_order': True, 'shape': (2, 3)}", [1, 4, 2, 5, 3, 6])
    let tensor = try #require(try load(bytes)[""])
    #expect(tensor.dataType == .uint8)
    #expect(tensor.shape.dimensions == [2, 3])
    let values = try tensor.withElements(.uint8) { (v: UnsafeBufferPointer<UInt8>) in Array(v) }
    #expect(values == [1, 2, 3, 4, 5, 6])
  }

  @Test(arguments: [1, 2, 3])
  func bigEndianIsSwapped(version: UInt8) throws {
    let bytes = npy(
      "{'descr': '>i4', 'fortran_order': False, 'shape': (2,), }",
      [0, 0, 1, 2, 255, 255, 255, 254],
      version: version)
    #expect(try load(bytes)[""]?.integers() == [258, -2])
  }

  @Test(arguments: [
    ("f2", DataType.float16, 2), ("f4", .float32, 4), ("f8", .float64, 8), ("i1", .int8, 1),
    ("u1", .uint8, 1), ("i2", .int16, 2), ("u2", .uint16, 2), ("i4", .int32, 4),
    ("u4", .uint32, 4), ("i8", .int64, 8), ("u8", .uint64, 8), ("b1", .bool, 1),
  ])
  func elementTypes(code: String, type: DataType, width: Int) throws {
    let content = (0..<width * 2).map { UInt8($0) }
    let order = width == 1 ? "|" : "<"
    let tensor = try #require(
      try load(
        npy("{'descr': '\(order)\(code)', 'fortran_order': False, 'shape': (2,), }", content))[""])
    #expect(tensor.dataType == type)
    #expect(tensor.byteCount == width * 2)
  }

  @Test(arguments: [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '<U4', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }",
    "{'descr': '<f4', 'shape': (1,), }", "{'descr': '<f4'", "", "[]", "{'descr",
  ])
  func malformedHeaderIsRefused(text: String) {
    expectFailure(.malformedFile) { _ = try load(npy(text, [0, 0, 0, 0, 0, 0, 0, 0])) }
  }

  @Test func neitherKindIsRefused() {
    expectFailure(.malformedFile, "NPY nor") { _ = try load(Array("hello".utf8)) }
    expectFailure(.malformedFile, "NPY nor") { _ = try load([]) }
  }

  // MARK: Archives

  @Test(arguments: [0, 8])
  func archiveMembersLoadInOrder(method: Int) throws {
    let first = npy(
      "{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }", [1, 0, 0, 0, 2, 0, 0, 0])
    let second = npy("{'descr': '|b1', 'fortran_order': False, 'shape': (), }", [1])
    let archive = zip([("b", first), ("a", second)], isDeflated: method == 8)
    let arrays = try load(archive)
    #expect(Array(arrays.keys) == ["b", "a"])
    #expect(try arrays["b"]?.integers() == [1, 2])
    #expect(arrays["a"]?.dataType == .bool)
  }

  @Test func everyMutationOfAnArchiveIsRefusedOrRead() throws {
    let array = npy(
      "{'descr': '<i4', 'fortran_order': False, 'shape': (2,), }", [1, 0, 0, 0, 2, 0, 0, 0])
    for isDeflated in [false, true] {
      let archive = zip([("a", array)], isDeflated: isDeflated)
      for position in archive.indices {
        for value in [0, 0xFF, archive[position] ^ 1, archive[position] ^ 0x80] as [UInt8] {
          var changed = archive
          changed[position] = value
          try expectReadOrRefused(changed)
        }
        try expectReadOrRefused(Array(archive[..<position]))
      }
    }
  }

  @Test func checksumIsVerified() throws {
    let array = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1,), }", [42])
    var archive = zip([("a", array)], isDeflated: false)
    let position = try #require(archive.firstIndex(of: 42))
    archive[position] = 43
    expectFailure(.malformedFile, "array 'a'", "checksum") { _ = try load(archive) }
  }

  // MARK: Helpers

  private func expectReadOrRefused(_ bytes: [UInt8]) throws {
    do { _ = try load(bytes) } catch let error as HalfstepError {
      #expect(!error.message.isEmpty)
    }
  }

  private func load(_ bytes: [UInt8]) throws -> OrderedDictionary<String, Tensor> {
    var result: OrderedDictionary<String, Tensor> = [:]
    try withTemporaryFolder { folder in
      try AtomicFile.write(bytes, to: "\(folder)/f")
      result = try NumPyFile.load(path: "\(folder)/f")
    }
    return result
  }

  private func npy(_ header: String, _ content: [UInt8], version: UInt8 = 1) -> [UInt8] {
    let length = header.utf8.count
    var bytes: [UInt8] = [0x93] + Array("NUMPY".utf8) + [version, 0]
    bytes += [UInt8(length & 0xFF), UInt8(length >> 8)]
    if version > 1 { bytes += [0, 0] }
    return bytes + Array(header.utf8) + content
  }

  /// An archive; "deflated" members use stored blocks, the simplest valid stream.
  private func zip(_ members: [(String, [UInt8])], isDeflated: Bool) -> [UInt8] {
    func little(_ value: Int, _ width: Int) -> [UInt8] {
      (0..<width).map { UInt8(truncatingIfNeeded: value >> (8 * $0)) }
    }
    var body: [UInt8] = []
    var directory: [UInt8] = []
    for (name, content) in members {
      let data =
        isDeflated
        ? [1] + little(content.count, 2) + little(~content.count, 2) + content : content
      let file = Array("\(name).npy".utf8)
      let common =
        little(0, 2) + little(isDeflated ? 8 : 0, 2) + little(0, 4) + little(crc32(content), 4)
        + little(data.count, 4) + little(content.count, 4) + little(file.count, 2)
      directory +=
        little(0x0201_4B50, 4) + little(20, 2) + little(20, 2) + common + little(0, 2)
        + little(0, 2) + little(0, 2) + little(0, 2) + little(0, 4) + little(body.count, 4) + file
      body += little(0x0403_4B50, 4) + little(20, 2) + common + little(0, 2) + file + data
    }
    let end =
      little(0x0605_4B50, 4) + little(0, 4) + little(members.count, 2) + little(members.count, 2)
      + little(directory.count, 4) + little(body.count, 4) + little(0, 2)
    return body + directory + end
  }

  private func crc32(_ bytes: [UInt8]) -> Int {
    var sum: UInt32 = 0xFFFF_FFFF
    for byte in bytes {
      sum ^= UInt32(byte)
      for _ in 0..<8 { sum = sum & 1 == 1 ? sum >> 1 ^ 0xEDB8_8320 : sum >> 1 }
    }
    return Int(~sum)
  }
}
