// SPDX-License-Identifier: Apache-2.0
// Exports: single quantizers of a simulation.

import CHalfstep
import Halfstep

@_cdecl("hs_simulation_quantizer_count") @implementation
public func hs_simulation_quantizer_count(
  _ simulation: OpaquePointer?, _ outCount: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  count(outCount, error) { () throws(HalfstepError) in
    try object(simulation, "simulation", as: SimulationHandle.self).quantizers.count
  }
}

@_cdecl("hs_simulation_quantizer") @implementation
public func hs_simulation_quantizer(
  _ simulation: OpaquePointer?, _ index: Int, _ outQuantizer: UnsafeMutablePointer<hs_quantizer>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  item(outQuantizer, hs_quantizer(), "out_quantizer", index, error) { () throws(HalfstepError) in
    try object(simulation, "simulation", as: SimulationHandle.self).quantizers
  }
}

@_cdecl("hs_simulation_encoding") @implementation
public func hs_simulation_encoding(
  _ simulation: OpaquePointer?, _ tensor: UnsafePointer<CChar>?,
  _ outEncoding: UnsafeMutablePointer<hs_encoding>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outEncoding?.pointee = hs_encoding()
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(simulation, "simulation", as: SimulationHandle.self)
    let tensor = try text(tensor, "tensor")
    try required(outEncoding, "out_encoding").pointee = try handle.encoding(of: tensor)
  }
}

@_cdecl("hs_simulation_parameter_encoding") @implementation
public func hs_simulation_parameter_encoding(
  _ simulation: OpaquePointer?, _ tensor: UnsafePointer<CChar>?,
  _ value: UnsafePointer<hs_tensor_view>?, _ outEncoding: UnsafeMutablePointer<hs_encoding>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outEncoding?.pointee = hs_encoding()
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(simulation, "simulation", as: SimulationHandle.self)
    let tensor = try text(tensor, "tensor")
    let view = try required(value, "value").pointee
    let out = try required(outEncoding, "out_encoding")
    out.pointee = try handle.parameterEncoding(
      for: try Tensor(viewing: view, tensor), of: tensor)
  }
}

// MARK: - Control

/// Runs a change of one tensor's quantizer.
private func change(
  _ simulation: OpaquePointer?, _ tensor: UnsafePointer<CChar>?,
  _ error: UnsafeMutablePointer<hs_error>?,
  _ body: (QuantizationSimModel, String) throws(HalfstepError) -> Void
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let handle = try object(simulation, "simulation", as: SimulationHandle.self)
    let tensor = try text(tensor, "tensor")
    handle.changed()
    try body(handle.simulation, tensor)
  }
}

@_cdecl("hs_simulation_set_enabled") @implementation
public func hs_simulation_set_enabled(
  _ simulation: OpaquePointer?, _ tensor: UnsafePointer<CChar>?, _ isEnabled: Int32,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  change(simulation, tensor, error) { (simulation, tensor) throws(HalfstepError) in
    try simulation.setEnabled(isEnabled != 0, for: tensor)
  }
}

@_cdecl("hs_simulation_set_frozen") @implementation
public func hs_simulation_set_frozen(
  _ simulation: OpaquePointer?, _ tensor: UnsafePointer<CChar>?, _ isFrozen: Int32,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  change(simulation, tensor, error) { (simulation, tensor) throws(HalfstepError) in
    try simulation.setFrozen(isFrozen != 0, for: tensor)
  }
}

@_cdecl("hs_simulation_set_encoding") @implementation
public func hs_simulation_set_encoding(
  _ simulation: OpaquePointer?, _ tensor: UnsafePointer<CChar>?,
  _ encoding: UnsafePointer<hs_encoding>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  // Read before the change ends the loan of an encoding that is a tensor's own.
  var copy: Encoding?
  let status = report(to: error) { () throws(HalfstepError) in
    copy = try Encoding(try required(encoding, "encoding").pointee)
  }
  guard let copy else { return status }
  return change(simulation, tensor, error) { (simulation, tensor) throws(HalfstepError) in
    try simulation.setEncoding(copy, for: tensor)
  }
}

@_cdecl("hs_simulation_set_precision") @implementation
public func hs_simulation_set_precision(
  _ simulation: OpaquePointer?, _ tensor: UnsafePointer<CChar>?, _ bits: Int32,
  _ isSymmetric: Int32, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  change(simulation, tensor, error) { (simulation, tensor) throws(HalfstepError) in
    guard (-1...1).contains(isSymmetric) else {
      throw HalfstepError(.invalidArgument, "is_symmetric: expected -1, 0 or 1, got \(isSymmetric)")
    }
    var spec = try simulation.quantizer(of: tensor).spec
    if bits != 0 { spec.bits = Int(bits) }
    if isSymmetric >= 0 { spec.isSymmetric = isSymmetric == 1 }
    try simulation.setSpec(spec, for: tensor)
  }
}

@_cdecl("hs_simulation_set_range") @implementation
public func hs_simulation_set_range(
  _ simulation: OpaquePointer?, _ tensor: UnsafePointer<CChar>?, _ minimum: Double,
  _ maximum: Double, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  change(simulation, tensor, error) { (simulation, tensor) throws(HalfstepError) in
    try simulation.setRange(
      minimum: minimum.isNaN ? nil : minimum, maximum: maximum.isNaN ? nil : maximum, for: tensor)
  }
}
