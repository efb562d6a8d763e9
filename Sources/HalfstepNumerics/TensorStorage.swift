// SPDX-License-Identifier: Apache-2.0
// Reference-counted bytes behind a tensor: ours, or memory that a caller owns.

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// A block of memory shared by tensors: allocated here, or borrowed with a release action.
public final class TensorStorage: @unchecked Sendable {
  // Unchecked: bytes change only through `Tensor`'s copy-on-write, which needs a unique reference.

  /// First byte; 64-byte aligned if allocated here.
  public let baseAddress: UnsafeMutableRawPointer
  /// Bytes that may be read.
  public let byteCount: Int
  /// Whether a caller owns the memory.
  public let isBorrowed: Bool
  /// Whether the bytes may change: always if allocated here, else if the caller allows it.
  public let isWritable: Bool
  private let release: (@Sendable () -> Void)?

  /// Allocates `byteCount` bytes of unspecified content.
  ///
  /// - Throws: `HalfstepError.outOfMemory` if the system refuses.
  public init(byteCount: Int) throws(HalfstepError) {
    var pointer: UnsafeMutableRawPointer?
    let (padded, overflow) = max(byteCount, 1).addingReportingOverflow(63)
    guard byteCount >= 0, !overflow, posix_memalign(&pointer, 64, padded & ~63) == 0,
      let pointer
    else { throw HalfstepError(.outOfMemory, "cannot allocate \(byteCount) bytes") }
    self.baseAddress = pointer
    self.byteCount = byteCount
    self.isBorrowed = false
    self.isWritable = true
    self.release = nil
  }

  /// Wraps memory owned by somebody else.
  ///
  /// - Parameters:
  ///   - address: First byte; stays valid until `release` is called.
  ///   - byteCount: Bytes that may be read.
  ///   - isWritable: Whether a tensor that alone refers to this memory may change it; false by default.
  ///   - release: Called once, when the last tensor over this memory is gone.
  public init(
    borrowing address: UnsafeRawPointer, byteCount: Int, isWritable: Bool = false,
    release: @escaping @Sendable () -> Void
  ) {
    self.baseAddress = UnsafeMutableRawPointer(mutating: address)
    self.byteCount = byteCount
    self.isBorrowed = true
    self.isWritable = isWritable
    self.release = release
  }

  deinit {
    if isBorrowed { release?() } else { free(baseAddress) }
  }
}
