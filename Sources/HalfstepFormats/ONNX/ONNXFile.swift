// SPDX-License-Identifier: Apache-2.0
// Reads and writes ONNX models.

import HalfstepGraph
import HalfstepNumerics

/// Reads and writes ONNX models.
///
/// What the engine does not interpret (doc strings, metadata, functions, training information,
/// unknown fields) travels in `Graph.envelope` and `Node.opaque` and comes back on saving.
package enum ONNXFile {
  /// Oldest version of ONNX's own operators that is read.
  package static let oldestOpset: Int = 7
  /// Models of this many bytes or more do not fit in one message; their weights go outside.
  package static let messageLimit: Int = (1 << 31) - 1

  /// Reads a model from a file, and its external data from the file's folder.
  ///
  /// - Throws: `HalfstepError.fileAccess`, `.malformedFile`, `.unsupportedVersion`, `.unsafePath`,
  ///   `.invalidGraph` or `.outOfMemory`; the message begins with the path.
  package static func load(path: String) throws(HalfstepError) -> Graph {
    let file = try FileBuffer(path: path)
    do throws(HalfstepError) {
      var reader = ONNXReader(
        bytes: file.bytes, external: ExternalDataReader(folder: folder(of: path)),
        discard: { file.discard($0) })
      return try reader.read()
    } catch {
      throw HalfstepError(error.code, "'\(path)': \(error.message)", node: error.node)
    }
  }

  /// Reads a model from memory; `folder` is where external data may lie, nil refuses it.
  ///
  /// - Throws: `HalfstepError.malformedFile`, `.unsupportedVersion`, `.unsafePath`, `.fileAccess`,
  ///   `.invalidGraph` or `.outOfMemory`.
  package static func load(
    bytes: UnsafeRawBufferPointer, folder: String? = nil
  ) throws(HalfstepError) -> Graph {
    var reader = ONNXReader(
      bytes: bytes, external: folder.map { ExternalDataReader(folder: $0) }, discard: nil)
    return try reader.read()
  }

  /// Writes a model; beyond 2 GB of weights, or if asked, they go to `<path>.data`.
  ///
  /// Each file appears whole or not at all, the weights before the model that refers to them. Tensors
  /// of less than 1 KiB stay in the model; without larger ones there is no second file.
  ///
  /// - Parameter limit: Bytes beyond which the weights go outside unasked; smaller ones serve tests.
  /// - Throws: `HalfstepError.fileAccess` naming the path.
  package static func save(
    _ graph: Graph, path: String, externalData: Bool = false, limit: Int = messageLimit
  ) throws(HalfstepError) {
    let writer = ONNXWriter(graph)
    if !externalData {
      let chunks = try writer.chunks(external: nil)
      if chunks.reduce(0, { $0 + $1.count }) <= limit {
        var file = try FileWriter(path: path)
        for chunk in chunks { try chunk.write(to: &file) }
        return try file.commit()
      }
    }
    let dataPath = path + ".data"
    let layout = ExternalDataLayout(graph, location: fileName(of: dataPath))
    let chunks = try writer.chunks(external: layout)
    var file = try FileWriter(path: path)
    for chunk in chunks { try chunk.write(to: &file) }
    if !layout.offsets.isEmpty {
      var data = try FileWriter(path: dataPath)
      try layout.write(graph, to: &data)
      try data.commit()
    }
    try file.commit()
  }

  /// The bytes of a model file with weights inline.
  ///
  /// - Throws: `HalfstepError.invalidArgument` if they would not fit in one message of 2 GB.
  package static func serialize(_ graph: Graph) throws(HalfstepError) -> [UInt8] {
    let chunks = try ONNXWriter(graph).chunks(external: nil)
    let total = chunks.reduce(0) { $0 + $1.count }
    guard total <= messageLimit else {
      throw HalfstepError(
        .invalidArgument, "model of \(total) bytes: save it to a file with external data")
    }
    var result: [UInt8] = []
    result.reserveCapacity(total)
    for chunk in chunks { chunk.append(to: &result) }
    return result
  }

  private static func folder(of path: String) -> String {
    guard let slash = path.utf8.lastIndex(of: UInt8(ascii: "/")) else { return "." }
    return slash == path.startIndex ? "/" : String(path[..<slash])
  }

  private static func fileName(of path: String) -> String {
    guard let slash = path.utf8.lastIndex(of: UInt8(ascii: "/")) else { return path }
    return String(path[path.utf8.index(after: slash)...])
  }
}
