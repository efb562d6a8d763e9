// SPDX-License-Identifier: Apache-2.0
// Output: results, notes, a progress bar, and Ctrl-C.

import ArgumentParser
import Synchronization

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// What the tool says. Results go to standard output; the rest to standard error.
enum Terminal {
  private static let isInteractive: Bool = isatty(STDERR_FILENO) == 1

  /// Writes all of a text, also in the face of signals and slow pipes.
  static func write(_ text: String, to descriptor: Int32) {
    var text = text
    text.withUTF8 { bytes in
      var rest = UnsafeRawBufferPointer(bytes)
      while let start = rest.baseAddress, !rest.isEmpty {
        #if canImport(Glibc)
          let written = Glibc.write(descriptor, start, rest.count)
        #else
          let written = Darwin.write(descriptor, start, rest.count)
        #endif
        if written < 0 && errno == EINTR { continue }
        if written <= 0 { return }
        rest = UnsafeRawBufferPointer(rebasing: rest[written...])
      }
    }
  }

  /// Prints a line that a script may read.
  static func result(_ line: String) { write(line + "\n", to: STDOUT_FILENO) }

  /// Prints a line for people.
  static func note(_ line: String) {
    clearLine()
    write(line + "\n", to: STDERR_FILENO)
  }

  /// Draws a bar over the current line of a terminal.
  static func bar(_ what: String, _ completed: Int, of total: Int, _ rest: String = "") {
    guard isInteractive, total > 0 else { return }
    let width = 30
    let filled = completed * width / total
    let bar = String(repeating: "=", count: filled) + String(repeating: " ", count: width - filled)
    write("\r\(what) [\(bar)] \(completed)/\(total)\(rest)\u{1B}[K", to: STDERR_FILENO)
    if completed == total { clearLine() }
  }

  /// Removes a bar.
  static func clearLine() {
    if isInteractive { write("\r\u{1B}[K", to: STDERR_FILENO) }
  }
}

/// Ctrl-C as a request: the first ends the work at the next batch, the second ends the process.
enum Interruption {
  private static let requested = Atomic<Bool>(false)

  /// Begins to listen.
  static func listen() {
    requested.store(false, ordering: .relaxed)
    signal(SIGINT) { _ in
      Interruption.requested.store(true, ordering: .relaxed)
      signal(SIGINT, SIG_DFL)
    }
  }

  /// Whether Ctrl-C was pressed.
  static var isRequested: Bool { requested.load(ordering: .relaxed) }

  /// - Throws: Exit code 130 if Ctrl-C was pressed.
  static func check() throws {
    if isRequested { throw fail(ExitCode(130), "cancelled") }
  }
}
