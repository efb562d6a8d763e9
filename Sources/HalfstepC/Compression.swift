// SPDX-License-Identifier: Apache-2.0
// Exports: compression.

import CHalfstep
import Halfstep

/// Behind `hs_compressor`.
private final class CompressorHandle {
  var compressor: ModelCompressor
  let costs: LentList<hs_layer_cost>
  let layers: LentList<hs_compressible_layer>
  let refusals: LentList<hs_compression_refusal>

  init(_ compressor: ModelCompressor) {
    self.compressor = compressor
    costs = LentList(compressor.costs) { hs_layer_cost($0, $1) }
    layers = LentList(compressor.layers) { layer, memory in
      hs_compressible_layer(
        name: memory.string(layer.layer.name), op_type: memory.string(layer.layer.operatorType),
        weight: memory.string(layer.layer.weight), macs: Int64(layer.layer.cost.macs),
        parameters: Int64(layer.layer.cost.parameters), maximum_units: Int64(layer.maximumUnits))
    }
    refusals = LentList(compressor.refusals) { hs_compression_refusal($0, $1) }
  }
}

extension hs_layer_cost {
  fileprivate init(_ layer: CostedLayer, _ memory: LentMemory) {
    self.init(
      name: memory.string(layer.name), op_type: memory.string(layer.operatorType),
      weight: memory.string(layer.weight), macs: Int64(layer.cost.macs),
      parameters: Int64(layer.cost.parameters))
  }
}

extension hs_compression_refusal {
  fileprivate init(_ refusal: CompressionRefusal, _ memory: LentMemory) {
    self.init(layer: memory.string(refusal.layer), reason: memory.string(refusal.reason))
  }
}

/// Behind `hs_compression_report`.
private final class CompressionReportHandle {
  let stats: CompressionStats
  let layers: LentList<hs_compressed_layer>
  let constants: LentList<hs_pruned_constant>

  init(_ stats: CompressionStats) {
    self.stats = stats
    constants = LentList(stats.constants) { constant, memory in
      hs_pruned_constant(
        name: memory.string(constant.name), result: memory.string(constant.result),
        axis: Int64(constant.axis), kept: memory.array(constant.kept.map { Int64($0) }),
        kept_count: constant.kept.count)
    }
    layers = LentList(stats.layers) { layer, memory in
      hs_compressed_layer(
        name: memory.string(layer.name), op_type: memory.string(layer.operatorType),
        units: Int64(layer.units ?? 0), maximum_units: Int64(layer.maximumUnits),
        macs_before: Int64(layer.before.macs), macs_after: Int64(layer.after.macs),
        parameters_before: Int64(layer.before.parameters),
        parameters_after: Int64(layer.after.parameters), weight: memory.string(layer.weight),
        first_weight: layer.pair.flatMap { memory.string($0.firstWeight) },
        second_weight: layer.pair.flatMap { memory.string($0.secondWeight) },
        bias: (layer.pair?.bias ?? layer.fittedBias).flatMap { memory.string($0) },
        noise_plain: layer.noise?.plain ?? -1, noise_kept: layer.noise?.kept ?? -1)
    }
  }
}

// MARK: - Compressor

@_cdecl("hs_compression_options_init") @implementation
public func hs_compression_options_init(_ options: UnsafeMutablePointer<hs_compression_options>?) {
  options?.pointee = hs_compression_options()
  options?.pointee.struct_size = MemoryLayout<hs_compression_options>.size
}

@_cdecl("hs_compressor_create") @implementation
public func hs_compressor_create(
  _ model: OpaquePointer?, _ options: UnsafePointer<hs_compression_options>?,
  _ outCompressor: UnsafeMutablePointer<OpaquePointer?>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outCompressor?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(model, "model", as: ModelHandle.self)
    let given = try HalfstepC.options(options, hs_compression_options())
    let out = try required(outCompressor, "out_compressor")
    var options = CompressionOptions()
    guard let scheme = CompressionScheme(rawValue: given.scheme) else {
      throw HalfstepError(.invalidArgument, "scheme \(given.scheme) is not known")
    }
    guard let metric = CompressionMetric(rawValue: given.metric) else {
      throw HalfstepError(.invalidArgument, "metric \(given.metric) is not known")
    }
    guard let importance = ChannelImportance(rawValue: given.importance) else {
      throw HalfstepError(.invalidArgument, "importance \(given.importance) is not known")
    }
    options.scheme = scheme
    options.metric = metric
    options.importance = importance
    options.reconstructs = given.without_reconstruction == 0
    if given.multiplicity != 0 { options.multiplicity = Int(given.multiplicity) }
    options.ignoredLayers = try texts(
      given.ignored_layers, given.ignored_layer_count, "ignored_layers")
    options.inputKeepers = try texts(
      given.input_keepers, given.input_keeper_count, "input_keepers")
    options.keepsPositions = given.keeps_positions != 0
    let names = try texts(given.input_names, given.input_count, "input_names")
    for (index, name) in names.enumerated() {
      let shape = try required(
        try required(given.input_shapes, "input_shapes")[index], "input_shapes")
      let rank = try required(given.input_ranks, "input_ranks")[index]
      guard (0...Int32(Shape.maximumRank)).contains(rank) else {
        throw HalfstepError(.invalidArgument, "input '\(name)': rank \(rank) is out of range")
      }
      options.inputShapes[name] = try Shape((0..<Int(rank)).map { Int(shape[$0]) })
    }
    out.pointee = handOver(CompressorHandle(try ModelCompressor(handle.model, options)))
  }
}

@_cdecl("hs_compressor_free") @implementation
public func hs_compressor_free(_ compressor: OpaquePointer?) { release(compressor) }

@_cdecl("hs_compressor_cost_count") @implementation
public func hs_compressor_cost_count(
  _ compressor: OpaquePointer?, _ outCount: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  count(outCount, error) { () throws(HalfstepError) in
    try object(compressor, "compressor", as: CompressorHandle.self).costs.items.count
  }
}

@_cdecl("hs_compressor_cost") @implementation
public func hs_compressor_cost(
  _ compressor: OpaquePointer?, _ index: Int, _ outCost: UnsafeMutablePointer<hs_layer_cost>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  item(outCost, hs_layer_cost(), "out_cost", index, error) { () throws(HalfstepError) in
    try object(compressor, "compressor", as: CompressorHandle.self).costs.items
  }
}

@_cdecl("hs_compressor_layer_count") @implementation
public func hs_compressor_layer_count(
  _ compressor: OpaquePointer?, _ outCount: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  count(outCount, error) { () throws(HalfstepError) in
    try object(compressor, "compressor", as: CompressorHandle.self).layers.items.count
  }
}

@_cdecl("hs_compressor_layer") @implementation
public func hs_compressor_layer(
  _ compressor: OpaquePointer?, _ index: Int,
  _ outLayer: UnsafeMutablePointer<hs_compressible_layer>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  item(outLayer, hs_compressible_layer(), "out_layer", index, error) { () throws(HalfstepError) in
    try object(compressor, "compressor", as: CompressorHandle.self).layers.items
  }
}

@_cdecl("hs_compressor_refusal_count") @implementation
public func hs_compressor_refusal_count(
  _ compressor: OpaquePointer?, _ outCount: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  count(outCount, error) { () throws(HalfstepError) in
    try object(compressor, "compressor", as: CompressorHandle.self).refusals.items.count
  }
}

@_cdecl("hs_compressor_refusal") @implementation
public func hs_compressor_refusal(
  _ compressor: OpaquePointer?, _ index: Int,
  _ outRefusal: UnsafeMutablePointer<hs_compression_refusal>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  item(outRefusal, hs_compression_refusal(), "out_refusal", index, error) {
    () throws(HalfstepError) in
    try object(compressor, "compressor", as: CompressorHandle.self).refusals.items
  }
}

@_cdecl("hs_compressor_find") @implementation
public func hs_compressor_find(
  _ compressor: OpaquePointer?, _ name: UnsafePointer<CChar>?,
  _ outIndex: UnsafeMutablePointer<Int>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  count(outIndex, error) { () throws(HalfstepError) in
    let handle = try object(compressor, "compressor", as: CompressorHandle.self)
    return try handle.compressor.position(of: try text(name, "name"))
  }
}

/// Copies positions to a caller's buffer, or only counts them.
private func hand(
  _ positions: [Int], _ out: UnsafeMutablePointer<Int>?, _ name: StaticString, _ capacity: Int,
  _ outCount: UnsafeMutablePointer<Int>
) throws(HalfstepError) {
  if let out {
    guard try length(capacity, "capacity") >= positions.count else {
      throw HalfstepError(
        .invalidArgument, "\(name): expected room for \(positions.count), got \(capacity)")
    }
    for (place, position) in positions.enumerated() { out[place] = position }
  }
  outCount.pointee = positions.count
}

@_cdecl("hs_compressor_find_read") @implementation
public func hs_compressor_find_read(
  _ compressor: OpaquePointer?, _ name: UnsafePointer<CChar>?,
  _ outIndices: UnsafeMutablePointer<Int>?, _ capacity: Int,
  _ outCount: UnsafeMutablePointer<Int>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outCount?.pointee = 0
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(compressor, "compressor", as: CompressorHandle.self)
    let outCount = try required(outCount, "out_count")
    let found = try handle.compressor.positions(readBy: try text(name, "name"))
    try hand(found, outIndices, "out_indices", capacity, outCount)
  }
}

@_cdecl("hs_compressor_members") @implementation
public func hs_compressor_members(
  _ compressor: OpaquePointer?, _ index: Int, _ role: hs_channel_role,
  _ outCosts: UnsafeMutablePointer<Int>?, _ capacity: Int, _ outCount: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outCount?.pointee = 0
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(compressor, "compressor", as: CompressorHandle.self)
    let outCount = try required(outCount, "out_count")
    let members = try handle.compressor.members(index)
    switch Int(role) {
    case HS_CHANNELS_WRITTEN: try hand(members.writers, outCosts, "out_costs", capacity, outCount)
    case HS_CHANNELS_READ: try hand(members.readers, outCosts, "out_costs", capacity, outCount)
    default: throw HalfstepError(.invalidArgument, "role \(role) is not known")
    }
  }
}

@_cdecl("hs_compressor_units") @implementation
public func hs_compressor_units(
  _ compressor: OpaquePointer?, _ index: Int, _ ratio: Double,
  _ outUnits: UnsafeMutablePointer<Int64>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outUnits?.pointee = 0
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(compressor, "compressor", as: CompressorHandle.self)
    let out = try required(outUnits, "out_units")
    out.pointee = Int64(try handle.compressor.units(index, ratio: ratio) ?? 0)
  }
}

@_cdecl("hs_compressor_ratio") @implementation
public func hs_compressor_ratio(
  _ compressor: OpaquePointer?, _ index: Int, _ units: Int64,
  _ outRatio: UnsafeMutablePointer<Double>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outRatio?.pointee = 0
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(compressor, "compressor", as: CompressorHandle.self)
    let out = try required(outRatio, "out_ratio")
    out.pointee = try handle.compressor.ratio(index, units: Int(units))
  }
}

// MARK: - Data

@_cdecl("hs_compressor_calibrate") @implementation
public func hs_compressor_calibrate(
  _ compressor: OpaquePointer?, _ names: UnsafePointer<UnsafePointer<CChar>?>?,
  _ values: UnsafePointer<hs_tensor_view>?, _ count: Int, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let handle = try object(compressor, "compressor", as: CompressorHandle.self)
    try handle.compressor.calibrate(try HalfstepC.inputs(names, values, count, isCopied: true))
  }
}

@_cdecl("hs_compressor_errors") @implementation
public func hs_compressor_errors(
  _ compressor: OpaquePointer?, _ index: Int, _ call: hs_progress_fn?,
  _ userData: UnsafeMutableRawPointer?, _ outErrors: UnsafeMutablePointer<Double>?,
  _ capacity: Int, _ outCount: UnsafeMutablePointer<Int>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outCount?.pointee = 0
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(compressor, "compressor", as: CompressorHandle.self)
    let outCount = try required(outCount, "out_count")
    // Before the work.
    _ = try element(handle.layers.items, at: index)
    let curve = try handle.compressor.errorCurves(progress: progress(call, userData))[index]
    if let outErrors {
      guard try length(capacity, "capacity") >= curve.count else {
        throw HalfstepError(
          .invalidArgument, "out_errors: expected room for \(curve.count), got \(capacity)")
      }
      for (size, error) in curve.enumerated() { outErrors[size] = error }
    }
    outCount.pointee = curve.count
  }
}

// MARK: - Choice

/// The progress callback of a call, in steps of a thousandth.
private func progress(
  _ call: hs_progress_fn?, _ userData: UnsafeMutableRawPointer?
) -> ((Double) -> Bool)? {
  call.map { call in { call(Int((min(max($0, 0), 1) * 1000).rounded()), 1000, userData) == 0 } }
}

/// Copies sizes to the caller's buffer, 0 for layers that stay.
private func hand(
  _ sizes: [Int?], _ outUnits: UnsafeMutablePointer<Int64>, _ capacity: Int
) throws(HalfstepError) {
  guard try length(capacity, "capacity") >= sizes.count else {
    throw HalfstepError(
      .invalidArgument, "out_units: expected room for \(sizes.count), got \(capacity)")
  }
  for (index, size) in sizes.enumerated() { outUnits[index] = Int64(size ?? 0) }
}

@_cdecl("hs_compressor_select") @implementation
public func hs_compressor_select(
  _ compressor: OpaquePointer?, _ target: Double, _ call: hs_progress_fn?,
  _ userData: UnsafeMutableRawPointer?, _ outUnits: UnsafeMutablePointer<Int64>?,
  _ capacity: Int, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let handle = try object(compressor, "compressor", as: CompressorHandle.self)
    let out = try required(outUnits, "out_units")
    let sizes = try handle.compressor.select(
      target: target, progress: progress(call, userData))
    try hand(sizes, out, capacity)
  }
}

@_cdecl("hs_compressor_select_greedy") @implementation
public func hs_compressor_select_greedy(
  _ compressor: OpaquePointer?, _ target: Double, _ ratios: UnsafePointer<Double>?,
  _ scores: UnsafePointer<Double>?, _ candidates: Int, _ monotonic: Int32,
  _ outUnits: UnsafeMutablePointer<Int64>?, _ capacity: Int,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let handle = try object(compressor, "compressor", as: CompressorHandle.self)
    let ratios = try required(ratios, "ratios")
    let scores = try required(scores, "scores")
    let out = try required(outUnits, "out_units")
    guard (1...1_000_000).contains(candidates) else {
      throw HalfstepError(
        .invalidArgument,
        "candidate_count: expected 1...1000000, got \(UInt(bitPattern: candidates))")
    }
    let curves = handle.layers.items.indices.map { layer in
      RatioCurve(
        ratios: (0..<candidates).map { ratios[$0] },
        scores: (0..<candidates).map { scores[layer * candidates + $0] })
    }
    let sizes = try handle.compressor.selectGreedily(
      target: target, curves: curves, usesMonotonicFit: monotonic != 0)
    try hand(sizes, out, capacity)
  }
}

// MARK: - Compression

@_cdecl("hs_compressor_compress") @implementation
public func hs_compressor_compress(
  _ compressor: OpaquePointer?, _ units: UnsafePointer<Int64>?, _ unitCount: Int,
  _ call: hs_progress_fn?, _ userData: UnsafeMutableRawPointer?,
  _ outModel: UnsafeMutablePointer<OpaquePointer?>?,
  _ outReport: UnsafeMutablePointer<OpaquePointer?>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outModel?.pointee = nil
  outReport?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(compressor, "compressor", as: CompressorHandle.self)
    let count = try length(unitCount, "unit_count")
    let units = try required(units, "units")
    let out = try required(outModel, "out_model")
    guard count == handle.layers.items.count else {
      throw HalfstepError(
        .invalidArgument, "unit_count: expected \(handle.layers.items.count), got \(count)")
    }
    let sizes = (0..<count).map { units[$0] == 0 ? nil : Int(units[$0]) }
    let result = try handle.compressor.compress(sizes, progress: progress(call, userData))
    out.pointee = handOver(ModelHandle(result.model))
    outReport?.pointee = handOver(CompressionReportHandle(result.stats))
  }
}

@_cdecl("hs_compression_report_total") @implementation
public func hs_compression_report_total(
  _ report: OpaquePointer?, _ outTotal: UnsafeMutablePointer<hs_compressed_layer>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outTotal?.pointee = hs_compressed_layer()
  return HalfstepC.report(to: error) { () throws(HalfstepError) in
    let handle = try object(report, "report", as: CompressionReportHandle.self)
    let out = try required(outTotal, "out_total")
    out.pointee.macs_before = Int64(handle.stats.before.macs)
    out.pointee.macs_after = Int64(handle.stats.after.macs)
    out.pointee.parameters_before = Int64(handle.stats.before.parameters)
    out.pointee.parameters_after = Int64(handle.stats.after.parameters)
    out.pointee.noise_plain = -1
    out.pointee.noise_kept = -1
  }
}

@_cdecl("hs_compression_report_count") @implementation
public func hs_compression_report_count(
  _ report: OpaquePointer?, _ outCount: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  count(outCount, error) { () throws(HalfstepError) in
    try object(report, "report", as: CompressionReportHandle.self).layers.items.count
  }
}

@_cdecl("hs_compression_report_get") @implementation
public func hs_compression_report_get(
  _ report: OpaquePointer?, _ index: Int, _ outLayer: UnsafeMutablePointer<hs_compressed_layer>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  item(outLayer, hs_compressed_layer(), "out_layer", index, error) { () throws(HalfstepError) in
    try object(report, "report", as: CompressionReportHandle.self).layers.items
  }
}

@_cdecl("hs_compression_report_constant_count") @implementation
public func hs_compression_report_constant_count(
  _ report: OpaquePointer?, _ outCount: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  count(outCount, error) { () throws(HalfstepError) in
    try object(report, "report", as: CompressionReportHandle.self).constants.items.count
  }
}

@_cdecl("hs_compression_report_constant") @implementation
public func hs_compression_report_constant(
  _ report: OpaquePointer?, _ index: Int,
  _ outConstant: UnsafeMutablePointer<hs_pruned_constant>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  item(outConstant, hs_pruned_constant(), "out_constant", index, error) {
    () throws(HalfstepError) in
    try object(report, "report", as: CompressionReportHandle.self).constants.items
  }
}

@_cdecl("hs_compression_report_free") @implementation
public func hs_compression_report_free(_ report: OpaquePointer?) { release(report) }
