// SPDX-License-Identifier: Apache-2.0
// Weights in files beside the model.

import HalfstepGraph
import HalfstepNumerics
import ONNXProto

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// Reads weights from files in the model's folder, and from nowhere else.
struct ExternalDataReader {
  /// The model's folder.
  let folder: String

  /// A tensor whose bytes an entry list (`location`, `offset`, `length`) describes.
  ///
  /// - Throws: `HalfstepError.unsafePath` for a location outside the folder, `.malformedFile` if the
  ///   file is too short or the entries are wrong, `.fileAccess`, `.outOfMemory`.
  func tensor(
    _ type: DataType, _ shape: Shape, _ entries: [ONNXStringStringEntryProto], _ label: String
  ) throws(HalfstepError) -> Tensor {
    var location: String?
    var offset = 0
    var length: Int?
    for entry in entries {
      switch entry.key {
      case "location": location = entry.value
      case "offset": offset = try number(entry, label)
      case "length": length = try number(entry, label)
      default: break
      }
    }
    guard let location, !location.isEmpty else {
      throw HalfstepError(.malformedFile, "\(label): external data without a location")
    }
    let needed = Tensor.byteCount(of: type, count: shape.elementCount)
    if let length, length != needed {
      throw HalfstepError(
        .malformedFile,
        "\(label) \(shape) of \(type): expected \(needed) bytes, external data has \(length)")
    }
    let path = try safePath(location, label)
    let descriptor = try openForReading(path, waits: false)
    defer { close(descriptor) }
    var status = stat()
    guard fstat(descriptor, &status) == 0, status.st_mode & S_IFMT == S_IFREG else {
      throw HalfstepError(.fileAccess, "\(label): '\(path)' is not an ordinary file")
    }
    let (end, overflow) = offset.addingReportingOverflow(needed)
    guard !overflow, end <= Int(status.st_size) else {
      throw HalfstepError(
        .malformedFile,
        "\(label): bytes \(offset)..<\(overflow ? "2^63" : String(end)) are outside '\(location)' of"
          + " \(status.st_size) bytes")
    }
    let tensor = try Tensor(uninitialized: type, shape: shape)
    var done = 0
    while done < needed {
      let part = min(needed - done, 1 << 30)
      let moved = pread(descriptor, tensor.storage.baseAddress + done, part, off_t(offset + done))
      if moved < 0, errno == EINTR { continue }
      guard moved > 0 else {
        throw HalfstepError(.fileAccess, "\(label): cannot read '\(path)': \(systemErrorText())")
      }
      done += moved
    }
    return tensor
  }

  private func number(
    _ entry: ONNXStringStringEntryProto, _ label: String
  ) throws(HalfstepError) -> Int {
    guard let value = Int(entry.value), value >= 0 else {
      throw HalfstepError(
        .malformedFile, "\(label): external data has \(entry.key) '\(entry.value)'")
    }
    return value
  }

  /// The real path of a location, which must lie in the folder also after links are followed.
  private func safePath(_ location: String, _ label: String) throws(HalfstepError) -> String {
    let parts = location.split(separator: "/", omittingEmptySubsequences: false)
    guard !location.utf8.contains(0), !location.hasPrefix("/"), !parts.contains("..") else {
      throw HalfstepError(
        .unsafePath, "\(label): external data '\(location)' is outside the model's folder")
    }
    guard let root = resolve(folder) else {
      throw HalfstepError(
        .fileAccess, "\(label): cannot open folder '\(folder)': \(systemErrorText())")
    }
    guard let path = resolve("\(root)/\(location)") else {
      throw HalfstepError(
        .fileAccess, "\(label): cannot read '\(folder)/\(location)': \(systemErrorText())")
    }
    guard path.hasPrefix(root == "/" ? root : root + "/") else {
      throw HalfstepError(
        .unsafePath, "\(label): external data '\(location)' leads outside the model's folder")
    }
    return path
  }

  private func resolve(_ path: String) -> String? {
    guard let resolved = realpath(path, nil) else { return nil }
    defer { free(resolved) }
    return String(cString: resolved)
  }
}

/// Where each weight goes in the data file of a model that is being saved.
struct ExternalDataLayout {
  /// Tensors below this many bytes stay in the model file.
  static let smallest: Int = 1024
  /// Offsets are multiples of this.
  static let alignment: Int = 64

  /// File name that the model records.
  let location: String
  /// Offset of each tensor that goes outside.
  private(set) var offsets: [String: Int] = [:]

  /// Places every large initializer in file order.
  init(_ graph: Graph, location: String) {
    self.location = location
    var end = 0
    for (name, tensor) in graph.initializers where tensor.byteCount >= Self.smallest {
      let start = (end + Self.alignment - 1) / Self.alignment * Self.alignment
      offsets[name] = start
      end = start + tensor.byteCount
    }
  }

  /// Writes the weights.
  func write(_ graph: Graph, to file: inout FileWriter) throws(HalfstepError) {
    for (name, tensor) in graph.initializers {
      guard let offset = offsets[name] else { continue }
      try file.append([UInt8](repeating: 0, count: offset - file.count))
      try file.append(tensor.rawBytes)
      withExtendedLifetime(tensor) {}
    }
  }
}

extension Tensor {
  /// The elements' bytes; valid while the tensor lives.
  var rawBytes: UnsafeRawBufferPointer {
    UnsafeRawBufferPointer(start: storage.baseAddress, count: byteCount)
  }
}

extension ONNXAttributeProto {
  /// Replaces external data inside subgraphs by inline data, so that the model can move.
  mutating func loadExternalData(_ reader: TensorReader, _ label: String) throws(HalfstepError) {
    if hasT { try t.loadExternalData(reader, label) }
    for index in tensors.indices { try tensors[index].loadExternalData(reader, label) }
    if hasG { try g.loadExternalData(reader, label) }
    for index in graphs.indices { try graphs[index].loadExternalData(reader, label) }
  }
}

extension ONNXGraphProto {
  fileprivate mutating func loadExternalData(
    _ reader: TensorReader, _ label: String
  ) throws(HalfstepError) {
    for index in initializer.indices { try initializer[index].loadExternalData(reader, label) }
    for position in node.indices {
      for index in node[position].attribute.indices {
        try node[position].attribute[index].loadExternalData(reader, label)
      }
    }
  }
}

extension ONNXTensorProto {
  fileprivate mutating func loadExternalData(
    _ reader: TensorReader, _ label: String
  ) throws(HalfstepError) {
    guard dataLocation == .external else { return }
    guard let tensor = try reader.tensor(self, "\(label), tensor '\(name)'") else { return }
    clearDataLocation()
    externalData = []
    rawData = .init(tensor.rawBytes)
    withExtendedLifetime(tensor) {}
  }
}
