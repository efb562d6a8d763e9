// SPDX-License-Identifier: Apache-2.0
// Reads and writes ONNX models.

import HalfstepGraph
import HalfstepNumerics

/// Reads and writes ONNX models.
package enum ONNXFile {
  /// Reads a model from a file, and its external data from the file's folder.
  package static func load(path: String) throws(HalfstepError) -> Graph {
    throw HalfstepError(.internalError, "under construction")
  }
  /// Reads a model from memory; `folder` is where external data may lie, nil refuses it.
  package static func load(
    bytes: UnsafeRawBufferPointer, folder: String? = nil
  ) throws(HalfstepError) -> Graph {
    throw HalfstepError(.internalError, "under construction")
  }
  /// Writes a model; beyond 2 GB of weights, or if asked, they go to `<path>.data`.
  package static func save(
    _ graph: Graph, path: String, externalData: Bool = false
  ) throws(HalfstepError) {
    throw HalfstepError(.internalError, "under construction")
  }
  /// The bytes of a model file with weights inline.
  package static func serialize(_ graph: Graph) throws(HalfstepError) -> [UInt8] {
    throw HalfstepError(.internalError, "under construction")
  }
}
