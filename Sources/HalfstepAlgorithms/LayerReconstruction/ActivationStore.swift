// SPDX-License-Identifier: Apache-2.0
// Tensors in memory up to a limit, and in a temporary file beyond it.

import HalfstepNumerics

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// Holds tensors in memory up to a limit and in an unnamed temporary file beyond it.
///
/// The file lies in `TMPDIR` (or `/tmp`), has no name, and is gone when the store is. Not safe for
/// concurrent use.
package final class ActivationStore {
  /// A tensor in the store.
  package struct Slot: Hashable, Sendable {
    fileprivate let id: Int
  }

  private enum Place {
    case memory(Tensor)
    case file(offset: Int, DataType, Shape)
  }

  private let maximumBytes: Int
  private var places: [Int: Place] = [:]
  private var nextID = 0
  private var descriptor: Int32 = -1
  private var fileEnd = 0
  /// Ranges of the file that nothing uses, by offset, neighbors joined.
  private var gaps: [(offset: Int, count: Int)] = []

  /// Bytes of tensors in memory.
  package private(set) var bytesInMemory = 0
  /// Bytes of the temporary file.
  package var bytesInFile: Int { fileEnd }

  /// - Parameter maximumBytes: Bytes of tensors that may be in memory, 0 or more.
  package init(maximumBytes: Int) { self.maximumBytes = max(maximumBytes, 0) }

  deinit { if descriptor >= 0 { close(descriptor) } }

  /// Keeps a tensor.
  ///
  /// - Throws: `HalfstepError.fileAccess` if the temporary file cannot be made or written.
  package func put(_ tensor: Tensor) throws(HalfstepError) -> Slot {
    let id = nextID
    nextID += 1
    if bytesInMemory + tensor.byteCount <= maximumBytes {
      bytesInMemory += tensor.byteCount
      places[id] = .memory(tensor)
      return Slot(id: id)
    }
    let offset = take(tensor.byteCount)
    defer { withExtendedLifetime(tensor) {} }
    try openFile()
    var done = 0
    while done < tensor.byteCount {
      let count = pwrite(
        descriptor, tensor.storage.baseAddress + done, tensor.byteCount - done,
        off_t(offset + done))
      if count < 0 && errno == EINTR { continue }
      guard count > 0 else { throw Self.failure("writing") }
      done += count
    }
    places[id] = .file(offset: offset, tensor.dataType, tensor.shape)
    return Slot(id: id)
  }

  /// The tensor of a slot.
  ///
  /// - Throws: `HalfstepError.fileAccess` if it cannot be read back; `.outOfMemory`.
  package func get(_ slot: Slot) throws(HalfstepError) -> Tensor {
    switch places[slot.id] {
    case .memory(let tensor)?: return tensor
    case .file(let offset, let dataType, let shape)?:
      let tensor = try Tensor(uninitialized: dataType, shape: shape)
      var done = 0
      while done < tensor.byteCount {
        let count = pread(
          descriptor, tensor.storage.baseAddress + done, tensor.byteCount - done,
          off_t(offset + done))
        if count < 0 && errno == EINTR { continue }
        guard count > 0 else { throw Self.failure("reading") }
        done += count
      }
      return tensor
    case nil: throw HalfstepError(.internalError, "activation store: the slot is empty")
    }
  }

  /// Lets go of a tensor.
  package func remove(_ slot: Slot) {
    switch places.removeValue(forKey: slot.id) {
    case .memory(let tensor)?: bytesInMemory -= tensor.byteCount
    case .file(let offset, let dataType, let shape)?:
      give(offset, Tensor.byteCount(of: dataType, count: shape.elementCount))
    case nil: break
    }
  }

  // MARK: File

  private func openFile() throws(HalfstepError) {
    if descriptor >= 0 { return }
    let folder = getenv("TMPDIR").map { String(cString: $0) } ?? "/tmp"
    var path = Array("\(folder)/halfstep-XXXXXX".utf8CString)
    descriptor = mkstemp(&path)
    guard descriptor >= 0 else { throw Self.failure("creating in '\(folder)'") }
    unlink(path)
  }

  private static func failure(_ action: String) -> HalfstepError {
    HalfstepError(
      .fileAccess, "temporary file for activations: \(action): \(String(cString: strerror(errno)))")
  }

  /// The first gap that is large enough, or room at the end.
  private func take(_ count: Int) -> Int {
    if let index = gaps.firstIndex(where: { $0.count >= count }) {
      let offset = gaps[index].offset
      if gaps[index].count == count {
        gaps.remove(at: index)
      } else {
        gaps[index] = (offset + count, gaps[index].count - count)
      }
      return offset
    }
    defer { fileEnd += count }
    return fileEnd
  }

  private func give(_ offset: Int, _ count: Int) {
    let index = gaps.firstIndex { $0.offset > offset } ?? gaps.count
    gaps.insert((offset, count), at: index)
    if index + 1 < gaps.count, offset + count == gaps[index + 1].offset {
      gaps[index].count += gaps.remove(at: index + 1).count
    }
    if index > 0, gaps[index - 1].offset + gaps[index - 1].count == offset {
      gaps[index - 1].count += gaps.remove(at: index).count
    }
  }
}
