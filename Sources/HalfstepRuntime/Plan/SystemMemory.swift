// SPDX-License-Identifier: Apache-2.0
// How much memory intermediate tensors may take.

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// How much memory intermediate tensors may take.
package enum SystemMemory {
  /// Three quarters of the machine's memory, at most 64 GiB: plans beyond it are refused before
  /// anything is allocated.
  package static let limit: Int = {
    let ceiling = 64 << 30
    let pages = sysconf(Int32(_SC_PHYS_PAGES))
    let pageSize = sysconf(Int32(_SC_PAGESIZE))
    guard pages > 0, pageSize > 0 else { return ceiling }
    let (bytes, overflow) = pages.multipliedReportingOverflow(by: pageSize)
    return overflow ? ceiling : min(bytes / 4 * 3, ceiling)
  }()
}
