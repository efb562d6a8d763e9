// SPDX-License-Identifier: Apache-2.0
// Reads and writes AIMET's encodings JSON.

import HalfstepGraph
import HalfstepNumerics

/// Reads and writes AIMET's encodings JSON.
package enum EncodingsFile {
  /// Versions of the format.
  package enum Version: String, Sendable, CaseIterable {
    case v0_6_1 = "0.6.1"
    case v1_0_0 = "1.0.0"
    case v2_0_0 = "2.0.0"
  }
  package static func serialize(
    _ table: EncodingTable, version: Version
  ) throws(HalfstepError) -> [UInt8] {
    throw HalfstepError(.internalError, "under construction")
  }
  /// Reads any version; the version is found in the file.
  package static func parse(_ bytes: [UInt8]) throws(HalfstepError) -> EncodingTable {
    throw HalfstepError(.internalError, "under construction")
  }
}
