// SPDX-License-Identifier: Apache-2.0
// A network simulated on integer hardware, as users hold it.

import HalfstepAlgorithms
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics

/// A network simulated on integer hardware: quantizers are placed, calibrated, and take part in runs.
///
/// Not safe for concurrent use: one simulation is used by one thread at a time.
///
///     let sim = try QuantizationSimModel(model)
///     try sim.computeEncodings(over: batches)
///     let outputs = try sim.run(["input": image])
///     try sim.export(to: "out", prefix: "net")
public final class QuantizationSimModel {
  package let simulation: QuantizationSimulation

  /// Places quantizers in a network and chooses the grids of its constants.
  ///
  /// - Parameters:
  ///   - model: The network; weights are shared, later changes of the model do not reach this.
  ///   - parameterBits: Width of constants, 2...16; default 8.
  ///   - activationBits: Width of computed tensors, 2...16; default 8.
  ///   - scheme: How ranges are chosen; default `.minMax`.
  ///   - configuration: A built-in runtime configuration by name or the path of a JSON file; nil (the
  ///     default) means `default_per_channel`, and `default` is per tensor.
  ///   - excludedLayers: Names of nodes that stay unquantized; default none.
  ///   - parameterBlockSize: Input channels that share a scale, 1 or more, in weights of convolutions,
  ///     Gemm and MatMul that the configuration quantizes per channel; nil (the default) for all of a
  ///     channel. The last block of a channel may be smaller.
  /// - Throws: `HalfstepError.invalidArgument` for widths or a block size; `.unknownName` or `.invalidConfiguration`
  ///   for the configuration; `.nonFiniteValue` for weights; `.unsupportedOperator`.
  public init(
    _ model: Model, parameterBits: Int = 8, activationBits: Int = 8, scheme: RangeScheme = .minMax,
    configuration: String? = nil, excludedLayers: [String] = [], parameterBlockSize: Int? = nil
  ) throws(HalfstepError) {
    for (bits, what) in [(parameterBits, "parameter"), (activationBits, "activation")] {
      guard QuantizerSpec.bitRange.contains(bits) else {
        throw HalfstepError(.invalidArgument, "\(what) bits: expected 2...16, got \(bits)")
      }
    }
    if case .percentile(let share) = scheme, !(50...100).contains(share) {
      throw HalfstepError(.invalidArgument, "percentile: expected 50...100, got \(share)")
    }
    var options = QuantizationSimulation.Options()
    options.parameterBits = parameterBits
    options.activationBits = activationBits
    options.scheme = scheme
    options.excludedLayers = excludedLayers
    options.parameterBlockSize = parameterBlockSize
    let loaded = try RuntimeConfigurationFile.load(
      nameOrPath: configuration ?? Self.defaultConfiguration)
    simulation = try QuantizationSimulation(
      graph: model.graph, configuration: loaded, options: options)
  }

  /// Configuration that is used if none is named.
  public static let defaultConfiguration: String = "default_per_channel"
  /// Names of the built-in configurations.
  public static var builtInConfigurations: [String] { RuntimeConfigurationFile.builtInNames }

  /// The network in float32, as it was when the simulation was made.
  public var model: Model { Model(graph: simulation.graph) }

  // MARK: Calibration

  /// Forgets what was observed, observes batches, and chooses the grids of computed tensors.
  ///
  /// Constants are quantized while the data runs through, computed tensors are not. The result does
  /// not depend on how the data is cut into batches or in which order they come.
  ///
  /// - Parameters:
  ///   - batches: Values of the network's inputs, one dictionary a batch.
  ///   - progress: Told how many batches are done after each; false cancels.
  /// - Throws: `HalfstepError.cancelled`; `.emptyStatistics` without batches; `.shapeMismatch`,
  ///   `.unknownName`, `.nonFiniteValue` for the data. Statistics and encodings are then unchanged.
  public func computeEncodings(
    over batches: some Sequence<[String: Tensor]>, progress: ((_ completed: Int) -> Bool)? = nil
  ) throws(HalfstepError) {
    var iterator = batches.makeIterator()
    try calibrate({ () throws(HalfstepError) in iterator.next() }, progress: progress)
  }

  /// Forgets what was observed, observes data batch by batch, and chooses the grids.
  ///
  /// - Parameters:
  ///   - data: Values of the network's inputs, all with the same number of rows, `[N, …]`.
  ///   - batchSize: Rows a batch, 1 or more; default 8.
  ///   - progress: Told how many batches of how many are done after each; false cancels.
  /// - Throws: As `computeEncodings(over:progress:)`, and `HalfstepError.invalidArgument` for a batch
  ///   size below 1 or data without rows.
  public func computeEncodings(
    data: [String: Tensor], batchSize: Int = 8,
    progress: ((_ completed: Int, _ total: Int) -> Bool)? = nil
  ) throws(HalfstepError) {
    let batches = try BatchSequence(data, batchSize: batchSize)
    var next = 0
    try calibrate(
      { () throws(HalfstepError) -> [String: Tensor]? in
        guard next < batches.count else { return nil }
        next += 1
        return try batches.batch(next - 1)
      }, progress: progress.map { report in { report($0, batches.count) } })
  }

  private func calibrate(
    _ next: () throws(HalfstepError) -> [String: Tensor]?, progress: ((Int) -> Bool)?
  ) throws(HalfstepError) {
    let before = try simulation.serializedStatistics()
    simulation.resetStatistics()
    do throws(HalfstepError) {
      var completed = 0
      while let batch = try next() {
        try simulation.observe(batch)
        completed += 1
        if let progress, !progress(completed) {
          throw HalfstepError(.cancelled, "calibration was cancelled after batch \(completed)")
        }
      }
      try simulation.computeEncodings()
    } catch {
      simulation.resetStatistics()
      try simulation.mergeStatistics(before)
      throw error
    }
  }

  /// Runs one batch with quantized constants and remembers the ranges of computed tensors.
  ///
  /// For calibration that spreads over processes; follow with `computeEncodings()`.
  ///
  /// - Parameter inputs: Values of the network's inputs.
  /// - Throws: `HalfstepError.unknownName`, `.shapeMismatch`, `.nonFiniteValue`; the statistics are
  ///   then unchanged.
  public func observe(_ inputs: [String: Tensor]) throws(HalfstepError) {
    try simulation.observe(inputs)
  }

  /// Remembers the values of one tensor of a run that was made elsewhere, such as in PyTorch.
  ///
  /// Values of a tensor whose quantizer is off are let go.
  ///
  /// - Parameters:
  ///   - values: What the tensor held, before quantization; float32, any shape.
  ///   - tensor: A computed tensor that has a quantizer.
  /// - Throws: `HalfstepError.unknownName` if the tensor has no quantizer; `.invalidArgument` if it is
  ///   a constant; `.typeMismatch` unless float32; `.nonFiniteValue`. The statistics are then
  ///   unchanged.
  public func observe(_ values: Tensor, of tensor: String) throws(HalfstepError) {
    try simulation.observe(values, of: tensor)
  }

  /// Chooses the grids of computed tensors from what was observed.
  ///
  /// - Throws: `HalfstepError.emptyStatistics` if nothing was; encodings are then unchanged.
  public func computeEncodings() throws(HalfstepError) { try simulation.computeEncodings() }

  /// Forgets what was observed; encodings stay.
  public func resetStatistics() { simulation.resetStatistics() }

  /// Everything observed so far, to be merged elsewhere.
  public func serializedStatistics() throws(HalfstepError) -> [UInt8] {
    try simulation.serializedStatistics()
  }

  /// Adds what another simulation of the same network observed; the order does not matter.
  ///
  /// - Parameter bytes: What `serializedStatistics()` gave.
  /// - Throws: `HalfstepError.malformedFile`; the statistics are then unchanged.
  public func mergeStatistics(_ bytes: [UInt8]) throws(HalfstepError) {
    try simulation.mergeStatistics(bytes)
  }

  // MARK: Running

  /// Runs the simulated network.
  ///
  /// - Parameters:
  ///   - inputs: Values of the network's inputs.
  ///   - extraOutputs: Tensors to give back besides the outputs; default none.
  /// - Returns: The outputs, then the extra outputs.
  /// - Throws: `HalfstepError.invalidState` before there are encodings; `.unknownName`,
  ///   `.shapeMismatch`, `.typeMismatch`, `.invalidArgument` for the inputs.
  public func run(
    _ inputs: [String: Tensor], extraOutputs: [String] = []
  ) throws(HalfstepError) -> NamedTensors {
    NamedTensors(try simulation.run(inputs, extraOutputs: extraOutputs).owned())
  }
}
