// SPDX-License-Identifier: Apache-2.0
// The bytes of a file in memory, which can be given back piece by piece.

import HalfstepNumerics

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// The bytes of a whole file; pages already used can be given back before the rest.
///
/// The file is read, not mapped: a mapped file that somebody truncates ends the process.
final class FileBuffer: @unchecked Sendable {
  // Unchecked: the pointers never change, and only the one reader calls `discard`.

  /// The content.
  let bytes: UnsafeRawBufferPointer
  private let mapping: UnsafeMutableRawPointer
  private let mappedCount: Int

  /// Reads a file.
  ///
  /// - Throws: `HalfstepError.fileAccess` naming the path; `.outOfMemory`.
  init(path: String) throws(HalfstepError) {
    let descriptor = try openForReading(path)
    defer { close(descriptor) }
    var status = stat()
    guard fstat(descriptor, &status) == 0 else {
      throw HalfstepError(.fileAccess, "cannot read '\(path)': \(systemErrorText())")
    }
    guard status.st_mode & S_IFMT != S_IFDIR else {
      throw HalfstepError(.fileAccess, "cannot read '\(path)': it is a folder")
    }
    // Pipes and the like have no size; the buffer doubles for them.
    var capacity = max(Int(status.st_size) + 1, 1 << 16)
    var start = try Self.map(capacity, path)
    var count = 0
    while true {
      if count == capacity {
        let (doubled, overflow) = capacity.multipliedReportingOverflow(by: 2)
        do throws(HalfstepError) {
          guard !overflow else { throw HalfstepError(.outOfMemory, "cannot read '\(path)'") }
          let larger = try Self.map(doubled, path)
          larger.copyMemory(from: start, byteCount: count)
          munmap(start, capacity)
          start = larger
          capacity = doubled
        } catch {
          munmap(start, capacity)
          throw error
        }
      }
      let moved = read(descriptor, start + count, min(capacity - count, 1 << 30))
      if moved < 0 {
        if errno == EINTR { continue }
        let text = systemErrorText()
        munmap(start, capacity)
        throw HalfstepError(.fileAccess, "cannot read '\(path)': \(text)")
      }
      if moved == 0 { break }
      count += moved
    }
    mapping = start
    mappedCount = capacity
    bytes = UnsafeRawBufferPointer(start: start, count: count)
  }

  private static func map(
    _ count: Int, _ path: String
  ) throws(HalfstepError) -> UnsafeMutableRawPointer {
    let start = mmap(nil, count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    guard let start, start != MAP_FAILED else {
      throw HalfstepError(.outOfMemory, "cannot read '\(path)': no memory for \(count) bytes")
    }
    return start
  }

  /// Gives the pages inside a range back to the system; their content is lost.
  func discard(_ range: Range<Int>) {
    let page = 4096
    let first = (range.lowerBound + page - 1) / page * page
    let last = range.upperBound / page * page
    if last > first { madvise(mapping + first, last - first, MADV_DONTNEED) }
  }

  deinit { munmap(mapping, mappedCount) }
}

/// Opens a file for reading; unless `waits`, a named pipe does not wait for its writer.
///
/// - Throws: `HalfstepError.fileAccess` naming the path.
func openForReading(_ path: String, waits: Bool = true) throws(HalfstepError) -> Int32 {
  guard !path.isEmpty, !path.utf8.contains(0) else {
    throw HalfstepError(.fileAccess, "cannot read '\(path)': not a file name")
  }
  while true {
    let descriptor = open(path, O_RDONLY | O_CLOEXEC | (waits ? 0 : O_NONBLOCK))
    if descriptor >= 0 { return descriptor }
    if errno != EINTR {
      throw HalfstepError(.fileAccess, "cannot read '\(path)': \(systemErrorText())")
    }
  }
}
