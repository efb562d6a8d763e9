// SPDX-License-Identifier: Apache-2.0
// Exports: rounding and bias correction.

import CHalfstep
import Halfstep

@_cdecl("hs_rounding_options_init") @implementation
public func hs_rounding_options_init(_ options: UnsafeMutablePointer<hs_rounding_options>?) {
  options?.pointee = hs_rounding_options()
  options?.pointee.struct_size = MemoryLayout<hs_rounding_options>.size
}

@_cdecl("hs_model_adaround") @implementation
public func hs_model_adaround(
  _ model: OpaquePointer?, _ names: UnsafePointer<UnsafePointer<CChar>?>?,
  _ values: UnsafePointer<hs_tensor_view>?, _ count: Int,
  _ options: UnsafePointer<hs_rounding_options>?,
  _ outReport: UnsafeMutablePointer<OpaquePointer?>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outReport?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(model, "model", as: ModelHandle.self)
    let given = try HalfstepC.options(options, hs_rounding_options())
    let data = try roundingData(names, values, count)
    let result = try handle.model.adaround(
      data: data, options: try given.values(defaultBits: 4), progress: given.tell,
      details: given.tellDetails)
    outReport?.pointee = handOver(list(result))
  }
}

@_cdecl("hs_model_correct_biases") @implementation
public func hs_model_correct_biases(
  _ model: OpaquePointer?, _ names: UnsafePointer<UnsafePointer<CChar>?>?,
  _ values: UnsafePointer<hs_tensor_view>?, _ count: Int,
  _ options: UnsafePointer<hs_rounding_options>?,
  _ outReport: UnsafeMutablePointer<OpaquePointer?>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outReport?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(model, "model", as: ModelHandle.self)
    let given = try HalfstepC.options(options, hs_rounding_options())
    let data = try roundingData(names, values, count)
    let result = try handle.model.correctBiases(
      data: data, options: try given.values(defaultBits: 8), progress: given.tell,
      details: given.tellDetails)
    outReport?.pointee = handOver(list(result))
  }
}

/// The data; nil if a caller gave none at all.
private func roundingData(
  _ names: UnsafePointer<UnsafePointer<CChar>?>?, _ values: UnsafePointer<hs_tensor_view>?,
  _ count: Int
) throws(HalfstepError) -> [String: Tensor]? {
  if names == nil && values == nil && count == 0 { return nil }
  return try HalfstepC.inputs(names, values, count)
}

private func list(_ report: RoundingReport) -> LentList<hs_rounded_layer> {
  LentList(report.layers) { layer, memory in
    hs_rounded_layer(
      layer: memory.string(layer.name), weight: memory.string(layer.weight),
      kept: memory.string(layer.kept), noise_before: layer.noiseBefore,
      noise_after: layer.noiseAfter, bits: Int32(layer.bits), reserved: 0)
  }
}

extension hs_rounding_options {
  fileprivate func values(defaultBits: Int) throws(HalfstepError) -> RoundingOptions {
    var options = RoundingOptions()
    switch Int(method) {
    case HS_ROUNDING_AUTO: options.method = .auto
    case HS_ROUNDING_GRAM: options.method = .gram
    case HS_ROUNDING_GRADIENT: options.method = .gradient
    case HS_ROUNDING_SEQUENTIAL_MSE: options.method = .sequentialMSE
    default: throw HalfstepError(.unknownName, "unknown rounding method \(method)")
    }
    options.parameterBits = parameter_bits == 0 ? defaultBits : Int(parameter_bits)
    switch activation_bits {
    case 0: options.activationBits = 8
    case 32: options.activationBits = nil
    default: options.activationBits = Int(activation_bits)
    }
    options.scheme = try HalfstepC.rangeScheme(scheme, percentile)
    if let name = configuration { options.configuration = try text(name, "configuration") }
    options.excludedLayers = try texts(excluded_layers, excluded_layer_count, "excluded_layers")
    if maximum_rows != 0 { options.maximumRows = try length(maximum_rows, "maximum_rows") }
    if maximum_bytes != 0 { options.maximumBytes = try length(maximum_bytes, "maximum_bytes") }
    if block_size != 0 { options.parameterBlockSize = Int(block_size) }
    options.seed = seed
    options.isFloorOrCeil = floor_or_ceil != 0
    if iterations != 0 { options.iterations = Int(iterations) }
    // Zero means the default, so that none is a negative number.
    if regularization != 0 { options.regularization = max(regularization, 0) }
    if beta_start != 0 { options.betaStart = beta_start }
    if beta_end != 0 { options.betaEnd = beta_end }
    if warm_start != 0 { options.warmStart = max(warm_start, 0) }
    if candidates != 0 { options.candidates = Int(candidates) }
    let names = try texts(width_layers, width_count, "width_layers")
    if !names.isEmpty {
      guard let widths else {
        throw HalfstepError(.invalidArgument, "widths: expected \(names.count) numbers, got NULL")
      }
      for (index, name) in names.enumerated() {
        let bits = Int(widths[index])
        guard options.layerBits.updateValue(bits, forKey: name) ?? bits == bits else {
          throw HalfstepError(.invalidArgument, "width_layers: '\(name)' is there twice")
        }
      }
    }
    if let folder = cache { options.cacheFolder = try text(folder, "cache") }
    return options
  }

  fileprivate var tell: ((Int, Int) -> Bool)? {
    progress.map { call in { call($0, $1, user_data) == 0 } }
  }

  fileprivate var tellDetails: ((RoundingProgress) -> Bool)? {
    details.map { call in
      { state in
        state.layer.withCString { layer in
          var lent = hs_rounding_progress(
            layer: layer, completed: state.completed, total: state.total, fraction: state.fraction,
            seconds_left: state.secondsLeft ?? -1)
          return call(&lent, user_data) == 0
        }
      }
    }
  }
}

@_cdecl("hs_rounding_report_count") @implementation
public func hs_rounding_report_count(
  _ report: OpaquePointer?, _ outCount: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  count(outCount, error) { () throws(HalfstepError) in
    try object(report, "report", as: LentList<hs_rounded_layer>.self).items.count
  }
}

@_cdecl("hs_rounding_report_get") @implementation
public func hs_rounding_report_get(
  _ report: OpaquePointer?, _ index: Int, _ outLayer: UnsafeMutablePointer<hs_rounded_layer>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  item(outLayer, hs_rounded_layer(), "out_layer", index, error) { () throws(HalfstepError) in
    try object(report, "report", as: LentList<hs_rounded_layer>.self).items
  }
}

@_cdecl("hs_rounding_report_free") @implementation
public func hs_rounding_report_free(_ report: OpaquePointer?) { release(report) }
