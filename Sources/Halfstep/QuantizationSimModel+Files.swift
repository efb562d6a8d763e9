// SPDX-License-Identifier: Apache-2.0
// Encodings and models that a simulation writes for other tools.

import HalfstepAlgorithms
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// Versions of AIMET's encodings JSON.
public enum EncodingsVersion: String, Hashable, Sendable, CaseIterable {
  /// A dictionary of lists with minimum and maximum, keyed by tensor.
  case v0_6_1 = "0.6.1"
  /// Lists of entries that name their tensor.
  case v1_0_0 = "1.0.0"
  /// One list with the attribute names of ONNX's QuantizeLinear.
  case v2_0_0 = "2.0.0"

  /// The version of a text.
  ///
  /// - Throws: `HalfstepError.unsupportedVersion` naming those that are supported.
  public init(text: String) throws(HalfstepError) {
    guard let version = EncodingsVersion(rawValue: text) else {
      let known = Self.allCases.map(\.rawValue).joined(separator: ", ")
      throw HalfstepError(
        .unsupportedVersion, "encodings version '\(text)': expected one of \(known)")
    }
    self = version
  }

  fileprivate var format: EncodingsFile.Version {
    switch self {
    case .v0_6_1: .v0_6_1
    case .v1_0_0: .v1_0_0
    case .v2_0_0: .v2_0_0
    }
  }
}

/// How to write a model with QuantizeLinear and DequantizeLinear.
public struct QDQOptions: Hashable, Sendable {
  /// Whether constants are stored as integers with a DequantizeLinear only; default no.
  public var prequantizesConstants: Bool = false
  /// Whether biases become 32-bit integers; default no.
  public var exportsInt32Bias: Bool = false

  /// Creates the default options, which suit onnxruntime and Qualcomm's converter.
  public init() {}
}

/// What did not match when encodings were loaded.
public struct EncodingsLoadReport: Hashable, Sendable {
  /// Tensors that the file names and that have no quantizer here.
  public let unknown: [String]
  /// Quantizers here that the file does not name.
  public let missing: [String]
  /// Tensor, property, expected, got.
  public let different: [String]
  /// Whether everything matched.
  public var isEmpty: Bool { unknown.isEmpty && missing.isEmpty && different.isEmpty }
}

extension QuantizationSimModel {
  /// The encodings as AIMET's JSON.
  ///
  /// - Parameter version: Version of the format; default 1.0.0.
  /// - Returns: UTF-8 text.
  /// - Throws: `HalfstepError.invalidState` before there are encodings.
  public func encodings(version: EncodingsVersion = .v1_0_0) throws(HalfstepError) -> [UInt8] {
    // Version 2.0.0 also lists tensors that carry another's grid through Reshape and the like.
    try EncodingsFile.serialize(
      try simulation.encodings(includingPropagated: version == .v2_0_0), version: version.format,
      graph: simulation.graph)
  }

  /// Writes `<prefix>.onnx` (the network in float32) and `<prefix>.encodings` to a folder.
  ///
  /// Each file appears whole or not at all; an error before the end leaves both as they were.
  ///
  /// - Parameters:
  ///   - directory: A folder; it is created if its parent exists.
  ///   - prefix: A file name without folders.
  ///   - version: Version of the encodings; default 1.0.0.
  /// - Throws: `HalfstepError.invalidArgument` for the prefix; `.invalidState` before there are
  ///   encodings; `.fileAccess`.
  public func export(
    to directory: String, prefix: String, version: EncodingsVersion = .v1_0_0
  ) throws(HalfstepError) {
    guard !prefix.isEmpty, !prefix.utf8.contains(UInt8(ascii: "/")), !prefix.utf8.contains(0) else {
      throw HalfstepError(
        .invalidArgument, "prefix '\(prefix)': expected a file name without folders")
    }
    guard !directory.isEmpty, !directory.utf8.contains(0) else {
      throw HalfstepError(.invalidArgument, "directory '\(directory)': expected a folder")
    }
    let bytes = try encodings(version: version)
    guard mkdir(directory, 0o777) == 0 || errno == EEXIST else {
      throw HalfstepError(
        .fileAccess, "cannot create folder '\(directory)': \(String(cString: strerror(errno)))")
    }
    let stem = directory.hasSuffix("/") ? directory + prefix : directory + "/" + prefix
    // Both are written aside before either takes its name: a disk that fills up changes neither.
    var encodingsFile = try FileWriter(path: stem + ".encodings")
    try encodingsFile.append(bytes)
    try ONNXFile.save(simulation.graph, path: stem + ".onnx")
    try encodingsFile.commit()
  }

  /// Writes an ONNX model whose QuantizeLinear and DequantizeLinear pairs carry the encodings.
  ///
  /// - Parameters:
  ///   - path: File to write or replace; it appears whole or not at all.
  ///   - options: How to write; the default suits onnxruntime and Qualcomm's converter.
  /// - Throws: `HalfstepError.invalidState` before there are encodings; `.fileAccess`.
  public func exportQDQ(
    to path: String, options: QDQOptions = QDQOptions()
  ) throws(HalfstepError) {
    try ONNXFile.save(try qdqGraph(options), path: path)
  }

  private func qdqGraph(_ options: QDQOptions) throws(HalfstepError) -> Graph {
    var modelOptions = QDQModel.Options()
    modelOptions.prequantizesConstants = options.prequantizesConstants
    modelOptions.exportsInt32Bias = options.exportsInt32Bias
    return try QDQModel.make(
      from: simulation.graph, encodings: try simulation.encodings(), options: modelOptions)
  }

  /// Takes encodings from JSON of any version.
  ///
  /// - Parameters:
  ///   - json: UTF-8 text.
  ///   - isStrict: Whether any mismatch is an error; default yes.
  /// - Returns: What did not match; empty if strict.
  /// - Throws: `HalfstepError.malformedFile`; `.unsupportedVersion`; `.encodingMismatch` if strict;
  ///   the encodings are then unchanged.
  @discardableResult
  public func loadEncodings(
    json: [UInt8], isStrict: Bool = true
  ) throws(HalfstepError) -> EncodingsLoadReport {
    let report = try simulation.load(try EncodingsFile.parse(json), strict: isStrict)
    return EncodingsLoadReport(
      unknown: report.unknown, missing: report.missing, different: report.different)
  }

  /// Takes encodings from a JSON file of any version.
  ///
  /// - Parameters:
  ///   - path: File to read.
  ///   - isStrict: Whether any mismatch is an error; default yes.
  /// - Returns: What did not match; empty if strict.
  /// - Throws: As `loadEncodings(json:isStrict:)`, and `HalfstepError.fileAccess`.
  @discardableResult
  public func loadEncodings(
    contentsOf path: String, isStrict: Bool = true
  ) throws(HalfstepError) -> EncodingsLoadReport {
    try loadEncodings(json: try AtomicFile.read(path), isStrict: isStrict)
  }
}
