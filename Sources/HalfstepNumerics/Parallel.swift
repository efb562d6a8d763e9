// SPDX-License-Identifier: Apache-2.0
// Parallel loops on the OpenMP threads that oneDNN uses, so that the two never compete for cores.

import COpenMP
import Synchronization

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// Parallel loops over index ranges.
package enum Parallel {
  /// Runs `body` over disjoint ranges that cover `0..<count`, one range per thread.
  ///
  /// The split depends on `count`, `grain` and the number of threads only. `body` must not throw or
  /// touch shared state without care; inside another parallel region it runs on the calling thread.
  ///
  /// - Parameters:
  ///   - count: Number of indices.
  ///   - grain: Least number of indices that is worth a thread.
  ///   - body: Receives a thread's index, below `threadCount`, and its range.
  package static func forEachRange(
    _ count: Int, grain: Int, _ body: (_ thread: Int, _ range: Range<Int>) -> Void
  ) {
    guard count > 0 else { return }
    let threads = threadCount(for: count, grain: grain)
    if threads == 1 {
      body(0, 0..<count)
      return
    }
    prepareForForks()
    withoutActuallyEscaping(body) { body in
      var job = Job(count: count, parts: threads, body: body)
      withUnsafeMutablePointer(to: &job) { pointer in
        GOMP_parallel(
          { argument in
            let job = argument!.assumingMemoryBound(to: Job.self).pointee
            // The runtime may give fewer threads than asked for: each takes every n-th part.
            let team = Int(omp_get_num_threads())
            for part in stride(from: Int(omp_get_thread_num()), to: job.parts, by: team) {
              let lower = job.count * part / job.parts
              let upper = job.count * (part + 1) / job.parts
              job.body(part, lower..<upper)
            }
          }, pointer, UInt32(threads), 0)
      }
    }
  }

  /// Runs `body` for every index below `count`, each on whichever thread is free, in their order.
  ///
  /// For few indices of unequal work. `body` is as that of `forEachRange`; its thread 0 is the one that
  /// called.
  package static func forEach(_ count: Int, _ body: (_ thread: Int, _ index: Int) -> Void) {
    let next = Atomic(0)
    forEachRange(threadCount(for: count, grain: 1), grain: 1) { thread, _ in
      while true {
        let index = next.wrappingAdd(1, ordering: .relaxed).oldValue
        if index >= count { break }
        body(thread, index)
      }
    }
  }

  /// How many parts `forEachRange` will make.
  package static func threadCount(for count: Int, grain: Int) -> Int {
    if omp_in_parallel() != 0 { return 1 }
    let worthwhile = max(1, count / max(grain, 1))
    return min(Int(omp_get_max_threads()), worthwhile)
  }

  /// Threads that loops and oneDNN use at most.
  package static var maximumThreads: Int { Int(omp_get_max_threads()) }

  /// Sets how many threads loops and oneDNN use at most when this thread starts them.
  ///
  /// - Parameter count: 1 or more; larger values than `Int32` holds are cut.
  package static func setMaximumThreads(_ count: Int) {
    omp_set_num_threads(Int32(clamping: max(count, 1)))
  }

  /// Makes sure that a child of `fork` can use threads; called before the first ones start.
  ///
  /// A child has no threads but the one that forked, while its copy of OpenMP's state says that they
  /// wait for work: its first parallel loop would never end. So the forking thread lets go of its
  /// threads before it forks; parent and child start new ones when they need them.
  package static func prepareForForks() { _ = forkHandler }

  private static let forkHandler: Int32 = pthread_atfork(
    {
      // The pause forgets what the thread had been told.
      let threads = omp_get_max_threads()
      if omp_pause_resource_all(2) == 0 { omp_set_num_threads(threads) }
    }, nil, nil)

  private struct Job {
    let count: Int
    let parts: Int
    let body: (Int, Range<Int>) -> Void
  }
}
