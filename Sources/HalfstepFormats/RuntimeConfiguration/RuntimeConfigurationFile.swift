// SPDX-License-Identifier: Apache-2.0
// Reads runtime-configuration JSON and holds the built-in ones.

import HalfstepGraph
import HalfstepNumerics
import OrderedCollections

/// Reads runtime-configuration JSON and holds the built-in ones.
package enum RuntimeConfigurationFile {
  /// Names of the built-in configurations.
  package static var builtInNames: [String] { Array(BuiltInConfigurations.texts.keys) }

  /// The JSON text of a built-in configuration, or nil if there is none of that name.
  package static func builtInText(_ name: String) -> String? { BuiltInConfigurations.texts[name] }

  /// A built-in configuration by name, or the file at that path.
  ///
  /// - Throws: `HalfstepError.invalidConfiguration` with the key concerned, `.fileAccess`, or
  ///   `.unknownName` for a bare word that is neither.
  package static func load(nameOrPath: String) throws(HalfstepError) -> RuntimeConfiguration {
    if let text = BuiltInConfigurations.texts[nameOrPath] { return try parse(Array(text.utf8)) }
    let bytes: [UInt8]
    do throws(HalfstepError) {
      bytes = try AtomicFile.read(nameOrPath)
    } catch {
      if nameOrPath.utf8.contains(where: { $0 == UInt8(ascii: "/") || $0 == UInt8(ascii: ".") }) {
        throw error
      }
      throw HalfstepError(
        .unknownName,
        "runtime configuration '\(nameOrPath)': expected a file or one of "
          + builtInNames.joined(separator: ", "))
    }
    do throws(HalfstepError) {
      return try parse(bytes)
    } catch {
      throw HalfstepError(error.code, "'\(nameOrPath)': \(error.message)")
    }
  }

  /// Reads the JSON text of a configuration.
  ///
  /// - Throws: `HalfstepError.invalidConfiguration` with the path of the key.
  package static func parse(_ bytes: [UInt8]) throws(HalfstepError) -> RuntimeConfiguration {
    let code = HalfstepError.Code.invalidConfiguration
    let root = JSONCursor(root: try JSONValue(parsing: bytes, code), code)
    let sections: Set<String> = [
      "defaults", "params", "op_type", "supergroups", "model_input", "model_output",
    ]
    let keys = try root.members(
      known: sections.union(["supergroup_pass_list"]), required: sections)
    var result = RuntimeConfiguration()
    for (key, cursor) in keys.sorted(by: { $0.key < $1.key }) {
      switch key {
      case "defaults": try readDefaults(cursor, &result)
      case "params": result.parameters = try parameters(cursor)
      case "op_type":
        for (type, settings) in try cursor.members() {
          result.operators[type] = try readOperator(settings)
        }
      case "supergroups": result.supergroups = try supergroups(cursor)
      case "supergroup_pass_list": result.supergroupPasses = try passes(cursor)
      case "model_input": result.modelInputQuantized = try boundary(cursor, "is_input_quantized")
      default: result.modelOutputQuantized = try boundary(cursor, "is_output_quantized")
      }
    }
    return result
  }

  // MARK: Sections

  private static func readDefaults(
    _ cursor: JSONCursor, _ result: inout RuntimeConfiguration
  ) throws(HalfstepError) {
    let keys = try cursor.members(known: [
      "ops", "params", "strict_symmetric", "unsigned_symmetric", "per_channel_quantization",
      "supported_kernels", "hw_version",
    ])
    if let ops = try keys["ops"]?.members(known: ["is_output_quantized", "is_symmetric"]) {
      result.outputsQuantized = try onlyTrue(ops["is_output_quantized"])
      result.outputsSymmetric = try ops["is_symmetric"]?.spelledBoolean()
    }
    if let params = try keys["params"].map({ (c) throws(HalfstepError) in try parameter(c) }) {
      result.parametersQuantized = params.isQuantized
      result.parametersSymmetric = params.isSymmetric
    }
    result.isStrictSymmetric = try keys["strict_symmetric"]?.spelledBoolean() ?? false
    result.isUnsignedSymmetric = try keys["unsigned_symmetric"]?.spelledBoolean() ?? false
    result.isPerChannel = try keys["per_channel_quantization"]?.spelledBoolean() ?? false
    result.supportedKernels = try kernels(keys["supported_kernels"], needsParameter: true)
    result.hardwareVersion = try keys["hw_version"]?.string()
  }

  private static func readOperator(
    _ cursor: JSONCursor
  ) throws(HalfstepError) -> RuntimeConfiguration.Operator {
    let keys = try cursor.members(known: [
      "is_input_quantized", "is_output_quantized", "is_symmetric", "params", "supported_kernels",
      "per_channel_quantization", "encoding_constraints",
    ])
    var result = RuntimeConfiguration.Operator()
    result.isInputQuantized = try onlyTrue(keys["is_input_quantized"])
    result.isOutputQuantized = try keys["is_output_quantized"]?.spelledBoolean()
    result.isSymmetric = try keys["is_symmetric"]?.spelledBoolean()
    result.isPerChannel = try keys["per_channel_quantization"]?.spelledBoolean()
    if let cursor = keys["params"] { result.parameters = try parameters(cursor) }
    result.supportedKernels = try kernels(keys["supported_kernels"], needsParameter: false)
    if let cursor = keys["encoding_constraints"] {
      let bounds = try cursor.members(known: ["min", "max"], required: ["min"])
      result.constraintMinimum = try bounds["min"]?.number()
      result.constraintMaximum = try bounds["max"]?.number()
      if let low = result.constraintMinimum, let high = result.constraintMaximum, low > high {
        throw cursor.failure("min \(low) is above max \(high)")
      }
    }
    return result
  }

  private static func parameters(
    _ cursor: JSONCursor
  ) throws(HalfstepError) -> OrderedDictionary<String, RuntimeConfiguration.Parameter> {
    var result: OrderedDictionary<String, RuntimeConfiguration.Parameter> = [:]
    for (kind, settings) in try cursor.members() { result[kind] = try parameter(settings) }
    return result
  }

  private static func parameter(
    _ cursor: JSONCursor
  ) throws(HalfstepError) -> RuntimeConfiguration.Parameter {
    let keys = try cursor.members(known: ["is_quantized", "is_symmetric"])
    return RuntimeConfiguration.Parameter(
      isQuantized: try keys["is_quantized"]?.spelledBoolean(),
      isSymmetric: try keys["is_symmetric"]?.spelledBoolean())
  }

  private static func supergroups(_ cursor: JSONCursor) throws(HalfstepError) -> [[String]] {
    var result: [[String]] = []
    for group in try cursor.elements() {
      let list = try group.members(known: ["op_list"], required: ["op_list"])["op_list"]!
      var types: [String] = []
      for type in try list.elements() { types.append(try type.string()) }
      guard types.count >= 2 else {
        throw list.failure("expected 2 operators or more, got \(types.count)")
      }
      result.append(types)
    }
    return result
  }

  /// Graph patterns that a configuration may name.
  private static let knownPasses: [String] = [
    "LayerNormalization", "RMSNormalization", "MaskedSoftmax", "MatmulAdd",
  ]

  private static func passes(_ cursor: JSONCursor) throws(HalfstepError) -> [String] {
    var result: [String] = []
    for element in try cursor.elements() {
      let name = try element.string()
      guard knownPasses.contains(name) else {
        throw element.failure(
          "expected one of \(knownPasses.joined(separator: ", ")), got \"\(name)\"")
      }
      result.append(name)
    }
    return result
  }

  private static func boundary(
    _ cursor: JSONCursor, _ key: String
  ) throws(HalfstepError) -> Bool {
    try onlyTrue(cursor.members(known: [key])[key]) ?? false
  }

  /// A setting that can be switched on but not off.
  private static func onlyTrue(_ cursor: JSONCursor?) throws(HalfstepError) -> Bool? {
    guard let cursor else { return nil }
    guard try cursor.spelledBoolean() else {
      throw cursor.failure("only \"True\" is allowed; leave the key out instead")
    }
    return true
  }

  // MARK: Kernels

  private static func kernels(
    _ cursor: JSONCursor?, needsParameter: Bool
  ) throws(HalfstepError) -> [RuntimeConfiguration.Kernel] {
    var result: [RuntimeConfiguration.Kernel] = []
    for kernel in try cursor?.elements() ?? [] {
      let required: Set<String> = needsParameter ? ["activation", "param"] : ["activation"]
      let keys = try kernel.members(known: ["activation", "param"], required: required)
      let activation = try kernelType(keys["activation"]!)
      var parameter: RuntimeConfiguration.KernelType?
      if let cursor = keys["param"] { parameter = try kernelType(cursor) }
      result.append(RuntimeConfiguration.Kernel(activation: activation, parameter: parameter))
    }
    return result
  }

  private static func kernelType(
    _ cursor: JSONCursor
  ) throws(HalfstepError) -> RuntimeConfiguration.KernelType {
    let keys = try cursor.members(known: ["bitwidth", "dtype"], required: ["bitwidth", "dtype"])
    let bits = try keys["bitwidth"]!.integer()
    guard [4, 8, 16, 32].contains(bits) else {
      throw keys["bitwidth"]!.failure("expected 4, 8, 16 or 32, got \(bits)")
    }
    let type = try keys["dtype"]!.string()
    guard type == "int" || type == "float" else {
      throw keys["dtype"]!.failure("expected \"int\" or \"float\", got \"\(type)\"")
    }
    return RuntimeConfiguration.KernelType(bits: bits, isFloat: type == "float")
  }
}
