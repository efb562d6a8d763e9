// SPDX-License-Identifier: Apache-2.0
// The bytes of a file in memory, which can be given back piece by piece.

import HalfstepNumerics
import HalfstepRuntime

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
  /// - Parameter limit: Largest number of bytes that is read.
  /// - Throws: `HalfstepError.fileAccess` naming the path, also for a file beyond the limit, or
  ///   2 GiB from a pipe or a device, which may never end; `.outOfMemory`, also for a file beyond
  ///   three quarters of the machine's memory.
  init(path: String, limit: Int = .max) throws(HalfstepError) {
    let descriptor = try openForReading(path)
    defer { close(descriptor) }
    var status = stat()
    guard fstat(descriptor, &status) == 0 else {
      throw HalfstepError(.fileAccess, "cannot read '\(path)': \(systemErrorText())")
    }
    guard status.st_mode & S_IFMT != S_IFDIR else {
      throw HalfstepError(.fileAccess, "cannot read '\(path)': it is a folder")
    }
    let size = Int(status.st_size)
    guard size < limit else {
      throw HalfstepError(.fileAccess, "cannot read '\(path)': \(size) bytes are too many")
    }
    guard size < SystemMemory.limit else {
      throw HalfstepError(
        .outOfMemory,
        "cannot read '\(path)': \(size) bytes exceed three quarters of the memory")
    }
    // Pipes and the like have no size; the buffer doubles for them.
    let isOrdinary = status.st_mode & S_IFMT == S_IFREG
    let most = min(limit, isOrdinary ? SystemMemory.limit : Self.streamLimit)
    var capacity = max(size + 1, 1 << 16)
    var start = try Self.map(capacity, path)
    var count = 0
    while true {
      if count == capacity {
        let doubled = min(capacity * 2, most)
        do throws(HalfstepError) {
          guard doubled > capacity else {
            throw HalfstepError(.fileAccess, "cannot read '\(path)': it does not end")
          }
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

  /// Bytes that are read from what has no size.
  private static let streamLimit = 1 << 31

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
