// SPDX-License-Identifier: Apache-2.0
// Simulates a network on integer hardware.

import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import OrderedCollections

/// Simulates a network on integer hardware: places quantizers, calibrates them, runs the result.
///
/// Constants get their grids when the simulation is made, activations from the data that `observe`
/// sees: it runs the network with quantized weights and float activations. Tensors of a tie group
/// share one grid, chosen from what all of them saw. Not safe for concurrent use.
package final class QuantizationSimulation {
  package struct Options: Sendable {
    package var parameterBits = 8
    package var activationBits = 8
    package var scheme: RangeScheme = .minMax
    /// Input channels that share a scale in weights that are quantized per channel; nil for all.
    package var parameterBlockSize: Int?
    /// Names or labels of nodes that stay unquantized.
    package var excludedLayers: [String] = []
    /// Whether weights that were rounded keep the grids that they were rounded to.
    package var usesWeightEncodings = true
    package init() {}
  }

  /// A quantizer as it is now; `placement` holds what the configuration made it.
  package struct Quantizer: Sendable {
    /// What it is asked to be, with the bounds it is held to.
    package internal(set) var site: QuantizerSite
    /// Whether it takes part; a disabled one passes values through.
    package internal(set) var isEnabled = true
    /// Whether its grid may not change.
    package internal(set) var isFrozen = false
    /// Its grid; nil until it is known.
    package internal(set) var encoding: Encoding?
    /// Whether the tensor is a constant of the graph.
    package let isConstant: Bool
  }

  package let graph: Graph
  package let placement: Placement
  package let options: Options
  let arguments: QuantizerArguments
  /// Every quantizer, in the order in which the graph defines the tensors.
  package internal(set) var quantizers: OrderedDictionary<String, Quantizer>

  /// Constants under quantizers, by name.
  let constants: [String: Tensor]
  /// Parameters rounded to their grids, as far as somebody ran the network with them.
  var roundedParameters: [String: Tensor] = [:]
  /// What the observed activations saw, by tensor, in graph order.
  var statistics: OrderedDictionary<String, RangeStatistics> = [:]

  private var calibration: (session: Session, observer: CalibrationObserver)?
  private var simulation: (session: Session, extraOutputs: [String])?

  /// Places quantizers and computes the encodings of constants.
  ///
  /// - Throws: What `Placement.make` throws; `HalfstepError.nonFiniteValue` naming the initializer.
  package init(
    graph: Graph, configuration: RuntimeConfiguration, options: Options = Options()
  ) throws(HalfstepError) {
    try Self.checkParameters(of: graph)
    let placement = try Placement.make(
      for: graph, configuration: configuration, parameterBits: options.parameterBits,
      activationBits: options.activationBits, parameterBlockSize: options.parameterBlockSize,
      excluding: Set(options.excludedLayers))
    self.graph = graph
    self.placement = placement
    self.options = options
    self.arguments = QuantizerArguments(
      activationBits: options.activationBits, parameterBits: options.parameterBits,
      isSymmetric: configuration.parametersSymmetric ?? false,
      isPerChannel: configuration.isPerChannel
        || configuration.operators.values.contains { $0.isPerChannel == true },
      scheme: options.scheme.fileName)

    var constants: [String: Tensor] = [:]
    for node in graph.nodes {
      if let value = node.constantValue, placement.sites[node.outputs[0]] != nil {
        constants[node.outputs[0]] = value
      }
    }
    for name in placement.sites.keys {
      if let value = graph.initializers[name] { constants[name] = value }
    }
    self.constants = constants
    self.quantizers = [:]
    for (name, site) in placement.sites {
      quantizers[name] = Quantizer(site: site, isConstant: constants[name] != nil)
    }
    for (name, quantizer) in quantizers where quantizer.site.role == .parameter {
      try computeParameterEncoding(name)
    }
    if options.usesWeightEncodings { try adoptWeightEncodings() }
    resetStatistics()
  }

  // MARK: Calibration

  /// Runs one batch with quantized weights and float activations and remembers activation ranges.
  ///
  /// On an error (wrong shape, NaN in the data) the statistics stay as they were.
  ///
  /// - Parameter inputs: The graph's inputs by name.
  /// - Throws: `HalfstepError.nonFiniteValue` naming the first tensor with a NaN or an infinity; what
  ///   `Session` throws.
  package func observe(_ inputs: [String: Tensor]) throws(HalfstepError) {
    let (session, observer) = try calibrationSession()
    observer.begin()
    _ = try session.run(inputs, observer: observer)
    if let tensor = observer.nonFinite {
      throw HalfstepError(
        .nonFiniteValue, "calibration: tensor '\(tensor)' holds a NaN or an infinity")
    }
    // A merge can fail only for its count; find out before anything changes.
    for (index, tensor) in observer.tensors.enumerated() {
      let (sum, overflow) = (statistics[tensor]?.count ?? 0).addingReportingOverflow(
        observer.batch[index].count)
      guard !overflow, sum < Self.countLimit else {
        throw HalfstepError(
          .numericFailure, "calibration: tensor '\(tensor)' has seen more than 2^62 values")
      }
    }
    for (index, tensor) in observer.tensors.enumerated() {
      try statistics[tensor]?.merge(observer.batch[index])
    }
    observer.end()
  }

  /// Remembers the values of one tensor of a run that was made elsewhere, such as in PyTorch.
  ///
  /// Values of a tensor whose quantizer is off are let go.
  ///
  /// - Parameters:
  ///   - values: What the tensor held, before quantization; float32, any shape.
  ///   - tensor: A computed tensor that has a quantizer.
  /// - Throws: `HalfstepError.unknownName` if the tensor has no quantizer; `.invalidArgument` if it is
  ///   a constant; `.typeMismatch` unless float32; `.nonFiniteValue`. Nothing changes then.
  package func observe(_ values: Tensor, of tensor: String) throws(HalfstepError) {
    guard let quantizer = quantizers[tensor] else {
      throw HalfstepError(.unknownName, "tensor '\(tensor)' has no quantizer")
    }
    guard let before = statistics[tensor] else {
      throw HalfstepError(
        .invalidArgument, "tensor '\(tensor)' is a constant; its values are known")
    }
    guard values.dataType == .float32 else {
      throw HalfstepError(
        .typeMismatch, "tensor '\(tensor)': expected float32 values, got \(values.dataType)")
    }
    guard quantizer.isEnabled else { return }
    var seen = RangeStatistics(keepsHistogram: options.scheme.needsHistogram)
    try values.withFloats { (values) throws(HalfstepError) in seen.observe(values) }
    guard !seen.sawNonFinite else {
      throw HalfstepError(
        .nonFiniteValue, "calibration: tensor '\(tensor)' holds a NaN or an infinity")
    }
    var merged = before
    try merged.merge(seen)
    statistics[tensor] = merged
  }

  /// Values that statistics may count.
  private static let countLimit: UInt64 = 1 << 62

  /// Forgets the activation statistics.
  package func resetStatistics() {
    statistics = [:]
    for (name, quantizer) in quantizers
    where quantizer.site.role == .activation && !quantizer.isConstant {
      statistics[name] = RangeStatistics(keepsHistogram: options.scheme.needsHistogram)
    }
  }

  private func calibrationSession() throws(HalfstepError) -> (Session, CalibrationObserver) {
    if let calibration { return calibration }
    let tensors = Array(statistics.keys).filter { quantizers[$0]?.isEnabled ?? false }
    let session = try Session(
      graph: try graph.replacingConstants(try roundParameters()), observed: Set(tensors))
    let observer = CalibrationObserver(
      tensors, keepsHistogram: options.scheme.needsHistogram)
    calibration = (session, observer)
    return (session, observer)
  }

  /// Chooses the activation grids from what was observed.
  ///
  /// Frozen quantizers keep their grids. Nothing changes on an error.
  ///
  /// - Throws: `HalfstepError.emptyStatistics` naming tensors that no data has reached.
  package func computeEncodings() throws(HalfstepError) {
    var searches: [(leader: String, site: QuantizerSite, seen: RangeStatistics)] = []
    var unreached: [String] = []
    for (leader, members) in tieGroups() {
      guard let first = quantizers[members[0]], !members.contains(where: { isFrozen($0) }) else {
        continue
      }
      let seen = try mergedStatistics(members)
      if seen.isEmpty && !first.site.isFullyFixed {
        unreached.append(leader)
        continue
      }
      searches.append((leader, first.site, seen))
    }
    if !unreached.isEmpty {
      let shown = unreached.prefix(5).map { "'\($0)'" }.joined(separator: ", ")
      throw HalfstepError(
        .emptyStatistics,
        "calibration: no data has reached \(unreached.count) quantizer(s): \(shown)"
          + (unreached.count > 5 ? ", …" : ""))
    }
    let chosen = try chooseEncodings(searches)
    for (name, quantizer) in quantizers {
      if quantizer.isEnabled, let encoding = chosen[quantizer.site.tieLeader],
        quantizer.site.role == .activation
      {
        quantizers[name]?.encoding = encoding
      }
    }
    // The calibrated weights are rarely needed again; a later `observe` makes them anew.
    invalidate(calibration: true)
  }

  // MARK: Simulation

  /// Runs the simulated network; `extraOutputs` names tensors to return besides the outputs.
  ///
  /// - Throws: `HalfstepError.invalidState` before encodings were computed or loaded; what `Session`
  ///   throws.
  package func run(
    _ inputs: [String: Tensor], extraOutputs: [String] = []
  ) throws(HalfstepError) -> OrderedDictionary<String, Tensor> {
    if simulation == nil || simulation?.extraOutputs != extraOutputs {
      simulation = nil
      simulation = (try makeSimulation(extraOutputs: extraOutputs), extraOutputs)
    }
    guard let session = simulation?.session else {
      throw HalfstepError(.internalError, "simulation: session is missing")
    }
    return try session.run(inputs)
  }

  /// A session with every grid in place.
  func makeSimulation(extraOutputs: [String]) throws(HalfstepError) -> Session {
    try checkComplete()
    var rounded = try roundParameters()
    var quantized: [String: Encoding] = [:]
    for (name, quantizer) in quantizers where quantizer.isEnabled {
      guard quantizer.site.role == .activation, let encoding = quantizer.encoding else { continue }
      if let constant = constants[name] {
        rounded[name] = try encoding.fakeQuantize(constant)
      } else {
        quantized[name] = encoding
      }
    }
    return try Session(
      graph: try graph.replacingConstants(rounded), quantized: quantized,
      extraOutputs: extraOutputs)
  }

  /// Refuses to go on while an enabled quantizer has no grid.
  func checkComplete() throws(HalfstepError) {
    if let (name, _) = quantizers.first(where: { $1.isEnabled && $1.encoding == nil }) {
      throw HalfstepError(
        .invalidState,
        "quantizer of '\(name)' has no encoding; compute or load encodings first")
    }
  }

  /// Drops sessions that no longer fit.
  func invalidate(calibration dropsCalibration: Bool) {
    simulation = nil
    if dropsCalibration { calibration = nil }
  }
}
