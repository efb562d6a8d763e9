// SPDX-License-Identifier: Apache-2.0
// Reads and writes AIMET's encodings JSON.

import HalfstepGraph
import HalfstepNumerics
import OrderedCollections

/// Reads and writes AIMET's encodings JSON.
///
/// What a version of the format cannot say is filled in by a rule:
/// - 0.6.1 and 1.0.0 do not record the axis: per-channel entries get axis 0, per-block entries channel
///   axis 0 and block axis 1. They also write codes as unsigned: signed asymmetric grids come back
///   as the unsigned grid of the same numbers.
/// - 2.0.0 does not tell activations from constants: entries with an axis and 32-bit entries count as
///   constants, all others as activations. It does not record symmetry: signed grids whose zero points
///   are 0 count as symmetric. It has no strict grids; they become plain signed ones.
///
/// `EncodingTable.adapt(to:)` settles axes and kinds once the graph is known.
package enum EncodingsFile {
  /// Versions of the format.
  package enum Version: String, Sendable, CaseIterable {
    case v0_6_1 = "0.6.1"
    case v1_0_0 = "1.0.0"
    case v2_0_0 = "2.0.0"
  }

  /// The bytes of an encodings file; equal tables give equal bytes.
  ///
  /// - Parameter graph: Gives version 2.0.0 the shapes of constants with per-block entries; not needed
  ///   without those.
  /// - Throws: `HalfstepError.unsupportedVersion` for per-block entries in version 0.6.1,
  ///   `.invalidArgument` for per-block entries in version 2.0.0 without a graph.
  package static func serialize(
    _ table: EncodingTable, version: Version, graph: Graph? = nil
  ) throws(HalfstepError) -> [UInt8] {
    let root =
      switch version {
      case .v0_6_1: try EncodingsWriter.legacy(table)
      case .v1_0_0: EncodingsWriter.listed(table)
      case .v2_0_0: try EncodingsWriter.operatorStyle(table, graph)
      }
    var writer = JSONWriter()
    writer.append(root)
    return writer.bytes
  }

  /// Reads any version, 0.4 to 2.1; the version is found in the file.
  ///
  /// - Throws: `HalfstepError.malformedFile` with the path of the key, `.unsupportedVersion`.
  package static func parse(_ bytes: [UInt8]) throws(HalfstepError) -> EncodingTable {
    let code = HalfstepError.Code.malformedFile
    let root = JSONCursor(root: try JSONValue(parsing: bytes, code), code)
    var reader = EncodingsReader()
    try reader.read(root)
    return reader.table
  }
}
