// SPDX-License-Identifier: Apache-2.0
// Rows that a layer is reconstructed on, in memory or in a temporary file.

import HalfstepNumerics

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// How the numbers of a layer are arranged for reconstruction.
package struct RowLayout: Hashable, Sendable {
  package let groups: Int
  package let outputsPerGroup: Int
  /// Length of a group's row.
  package let columns: Int

  package init(groups: Int, outputsPerGroup: Int, columns: Int) {
    self.groups = groups
    self.outputsPerGroup = outputsPerGroup
    self.columns = columns
  }

  /// Output channels.
  package var outputs: Int { groups * outputsPerGroup }
  /// Whether channels are vector lanes, as in depthwise layers, instead of matrices.
  package var isDepthwise: Bool { groups > 1 && outputsPerGroup == 1 }
  /// Output channels up to whole vectors of 16.
  package var outputStride: Int { (outputs + 15) / 16 * 16 }
  /// Floats that a row of inputs takes.
  package var inputStride: Int {
    isDepthwise ? columns * outputStride : (groups * columns + 15) / 16 * 16
  }
  /// Elements of the weights in the solver's order, padding of depthwise layers included.
  package var weightCount: Int { isDepthwise ? columns * outputStride : outputs * columns }

  /// Where a weight lies in the solver's order.
  ///
  /// - Parameters:
  ///   - output: Output channel over all groups.
  ///   - column: Position in the group's row.
  @inline(__always) package func weightIndex(output: Int, column: Int) -> Int {
    isDepthwise ? column * outputStride + output : output * columns + column
  }

  /// Where an input lies in a row.
  @inline(__always) package func inputIndex(group: Int, column: Int) -> Int {
    isDepthwise ? column * outputStride + group : group * columns + column
  }
}

/// Rows of a layer's inputs with the outputs that are wanted for them, in a random order.
///
/// Rows lie in memory up to a limit; otherwise all are in a nameless temporary file in `TMPDIR` (or
/// `/tmp`) that is gone when this object is. Not safe for concurrent use.
package final class ReconstructionRows {
  package let layout: RowLayout
  /// Rows that have been added.
  package private(set) var count = 0
  private let capacity: Int
  /// Where the rows go, in the order in which they come.
  private let order: [Int32]
  private let memory: TensorStorage?
  private let descriptor: Int32
  /// What was read last from the file.
  private var window: TensorStorage?

  /// Floats from one row to the next.
  package var stride: Int { layout.inputStride + layout.outputStride }
  /// Whether the rows are in a file.
  package var isSpilled: Bool { memory == nil }

  /// Makes room for rows.
  ///
  /// - Parameters:
  ///   - capacity: Rows that will be added at most.
  ///   - maximumBytes: Bytes that they may take in memory.
  ///   - seed: Decides their order.
  /// - Throws: `HalfstepError.outOfMemory`, `.fileAccess`.
  package init(
    _ layout: RowLayout, capacity: Int, maximumBytes: Int, seed: UInt64
  ) throws(HalfstepError) {
    self.layout = layout
    guard capacity >= 0, capacity < 1 << 28 else {
      throw HalfstepError(.invalidArgument, "reconstruction: \(capacity) rows are too many")
    }
    self.capacity = capacity
    var order = (0..<Int32(capacity)).map { $0 }
    var random = RowGenerator(seed: seed, 1)
    for index in order.indices.reversed().dropLast() {
      order.swapAt(index, Int(random.next() % UInt64(index + 1)))
    }
    self.order = order
    let floats = capacity * (layout.inputStride + layout.outputStride)
    if floats <= maximumBytes / MemoryLayout<Float>.stride {
      memory = try TensorStorage(byteCount: floats * MemoryLayout<Float>.stride)
      descriptor = -1
      return
    }
    memory = nil
    let folder = getenv("TMPDIR").map { String(cString: $0) } ?? "/tmp"
    var path = Array("\(folder)/halfstep-XXXXXX".utf8CString)
    descriptor = mkstemp(&path)
    guard descriptor >= 0 else { throw Self.failure("creating in '\(folder)'") }
    unlink(path)
  }

  deinit { if descriptor >= 0 { close(descriptor) } }

  /// Adds a row; rows beyond the capacity are left out.
  ///
  /// - Parameter row: `[inputStride]` inputs and `[outputStride]` wanted outputs behind the
  ///   activation function.
  /// - Throws: `HalfstepError.fileAccess` if the file cannot be written, such as on a full disk.
  package func append(_ row: UnsafePointer<Float>) throws(HalfstepError) {
    guard count < capacity else { return }
    let slot = Int(order[count])
    count += 1
    try write(row, slot)
  }

  /// Closes the gaps of rows that never came, so that rows `0..<count` can be read.
  ///
  /// - Throws: `HalfstepError.fileAccess`.
  package func finish() throws(HalfstepError) {
    guard count < capacity else { return }
    for (index, slot) in order[..<count].sorted().enumerated() where Int(slot) != index {
      try rows(Int(slot), 1) { (row) throws(HalfstepError) in try write(row, index) }
    }
  }

  /// Calls `body` with consecutive rows.
  ///
  /// - Parameters:
  ///   - start: The first row.
  ///   - count: How many; `start + count` is at most `self.count` after `finish`.
  /// - Throws: `HalfstepError.fileAccess` if the file cannot be read; `.outOfMemory`.
  package func rows<R>(
    _ start: Int, _ count: Int, _ body: (UnsafePointer<Float>) throws(HalfstepError) -> R
  ) throws(HalfstepError) -> R {
    guard start >= 0, count >= 0, start <= capacity, count <= capacity - start else {
      throw HalfstepError(.invalidArgument, "rows \(start) and on of \(capacity): \(count) asked")
    }
    if let memory {
      defer { withExtendedLifetime(memory) {} }
      return try body(floats(memory) + start * stride)
    }
    let bytes = count * stride * MemoryLayout<Float>.stride
    let window: TensorStorage
    if let old = self.window, old.byteCount >= bytes {
      window = old
    } else {
      window = try TensorStorage(byteCount: bytes)
      self.window = window
    }
    let offset = start * stride * MemoryLayout<Float>.stride
    var done = 0
    while done < bytes {
      let part = pread(descriptor, window.baseAddress + done, bytes - done, off_t(offset + done))
      if part < 0 && errno == EINTR { continue }
      guard part > 0 else { throw Self.failure("reading") }
      done += part
    }
    defer { withExtendedLifetime(window) {} }
    return try body(floats(window))
  }

  private func floats(_ storage: TensorStorage) -> UnsafePointer<Float> {
    UnsafePointer(storage.baseAddress.assumingMemoryBound(to: Float.self))
  }

  private func write(_ row: UnsafePointer<Float>, _ slot: Int) throws(HalfstepError) {
    let bytes = stride * MemoryLayout<Float>.stride
    if let memory {
      (memory.baseAddress + slot * bytes).copyMemory(from: row, byteCount: bytes)
      return
    }
    var done = 0
    while done < bytes {
      let part = pwrite(
        descriptor, UnsafeRawPointer(row) + done, bytes - done, off_t(slot * bytes + done))
      if part < 0 && errno == EINTR { continue }
      guard part > 0 else { throw Self.failure("writing") }
      done += part
    }
  }

  private static func failure(_ action: String) -> HalfstepError {
    HalfstepError(
      .fileAccess, "temporary file for rows: \(action): \(String(cString: strerror(errno)))")
  }
}
