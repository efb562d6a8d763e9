// SPDX-License-Identifier: Apache-2.0
// Options that several commands have, and what they stand for.

import ArgumentParser
import Halfstep

/// How a network is simulated.
struct SimulationOptions: ParsableArguments {
  /// Names of range schemes.
  enum Scheme: String, CaseIterable, ExpressibleByArgument {
    case minMax = "min_max"
    case sqnr
    case percentile
    case mse
    case entropy
  }

  /// Which scales weights have.
  enum Granularity: String, EnumerableFlag {
    case perChannel
    case perTensor
  }

  @Option(help: "Bits of weights, 2 to 16.")
  var weights: Int = 8

  @Option(help: "Bits of activations, 2 to 16.")
  var activations: Int = 8

  @Option(help: "How ranges are chosen.")
  var scheme: Scheme = .minMax

  @Option(
    help: ArgumentHelp(
      "Share of values within the range, 50 to 100; needed by, and only for, that scheme.",
      valueName: "share"))
  var percentile: Double?

  @Option(
    help: ArgumentHelp(
      "Runtime configuration: a built-in name or a JSON file. Instead of --per-…",
      valueName: "name|file"))
  var config: String?

  @Flag(help: "Scales of weights: one a channel (the default), or one a tensor.")
  var granularity: Granularity?

  @Option(
    help: ArgumentHelp(
      "Input channels that share a scale of a weight; by default all of a channel.",
      valueName: "n"))
  var blockSize: Int?

  /// Refuses what does not go together, before anything is read.
  func validate() throws {
    if config != nil && granularity != nil {
      throw ValidationError("--config and --per-channel or --per-tensor exclude each other")
    }
    if let blockSize {
      guard blockSize > 0 else {
        throw ValidationError("--block-size: expected 1 or more, got \(blockSize)")
      }
      if granularity == .perTensor {
        throw ValidationError("--block-size and --per-tensor exclude each other")
      }
    }
    for (bits, name) in [(weights, "--weights"), (activations, "--activations")] {
      guard (2...16).contains(bits) else {
        throw ValidationError("\(name): expected 2 to 16, got \(bits)")
      }
    }
    guard let percentile else {
      if scheme != .percentile { return }
      throw ValidationError("--scheme percentile needs --percentile, as in --percentile 99.9")
    }
    guard scheme == .percentile else {
      throw ValidationError("--percentile is for --scheme percentile")
    }
    guard (50...100).contains(percentile) else {
      throw ValidationError("--percentile: expected 50 to 100, got \(percentile)")
    }
  }

  private var rangeScheme: RangeScheme {
    switch scheme {
    case .minMax: .minMax
    case .sqnr: .sqnr
    case .mse: .mse
    case .entropy: .entropy
    case .percentile: .percentile(percentile ?? 100)
    }
  }

  /// What rounding aims at so that it fits the simulation.
  var roundingOptions: RoundingOptions {
    var options = RoundingOptions()
    options.parameterBits = weights
    options.activationBits = activations
    options.scheme = rangeScheme
    options.parameterBlockSize = blockSize
    options.configuration = config ?? (granularity == .perTensor ? "default" : nil)
    return options
  }

  func makeSimulation(of model: Model) throws -> QuantizationSimModel {
    let perTensor = granularity == .perTensor ? "default" : nil
    return try attempt(.configuring) { () throws(HalfstepError) in
      try QuantizationSimModel(
        model, parameterBits: weights, activationBits: activations, scheme: rangeScheme,
        configuration: config ?? perTensor, parameterBlockSize: blockSize)
    }
  }
}

/// Arrays for a network's inputs.
struct DataOptions: ParsableArguments {
  @Option(
    help: ArgumentHelp(
      "Array of the .npz for a network with one input; by default the one of the input's name.",
      valueName: "name"))
  var array: String?

  @Option(help: "Rows a batch.")
  var batchSize: Int = 8

  func validate() throws {
    guard batchSize > 0 else {
      throw ValidationError("--batch-size: expected 1 or more, got \(batchSize)")
    }
  }

  /// Finds the arrays of the network's inputs.
  func inputs(of model: Model, in arrays: NamedTensors, path: String) throws -> [String: Tensor] {
    try Self.inputs(of: model, in: arrays, path: path, array: array)
  }

  /// Finds the arrays of the network's inputs; an array may be named for a network with one.
  static func inputs(
    of model: Model, in arrays: NamedTensors, path: String, array: String?
  ) throws -> [String: Tensor] {
    let names = model.inputs.map(\.name)
    if let array {
      guard names.count == 1 else {
        throw usage("--array is for networks with one input, this one has \(names.count)")
      }
      guard let tensor = arrays[array] else {
        throw badData("'\(path)' has no array '\(array)', only \(list(arrays.names))")
      }
      return [names[0]: tensor]
    }
    // An .npy holds one array without a name.
    if names.count == 1, arrays.count == 1, arrays[names[0]] == nil {
      return [names[0]: arrays[0].tensor]
    }
    var inputs: [String: Tensor] = [:]
    for name in names {
      guard let tensor = arrays[name] else {
        throw badData(
          "'\(path)' has no array for input '\(name)', only \(list(arrays.names))"
            + (names.count == 1 ? "; choose one with --array" : ""))
      }
      inputs[name] = tensor
    }
    return inputs
  }

  private static func list(_ names: [String]) -> String {
    names.isEmpty ? "none" : names.map { "'\($0)'" }.joined(separator: ", ")
  }
}
