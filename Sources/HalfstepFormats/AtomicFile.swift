// SPDX-License-Identifier: Apache-2.0
// Writes files whole or not at all.

import HalfstepNumerics

/// Reads files, and writes them whole or not at all.
package enum AtomicFile {
  /// Writes aside in the same folder, then renames.
  package static func write(
    _ bytes: UnsafeRawBufferPointer, to path: String
  ) throws(HalfstepError) {
    throw HalfstepError(.internalError, "under construction")
  }
  package static func read(_ path: String) throws(HalfstepError) -> [UInt8] {
    throw HalfstepError(.internalError, "under construction")
  }
}
