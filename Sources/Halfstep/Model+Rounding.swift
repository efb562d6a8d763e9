// SPDX-License-Identifier: Apache-2.0
// Rounding that recovers few-bit weights, and bias correction.

import HalfstepAlgorithms
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics

/// How weights are rounded.
public enum RoundingMethod: String, Hashable, Sendable, CaseIterable {
  /// What does best on held-out rows for the effort.
  case auto
  /// Linear algebra on Gram matrices of the layers' inputs.
  case gram
  /// AdaRound by gradient descent, with AIMET's defaults: the classical method, and slow.
  case gradient
  /// Rounding to nearest on scales searched for the least error of each layer's output.
  case sequentialMSE = "sequential_mse"
}

/// What rounding aims at and may use.
public struct RoundingOptions: Hashable, Sendable {
  /// How weights are rounded; default `.auto`.
  public var method: RoundingMethod = .auto
  /// Width of weights, 2...16; default 4.
  public var parameterBits: Int = 4
  /// Width of activations while rounding, 2...16; nil keeps them in float; default 8.
  public var activationBits: Int? = 8
  /// How ranges of activations, and of weights rounded to nearest, are chosen; give the
  /// `QuantizationSimModel` the same. Default `.minMax`, as there.
  public var scheme: RangeScheme = .minMax
  /// A built-in runtime configuration by name or the path of a JSON file; nil (the default) means
  /// `QuantizationSimModel.defaultConfiguration`.
  public var configuration: String?
  /// Input channels that share a scale, 1 or more, in weights that the configuration quantizes per
  /// channel; nil (the default) for all of a channel. Give the `QuantizationSimModel` the same.
  public var parameterBlockSize: Int?
  /// Names of nodes that stay in float; default none.
  public var excludedLayers: [String] = []
  /// Whether a weight may only go to one of its two neighbors on the grid, as in AdaRound; default no.
  public var isFloorOrCeil: Bool = false
  /// Steps of `.gradient` for each layer, 1 or more; nil (the default) means AIMET's 10,000 for 8 bits
  /// and more, 15,000 below.
  public var iterations: Int?
  /// Weight of `.gradient`'s regularizer, which pushes weights to the grid, 0 or more; default 0.01.
  public var regularization: Double = 0.01
  /// Exponent of the regularizer when it sets in, and at the end; 1...1000, defaults 20 and 2.
  public var betaStart: Double = 20
  public var betaEnd: Double = 2
  /// Share of `.gradient`'s steps without the regularizer, 0..<1; default 0.2.
  public var warmStart: Double = 0.2
  /// Fractions of the range that `.sequentialMSE` tries, 1...1000; default 20.
  public var candidates: Int = 20
  /// Widths of single layers' weights by node name, 2...16, none excluded; `parameterBits` for all others.
  public var layerBits: [String: Int] = [:]
  /// Rows of its input that a layer learns from at most, 1 or more; default 32,768.
  public var maximumRows: Int = 1 << 15
  /// Bytes of activations held in memory; more goes to a temporary file; default 64 MiB.
  public var maximumBytes: Int = 1 << 26
  /// Decides which rows are drawn; default 0.
  public var seed: UInt64 = 0
  /// A folder, made if it is not there, in which the result of each layer is kept under a hash of all
  /// that it depends on: a run that was cancelled goes on where it ended, and one with another option
  /// redoes only the layers that it changes. Nothing is ever removed. Nil, the default, keeps nothing.
  public var cacheFolder: String?

  /// Creates the default options.
  public init() {}

  /// Checks what can be checked without a model and a configuration, as rounding does first.
  ///
  /// - Throws: `HalfstepError.invalidArgument` naming the option that is out of range.
  public func validate() throws(HalfstepError) {
    for (bits, what) in [(parameterBits, "parameter"), (activationBits ?? 8, "activation")]
    where !QuantizerSpec.bitRange.contains(bits) {
      throw HalfstepError(.invalidArgument, "\(what) bits: expected 2...16, got \(bits)")
    }
    guard maximumRows > 0 else {
      throw HalfstepError(
        .invalidArgument, "maximum rows: expected 1 or more, got \(maximumRows)")
    }
    if case .percentile(let share) = scheme, !(50...100).contains(share) {
      throw HalfstepError(.invalidArgument, "percentile: expected 50...100, got \(share)")
    }
    switch method {
    case .auto, .gram: break
    case .gradient: try gradientOptions.validate()
    case .sequentialMSE: try sequentialMSEOptions.validate()
    }
  }

  fileprivate var gradientOptions: AdaRoundOptions {
    var options = AdaRoundOptions()
    options.iterations = iterations
    options.regularization = regularization
    options.beta = .init(start: betaStart, end: betaEnd)
    options.warmStart = warmStart
    options.seed = seed
    return options
  }

  fileprivate var sequentialMSEOptions: SequentialMSERounder.Options {
    var options = SequentialMSERounder.Options()
    options.candidates = candidates
    return options
  }
}

/// How far rounding is.
public struct RoundingProgress: Hashable, Sendable {
  /// Layers that are done.
  public let completed: Int
  /// Layers in all.
  public let total: Int
  /// Name of the layer at work; "calibration" before the first.
  public let layer: String
  /// Share of that layer that is done, 0...1.
  public let fraction: Double
  /// About how long the rest will take; nil while too little is done to tell.
  public let secondsLeft: Double?
}

/// What became of a layer.
public struct RoundedLayer: Hashable, Sendable {
  /// Node name, or operator and first output if the node has no name.
  public let name: String
  /// Name of the weight.
  public let weight: String
  /// Width of the weight's codes.
  public let bits: Int
  /// Noise over signal with the layer rounded to nearest, on held-out data: of the layer's output, or,
  /// for bias correction, of the outputs of the quantized network.
  public let noiseBefore: Double
  /// Noise over signal with what was kept; never larger.
  public let noiseAfter: Double
  /// How the kept weights were found: "nearest" if nothing did better.
  public let kept: String
}

/// What rounding did, layer by layer in the order in which they run.
public struct RoundingReport: Hashable, Sendable {
  public let layers: [RoundedLayer]
}

extension Model {
  /// Rounds weights so that the network's outputs change least, with unlabeled data.
  ///
  /// Fold batch norms first, and equalize if scales are per tensor. Each layer aims at what the float
  /// network computes, given what the layers rounded before it make of the data; what does not do
  /// better than rounding to nearest on held-out rows is not kept. Weights and biases change in place;
  /// the model remembers the grids, and a `QuantizationSimModel` made from it uses them.
  ///
  /// Without data, layers are rounded by the moments that folded batch norms let expect of their inputs,
  /// so that errors within kernels and rows cancel; `method` has to be `.auto` or `.gram` then. That is
  /// better than rounding to nearest, and far from what a few dozen samples give.
  ///
  /// - Parameters:
  ///   - data: Values of `inputs`, `[N, …]` each; how the network cuts them does not matter. Nil rounds
  ///     without data.
  ///   - options: What to aim at.
  ///   - progress: Told after each layer how many of how many are done; false cancels.
  ///   - details: Told now and then, also within layers, how far the call is; false cancels.
  /// - Returns: What was kept for each layer.
  /// - Throws: `HalfstepError.cancelled`; `.emptyStatistics` without rows; `.invalidArgument` for
  ///   options; `.nonFiniteValue`; `.unknownName`, `.shapeMismatch` for the data;
  ///   `.unsupportedOperator`; `.fileAccess` for the temporary file. The model is then unchanged.
  /// - Complexity: One run of the network in float and one quantized, O(rows · columns²) for each layer's
  ///   Gram matrix and O(weights · columns) for its rounding.
  /// - Reference: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
  ///   arXiv:2004.10568, for the objective; Frantar et al., "GPTQ", 2022, arXiv:2210.17323.
  @discardableResult
  public mutating func adaround(
    data: [String: Tensor]?, options: RoundingOptions = RoundingOptions(),
    progress: ((_ completed: Int, _ total: Int) -> Bool)? = nil,
    details: ((RoundingProgress) -> Bool)? = nil
  ) throws(HalfstepError) -> RoundingReport {
    var gram = GramRounding.Options()
    gram.isFloorOrCeil = options.isFloorOrCeil
    guard let data else {
      guard options.method == .auto || options.method == .gram else {
        throw HalfstepError(
          .emptyStatistics, "method '\(options.method.rawValue)' needs data; 'gram' does not")
      }
      return try changed(options, progress, details) {
        (graph, settings, tell) throws(HalfstepError) in
        try DataFreeRounding(options: settings, gram: gram).apply(to: &graph, progress: tell)
      }
    }
    switch options.method {
    case .auto:
      return try reconstruct(
        data, options, AdaRoundRounder.brief(GramRounding(options: gram), seed: options.seed),
        writesWeights: true, progress, details)
    case .gram:
      return try reconstruct(
        data, options, GramRounding(options: gram), writesWeights: true, progress, details)
    case .gradient:
      return try reconstruct(
        data, options, AdaRoundRounder(options: options.gradientOptions), writesWeights: true,
        progress, details)
    case .sequentialMSE:
      return try reconstruct(
        data, options, SequentialMSERounder(options: options.sequentialMSEOptions),
        writesWeights: true, progress, details)
    }
  }

  /// Corrects biases for what rounding to nearest does to the means of layers' outputs.
  ///
  /// Weights stay as they are; quantize the model afterwards with the same options. A layer's bias
  /// changes only if that brings the outputs of the quantized network nearer to those of the float
  /// network, on up to 32 samples from all over the data.
  ///
  /// Without data, the means of layers' inputs are those that folded batch norms let expect, and only what
  /// rounding the weights does to the outputs' means is corrected, wherever that is known.
  ///
  /// - Parameters:
  ///   - data: Values of `inputs`, `[N, …]` each; nil corrects analytically.
  ///   - options: How the model will be quantized; 8 bits are usual.
  ///   - progress: Told after each layer how many of how many are done; false cancels.
  ///   - details: Told now and then, also within layers, how far the call is; false cancels.
  /// - Returns: What was kept for each layer.
  /// - Throws: As `adaround(data:options:progress:)`.
  /// - Reference: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
  ///   Correction", 2019. arXiv:1906.04721
  @discardableResult
  public mutating func correctBiases(
    data: [String: Tensor]?, options: RoundingOptions = RoundingOptions(),
    progress: ((_ completed: Int, _ total: Int) -> Bool)? = nil,
    details: ((RoundingProgress) -> Bool)? = nil
  ) throws(HalfstepError) -> RoundingReport {
    guard let data else {
      return try changed(options, progress, details) {
        (graph, settings, tell) throws(HalfstepError) in
        var settings = settings
        settings.writesWeights = false
        return try AnalyticBiasCorrection(options: settings).apply(to: &graph, progress: tell)
      }
    }
    return try reconstruct(
      data, options, EmpiricalBiasCorrection(), writesWeights: false, progress, details)
  }

  private mutating func reconstruct(
    _ data: [String: Tensor], _ options: RoundingOptions, _ rounder: some LayerRounder,
    writesWeights: Bool, _ progress: ((Int, Int) -> Bool)?, _ details: ((RoundingProgress) -> Bool)?
  ) throws(HalfstepError) -> RoundingReport {
    try changed(options, progress, details) { (graph, settings, tell) throws(HalfstepError) in
      var settings = settings
      settings.writesWeights = writesWeights
      // The classical methods aim at each layer's own output.
      settings.targetsSums =
        writesWeights && (options.method == .auto || options.method == .gram)
      if !writesWeights { settings.validation = .outputs(isQuantized: true) }
      return try LayerReconstruction(options: settings).apply(
        to: &graph, batches: [data], rounder: rounder, progress: tell)
    }
  }

  /// Checks options, runs a method on a copy of the graph, and takes the result.
  private mutating func changed(
    _ options: RoundingOptions, _ progress: ((Int, Int) -> Bool)?,
    _ details: ((RoundingProgress) -> Bool)?,
    _ body: (
      inout Graph, LayerReconstruction.Options, ((LayerReconstruction.Progress) -> Bool)?
    ) throws(HalfstepError) -> LayerReconstruction.Report
  ) throws(HalfstepError) -> RoundingReport {
    try options.validate()
    var settings = LayerReconstruction.Options(
      configuration: try RuntimeConfigurationFile.load(
        nameOrPath: options.configuration ?? QuantizationSimModel.defaultConfiguration))
    settings.parameterBits = options.parameterBits
    settings.activationBits = options.activationBits
    settings.parameterBlockSize = options.parameterBlockSize
    settings.scheme = options.scheme
    settings.excludedLayers = options.excludedLayers
    settings.layerBits = options.layerBits
    settings.maximumRows = options.maximumRows
    settings.maximumBytes = options.maximumBytes
    settings.seed = options.seed
    settings.cacheFolder = options.cacheFolder
    var copy = graph
    var last = -1
    let report = try body(
      &copy, settings,
      progress == nil && details == nil
        ? nil
        : { state in
          // One step a layer; in between, callers may still cancel.
          last = max(last, state.completed)
          let total = max(state.total, last)
          return (progress?(last, total) ?? true)
            && (details?(
              RoundingProgress(
                completed: last, total: total, layer: state.layer, fraction: state.fraction,
                secondsLeft: state.secondsLeft)) ?? true)
        })
    graph = copy
    if let progress { _ = progress(report.layers.count, report.layers.count) }
    return RoundingReport(
      layers: report.layers.map {
        RoundedLayer(
          name: $0.layer, weight: $0.weight, bits: $0.bits, noiseBefore: $0.before,
          noiseAfter: $0.after, kept: $0.kept)
      })
  }
}
