// SPDX-License-Identifier: Apache-2.0
// A trained network as users hold it.

import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics

/// A trained network: read from ONNX, changed by algorithms, run, written back.
///
/// A value type. An algorithm that fails or is cancelled leaves the model as it was; copies share
/// weights until one of them changes them.
///
///     var model = try Model(contentsOf: "net.onnx")
///     try model.foldBatchNorms()
///     try model.equalize()
///     try model.save(to: "net_equalized.onnx")
public struct Model: Sendable {
  /// The network.
  package var graph: Graph { didSet { sessions = SessionCache() } }
  /// What was compiled for earlier runs; copies of an unchanged model share it.
  private var sessions: SessionCache = SessionCache()

  package init(graph: Graph) { self.graph = graph }

  // MARK: Files

  /// Reads an ONNX model from a file, and its external data from the file's folder.
  ///
  /// - Parameter path: File to read.
  /// - Throws: `HalfstepError.fileAccess`; `.malformedFile`; `.unsupportedVersion`; `.unsafePath` for
  ///   external data outside the folder; `.invalidGraph`; `.outOfMemory`.
  public init(contentsOf path: String) throws(HalfstepError) {
    self.init(graph: try ONNXFile.load(path: path))
  }

  /// Reads an ONNX model from memory, which is not needed afterwards.
  ///
  /// - Parameters:
  ///   - bytes: The file's bytes.
  ///   - externalDataFolder: Where external data may lie; nil (the default) refuses external data.
  /// - Throws: As `init(contentsOf:)`.
  public init(
    bytes: UnsafeRawBufferPointer, externalDataFolder: String? = nil
  ) throws(HalfstepError) {
    self.init(graph: try ONNXFile.load(bytes: bytes, folder: externalDataFolder))
  }

  /// Reads an ONNX model from an array of bytes.
  ///
  /// - Parameters:
  ///   - bytes: The file's bytes.
  ///   - externalDataFolder: Where external data may lie; nil (the default) refuses external data.
  /// - Throws: As `init(contentsOf:)`.
  public init(bytes: [UInt8], externalDataFolder: String? = nil) throws(HalfstepError) {
    let graph = bytes.withUnsafeBytes { buffer in
      Result { () throws(HalfstepError) in
        try ONNXFile.load(bytes: buffer, folder: externalDataFolder)
      }
    }
    self.init(graph: try graph.get())
  }

  /// Writes the model as ONNX; the file appears whole or not at all.
  ///
  /// - Parameters:
  ///   - path: File to write or replace.
  ///   - usesExternalData: Whether weights go to `<path>.data`, as they must above 2 GB; default no.
  /// - Throws: `HalfstepError.fileAccess`.
  public func save(to path: String, usesExternalData: Bool = false) throws(HalfstepError) {
    try ONNXFile.save(graph, path: path, externalData: usesExternalData)
  }

  /// The bytes of an ONNX file with weights inline.
  ///
  /// - Throws: `HalfstepError.invalidArgument` above 2 GB, the format's limit.
  public func serialized() throws(HalfstepError) -> [UInt8] { try ONNXFile.serialize(graph) }

  // MARK: Tensors

  /// Tensors that a run needs.
  ///
  /// Graph inputs that an initializer gives a value are left out.
  public var inputs: [TensorInfo] {
    graph.inputs.filter { graph.initializers[$0.name] == nil }.map(TensorInfo.init)
  }
  /// Tensors that a run gives back.
  public var outputs: [TensorInfo] { graph.outputs.map(TensorInfo.init) }
  /// Constants by name, in file order; they share the model's memory.
  public var initializers: NamedTensors { NamedTensors(graph.initializers) }

  /// Replaces a constant, or turns a graph input into a constant.
  ///
  /// - Parameters:
  ///   - name: A constant, or a graph input.
  ///   - value: A tensor of the same type and shape.
  /// - Throws: `HalfstepError.unknownName`; `.typeMismatch`; `.shapeMismatch`.
  public mutating func setInitializer(_ name: String, to value: Tensor) throws(HalfstepError) {
    if let old = graph.initializers[name] {
      guard old.dataType == value.dataType else {
        throw HalfstepError(
          .typeMismatch, "constant '\(name)': expected \(old.dataType), got \(value.dataType)")
      }
      guard old.shape == value.shape else {
        throw HalfstepError(
          .shapeMismatch, "constant '\(name)': expected \(old.shape), got \(value.shape)")
      }
    } else {
      guard let input = graph.inputs.first(where: { $0.name == name }) else {
        throw HalfstepError(.unknownName, "model has no constant or input '\(name)'")
      }
      if let expected = input.dataType, expected != value.dataType {
        throw HalfstepError(
          .typeMismatch, "input '\(name)': expected \(expected), got \(value.dataType)")
      }
      let agrees = input.dimensions.map { declared in
        declared.count == value.shape.rank
          && zip(declared, value.shape.dimensions).allSatisfy { dimension, extent in
            if case .fixed(let expected) = dimension { expected == extent } else { true }
          }
      }
      guard agrees ?? true else {
        throw HalfstepError(
          .shapeMismatch, "input '\(name)': the declared shape does not allow \(value.shape)")
      }
    }
    graph.initializers[name] = value
    graph.inputs.removeAll { $0.name == name }
  }

  /// Takes a constant out of the model, which then asks for it as an input.
  ///
  /// The opposite of `setInitializer`: once every weight is out, `serialized()` gives the structure
  /// alone, and each weight lives as long as its taker holds it.
  ///
  /// - Parameter name: A constant.
  /// - Returns: Its value.
  /// - Throws: `HalfstepError.unknownName`.
  public mutating func takeInitializer(_ name: String) throws(HalfstepError) -> Tensor {
    guard let value = graph.initializers.removeValue(forKey: name) else {
      throw HalfstepError(.unknownName, "model has no constant '\(name)'")
    }
    if !graph.inputs.contains(where: { $0.name == name }) {
      graph.inputs.append(
        ValueInfo(
          name: name, dataType: value.dataType,
          dimensions: value.shape.dimensions.map { .fixed($0) }))
    }
    return value
  }

  // MARK: Running

  /// Runs the network in float arithmetic.
  ///
  /// What was compiled is kept for the next run of the same model.
  ///
  /// - Parameters:
  ///   - inputs: Values of `self.inputs`.
  ///   - extraOutputs: Tensors to give back besides the outputs; default none.
  /// - Returns: The outputs, then the extra outputs.
  /// - Throws: `HalfstepError.unsupportedOperator` naming every operator that cannot run;
  ///   `.unknownName`; `.shapeMismatch`; `.typeMismatch`; `.invalidArgument` for a missing input.
  public func run(
    _ inputs: [String: Tensor], extraOutputs: [String] = []
  ) throws(HalfstepError) -> NamedTensors {
    try sessions.run(graph, inputs, extraOutputs: extraOutputs)
  }
}
