// SPDX-License-Identifier: Apache-2.0
// Exports: simulations and their calibration.

import CHalfstep
import Halfstep

/// Behind `hs_simulation`: a simulation, and what was lent from it.
final class SimulationHandle: LendsBytes {
  let simulation: QuantizationSimModel
  var pending: PendingBytes = PendingBytes()
  private var lentQuantizers: LentList<hs_quantizer>?
  private var lentEncodings: [String: LentList<hs_encoding>] = [:]
  private var lentProposal: LentList<hs_encoding>?

  init(_ simulation: QuantizationSimModel) { self.simulation = simulation }

  /// Ends all loans: the simulation is about to change.
  func changed() {
    pending.clear()
    lentQuantizers = nil
    lentEncodings = [:]
    lentProposal = nil
  }

  func parameterEncoding(
    for values: Tensor, of tensor: String
  ) throws(HalfstepError) -> hs_encoding {
    let list = LentList(
      [try simulation.parameterEncoding(for: values, of: tensor)], hs_encoding.init)
    lentProposal = list
    return list.items[0]
  }

  var quantizers: [hs_quantizer] {
    let list =
      lentQuantizers
      ?? LentList(simulation.quantizers) { quantizer, memory in
        hs_quantizer(
          tensor: memory.string(quantizer.tensor), tied_to: memory.string(quantizer.tiedTo),
          role: hs_quantizer_role(
            quantizer.isParameter ? HS_QUANTIZER_ROLE_PARAMETER : HS_QUANTIZER_ROLE_ACTIVATION),
          bits: Int32(quantizer.spec.bits), is_symmetric: quantizer.spec.isSymmetric ? 1 : 0,
          is_enabled: quantizer.isEnabled ? 1 : 0, is_frozen: quantizer.isFrozen ? 1 : 0,
          has_encoding: quantizer.encoding == nil ? 0 : 1)
      }
    lentQuantizers = list
    return list.items
  }

  func encoding(of tensor: String) throws(HalfstepError) -> hs_encoding {
    if let list = lentEncodings[tensor] { return list.items[0] }
    let list = LentList([try simulation.encoding(of: tensor)], hs_encoding.init)
    lentEncodings[tensor] = list
    return list.items[0]
  }
}

// MARK: - Life

@_cdecl("hs_simulation_options_init") @implementation
public func hs_simulation_options_init(_ options: UnsafeMutablePointer<hs_simulation_options>?) {
  options?.pointee = hs_simulation_options()
  options?.pointee.struct_size = MemoryLayout<hs_simulation_options>.size
}

@_cdecl("hs_simulation_create") @implementation
public func hs_simulation_create(
  _ model: OpaquePointer?, _ options: UnsafePointer<hs_simulation_options>?,
  _ outSimulation: UnsafeMutablePointer<OpaquePointer?>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outSimulation?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(model, "model", as: ModelHandle.self)
    let options = try HalfstepC.options(options, hs_simulation_options())
    let out = try required(outSimulation, "out_simulation")
    var configuration: String?
    if let name = options.configuration { configuration = try text(name, "configuration") }
    let simulation = try QuantizationSimModel(
      handle.model,
      parameterBits: options.parameter_bits == 0 ? 8 : Int(options.parameter_bits),
      activationBits: options.activation_bits == 0 ? 8 : Int(options.activation_bits),
      scheme: try rangeScheme(options.scheme, options.percentile), configuration: configuration,
      excludedLayers: try texts(
        options.excluded_layers, options.excluded_layer_count, "excluded_layers"),
      parameterBlockSize: options.block_size == 0 ? nil : Int(options.block_size))
    out.pointee = handOver(SimulationHandle(simulation))
  }
}

/// The scheme of a number.
func rangeScheme(
  _ scheme: hs_range_scheme, _ percentile: Double
) throws(HalfstepError) -> RangeScheme {
  switch Int(scheme) {
  case HS_RANGE_SCHEME_MIN_MAX: return .minMax
  case HS_RANGE_SCHEME_SQNR: return .sqnr
  case HS_RANGE_SCHEME_PERCENTILE: return .percentile(percentile == 0 ? 100 : percentile)
  case HS_RANGE_SCHEME_MSE: return .mse
  case HS_RANGE_SCHEME_ENTROPY: return .entropy
  default: throw HalfstepError(.unknownName, "unknown range scheme \(scheme)")
  }
}

@_cdecl("hs_simulation_free") @implementation
public func hs_simulation_free(_ simulation: OpaquePointer?) { release(simulation) }

// MARK: - Calibration

@_cdecl("hs_simulation_observe") @implementation
public func hs_simulation_observe(
  _ simulation: OpaquePointer?, _ names: UnsafePointer<UnsafePointer<CChar>?>?,
  _ values: UnsafePointer<hs_tensor_view>?, _ count: Int, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let handle = try object(simulation, "simulation", as: SimulationHandle.self)
    let inputs = try HalfstepC.inputs(names, values, count)
    handle.pending.clear()
    try handle.simulation.observe(inputs)
  }
}

@_cdecl("hs_simulation_observe_value") @implementation
public func hs_simulation_observe_value(
  _ simulation: OpaquePointer?, _ tensor: UnsafePointer<CChar>?,
  _ value: UnsafePointer<hs_tensor_view>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let handle = try object(simulation, "simulation", as: SimulationHandle.self)
    let tensor = try text(tensor, "tensor")
    let view = try required(value, "value").pointee
    handle.pending.clear()
    try handle.simulation.observe(try Tensor(viewing: view, tensor), of: tensor)
  }
}

@_cdecl("hs_simulation_reset_statistics") @implementation
public func hs_simulation_reset_statistics(
  _ simulation: OpaquePointer?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let handle = try object(simulation, "simulation", as: SimulationHandle.self)
    handle.pending.clear()
    handle.simulation.resetStatistics()
  }
}

@_cdecl("hs_simulation_compute_encodings") @implementation
public func hs_simulation_compute_encodings(
  _ simulation: OpaquePointer?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let handle = try object(simulation, "simulation", as: SimulationHandle.self)
    handle.changed()
    try handle.simulation.computeEncodings()
  }
}

@_cdecl("hs_calibration_options_init") @implementation
public func hs_calibration_options_init(_ options: UnsafeMutablePointer<hs_calibration_options>?) {
  options?.pointee = hs_calibration_options()
  options?.pointee.struct_size = MemoryLayout<hs_calibration_options>.size
}

@_cdecl("hs_simulation_calibrate") @implementation
public func hs_simulation_calibrate(
  _ simulation: OpaquePointer?, _ names: UnsafePointer<UnsafePointer<CChar>?>?,
  _ values: UnsafePointer<hs_tensor_view>?, _ count: Int,
  _ options: UnsafePointer<hs_calibration_options>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let handle = try object(simulation, "simulation", as: SimulationHandle.self)
    let options = try HalfstepC.options(options, hs_calibration_options())
    let inputs = try HalfstepC.inputs(names, values, count)
    let batchSize = try length(options.batch_size, "batch_size")
    handle.changed()
    try handle.simulation.computeEncodings(
      data: inputs, batchSize: batchSize == 0 ? 8 : batchSize,
      progress: options.progress.map { call in { call($0, $1, options.user_data) == 0 } })
  }
}

@_cdecl("hs_simulation_run") @implementation
public func hs_simulation_run(
  _ simulation: OpaquePointer?, _ names: UnsafePointer<UnsafePointer<CChar>?>?,
  _ values: UnsafePointer<hs_tensor_view>?, _ count: Int,
  _ options: UnsafePointer<hs_run_options>?, _ outOutputs: UnsafeMutablePointer<OpaquePointer?>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outOutputs?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(simulation, "simulation", as: SimulationHandle.self)
    let extra = try HalfstepC.options(options, hs_run_options()).extraOutputs
    let inputs = try HalfstepC.inputs(names, values, count)
    let out = try required(outOutputs, "out_outputs")
    out.pointee = handOver(TensorsHandle(try handle.simulation.run(inputs, extraOutputs: extra)))
  }
}

// MARK: - Statistics

@_cdecl("hs_simulation_statistics_size") @implementation
public func hs_simulation_statistics_size(
  _ simulation: OpaquePointer?, _ outSize: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  pendingSize(
    simulation, "simulation", outSize, error, key: { "statistics" },
    make: { (handle: SimulationHandle, _) throws(HalfstepError) in
      try handle.simulation.serializedStatistics()
    })
}

@_cdecl("hs_simulation_serialize_statistics") @implementation
public func hs_simulation_serialize_statistics(
  _ simulation: OpaquePointer?, _ buffer: UnsafeMutableRawPointer?, _ capacity: Int,
  _ outSize: UnsafeMutablePointer<Int>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  pendingCopy(
    simulation, "simulation", to: buffer, capacity, outSize, error, key: { "statistics" },
    make: { (handle: SimulationHandle, _) throws(HalfstepError) in
      try handle.simulation.serializedStatistics()
    })
}

@_cdecl("hs_simulation_merge_statistics") @implementation
public func hs_simulation_merge_statistics(
  _ simulation: OpaquePointer?, _ data: UnsafeRawPointer?, _ size: Int,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let handle = try object(simulation, "simulation", as: SimulationHandle.self)
    let bytes = try bytes(data, size)
    handle.pending.clear()
    try handle.simulation.mergeStatistics(bytes)
  }
}

/// Copies the bytes of an argument.
func bytes(_ data: UnsafeRawPointer?, _ size: Int) throws(HalfstepError) -> [UInt8] {
  let start = try required(data, "data")
  return Array(UnsafeRawBufferPointer(start: start, count: try length(size, "size")))
}
