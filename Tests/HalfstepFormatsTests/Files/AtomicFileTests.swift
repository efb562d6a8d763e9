// SPDX-License-Identifier: Apache-2.0
// Files appear whole or not at all.

import Foundation
import HalfstepFormats
import Testing

@Suite struct AtomicFileTests {
  @Test func writtenBytesAreRead() throws {
    try withTemporaryFolder { folder in
      let bytes = (0..<100_000).map { UInt8(truncatingIfNeeded: $0 * 7) }
      try AtomicFile.write(bytes, to: "\(folder)/a")
      try AtomicFile.write([1, 2, 3], to: "\(folder)/b")
      #expect(try AtomicFile.read("\(folder)/a") == bytes)
      try AtomicFile.write([], to: "\(folder)/a")
      #expect(try AtomicFile.read("\(folder)/a") == [])
      #expect(try FileManager.default.contentsOfDirectory(atPath: folder).sorted() == ["a", "b"])
    }
  }

  @Test func linkKeepsPointing() throws {
    try withTemporaryFolder { folder in
      try AtomicFile.write([1], to: "\(folder)/target")
      try FileManager.default.createSymbolicLink(
        atPath: "\(folder)/link", withDestinationPath: "target")
      try AtomicFile.write([2], to: "\(folder)/link")
      #expect(try AtomicFile.read("\(folder)/target") == [2])
      #expect(
        try FileManager.default.destinationOfSymbolicLink(atPath: "\(folder)/link") == "target")
    }
  }

  @Test func failuresNameThePathAndLeaveNothing() throws {
    try withTemporaryFolder { folder in
      expectFailure(.fileAccess, "\(folder)/no/a") {
        try AtomicFile.write([1], to: "\(folder)/no/a")
      }
      expectFailure(.fileAccess, folder, "ordinary file") { try AtomicFile.write([1], to: folder) }
      expectFailure(.fileAccess, "/dev/null", "ordinary file") {
        try AtomicFile.write([1], to: "/dev/null")
      }
      expectFailure(.fileAccess) { try AtomicFile.write([1], to: "") }
      expectFailure(.fileAccess, "\(folder)/a") { _ = try AtomicFile.read("\(folder)/a") }
      let left = try FileManager.default.contentsOfDirectory(atPath: folder)
      #expect(left.isEmpty)
    }
  }
}
