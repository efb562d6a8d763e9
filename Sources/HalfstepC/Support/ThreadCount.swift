// SPDX-License-Identifier: Apache-2.0
// The number of threads that calls of this library use.

import HalfstepNumerics
import Synchronization

/// The process-wide number of threads. OpenMP keeps its setting per thread, so every call applies
/// ours and gives the caller's own back.
enum ThreadCount {
  /// 0 leaves OpenMP's default.
  private static let requested = Atomic<Int>(0)

  static func set(_ count: Int) { requested.store(count, ordering: .relaxed) }

  static var current: Int {
    let count = requested.load(ordering: .relaxed)
    return count > 0 ? count : Parallel.maximumThreads
  }

  /// Applies the setting to this thread; the result goes to `restore`.
  static func apply() -> Int {
    let count = requested.load(ordering: .relaxed)
    guard count > 0 else { return 0 }
    let previous = Parallel.maximumThreads
    Parallel.setMaximumThreads(count)
    return previous
  }

  static func restore(_ previous: Int) {
    if previous > 0 { Parallel.setMaximumThreads(previous) }
  }
}
