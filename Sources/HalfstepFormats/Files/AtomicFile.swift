// SPDX-License-Identifier: Apache-2.0
// Reads files, and writes them whole or not at all.

import HalfstepNumerics

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// Reads files, and writes them whole or not at all.
package enum AtomicFile {
  /// Files beyond this many bytes are refused by `read`, which keeps them in one array.
  package static let readLimit: Int = 1 << 31

  /// Writes an array of bytes aside in the same folder, then renames.
  ///
  /// - Throws: `HalfstepError.fileAccess` naming the path; nothing is left behind then.
  package static func write(_ bytes: [UInt8], to path: String) throws(HalfstepError) {
    var file = try FileWriter(path: path)
    try file.append(bytes)
    try file.commit()
  }

  /// Reads a whole file.
  ///
  /// - Throws: `HalfstepError.fileAccess` naming the path if it cannot be read or has 2 GiB or more.
  package static func read(_ path: String) throws(HalfstepError) -> [UInt8] {
    let buffer = try FileBuffer(path: path, limit: readLimit)
    return Array(buffer.bytes)
  }
}

/// The words for the C library's current error number.
func systemErrorText(_ number: Int32 = errno) -> String {
  guard let text = strerror(number) else { return "error \(number)" }
  return String(cString: text)
}

/// A file that takes its name only when it is complete.
package struct FileWriter: ~Copyable {
  private let path: String
  private let target: String
  private let temporary: String
  private var descriptor: Int32
  /// Bytes appended so far.
  private(set) var count = 0

  /// Creates the file aside, in the folder of `path`.
  ///
  /// - Throws: `HalfstepError.fileAccess` naming the path.
  package init(path: String) throws(HalfstepError) {
    guard !path.isEmpty, !path.utf8.contains(0) else {
      throw HalfstepError(.fileAccess, "cannot write '\(path)': not a file name")
    }
    // A symbolic link keeps pointing where it does; what it points to is replaced.
    var target = path
    if let resolved = realpath(path, nil) {
      target = String(cString: resolved)
      free(resolved)
      var status = stat()
      if stat(target, &status) == 0, status.st_mode & S_IFMT != S_IFREG {
        throw HalfstepError(.fileAccess, "cannot write '\(path)': not an ordinary file")
      }
    }
    var attempt = 0
    while true {
      let temporary = "\(target).\(getpid())-\(attempt).tmp"
      let descriptor = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o666)
      if descriptor >= 0 {
        self.path = path
        self.target = target
        self.temporary = temporary
        self.descriptor = descriptor
        return
      }
      let number = errno
      attempt += 1
      guard number == EINTR || number == EEXIST, attempt < 1000 else {
        throw HalfstepError(.fileAccess, "cannot write '\(path)': \(systemErrorText(number))")
      }
    }
  }

  /// Appends bytes.
  ///
  /// - Throws: `HalfstepError.fileAccess` naming the path.
  mutating func append(_ bytes: UnsafeRawBufferPointer) throws(HalfstepError) {
    var done = 0
    while done < bytes.count {
      // One call moves at most 2^31 bytes on Linux.
      let part = min(bytes.count - done, 1 << 30)
      let moved = write(descriptor, bytes.baseAddress! + done, part)
      if moved < 0 {
        if errno == EINTR { continue }
        throw failure()
      }
      done += moved
      count += moved
    }
  }

  /// Appends an array of bytes.
  ///
  /// - Throws: `HalfstepError.fileAccess` naming the path.
  package mutating func append(_ bytes: [UInt8]) throws(HalfstepError) {
    var offset = 0
    // Typed throws do not pass through the closure of an array, hence the result.
    let result: Result<Void, HalfstepError> = bytes.withUnsafeBytes { all in
      do throws(HalfstepError) {
        try append(all)
        offset += all.count
        return .success(())
      } catch {
        return .failure(error)
      }
    }
    try result.get()
  }

  /// Gives the file its name.
  ///
  /// - Throws: `HalfstepError.fileAccess` naming the path.
  package mutating func commit() throws(HalfstepError) {
    let closed = close(descriptor)
    descriptor = -1
    guard closed == 0, rename(temporary, target) == 0 else {
      let error = failure()
      unlink(temporary)
      throw error
    }
  }

  private func failure() -> HalfstepError {
    HalfstepError(.fileAccess, "cannot write '\(path)': \(systemErrorText())")
  }

  deinit {
    if descriptor >= 0 {
      close(descriptor)
      unlink(temporary)
    }
  }
}
