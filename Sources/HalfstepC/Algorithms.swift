// SPDX-License-Identifier: Apache-2.0
// Exports: inspection, folding, equalization.

import CHalfstep
import Halfstep

// MARK: - Inspection

@_cdecl("hs_model_inspect") @implementation
public func hs_model_inspect(
  _ model: OpaquePointer?, _ outInspection: UnsafeMutablePointer<OpaquePointer?>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outInspection?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(model, "model", as: ModelHandle.self)
    let out = try required(outInspection, "out_inspection")
    let list = LentList(try handle.model.layers()) { layer, memory in
      hs_layer(
        name: memory.string(layer.name), op_type: memory.string(layer.operatorType),
        weight: memory.string(layer.weight),
        channel_minimum: memory.array(layer.channelMinimums),
        channel_maximum: memory.array(layer.channelMaximums),
        channel_count: layer.channelMinimums.count, weight_count: layer.weightShape.elementCount)
    }
    out.pointee = handOver(list)
  }
}

@_cdecl("hs_inspection_layer_count") @implementation
public func hs_inspection_layer_count(
  _ inspection: OpaquePointer?, _ outCount: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  count(outCount, error) { () throws(HalfstepError) in
    try object(inspection, "inspection", as: LentList<hs_layer>.self).items.count
  }
}

@_cdecl("hs_inspection_layer") @implementation
public func hs_inspection_layer(
  _ inspection: OpaquePointer?, _ index: Int, _ outLayer: UnsafeMutablePointer<hs_layer>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  item(outLayer, hs_layer(), "out_layer", index, error) { () throws(HalfstepError) in
    try object(inspection, "inspection", as: LentList<hs_layer>.self).items
  }
}

@_cdecl("hs_inspection_free") @implementation
public func hs_inspection_free(_ inspection: OpaquePointer?) { release(inspection) }

// MARK: - Folding

@_cdecl("hs_model_fold_batch_norms") @implementation
public func hs_model_fold_batch_norms(
  _ model: OpaquePointer?, _ outReport: UnsafeMutablePointer<OpaquePointer?>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outReport?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(model, "model", as: ModelHandle.self)
    let folds = try handle.model.foldBatchNorms()
    outReport?.pointee = handOver(
      LentList(folds) { fold, memory in
        hs_fold(
          layer: memory.string(fold.layer), batch_norm: memory.string(fold.batchNorm),
          is_forward: fold.isForward ? 1 : 0, reserved: 0)
      })
  }
}

@_cdecl("hs_fold_report_count") @implementation
public func hs_fold_report_count(
  _ report: OpaquePointer?, _ outCount: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  count(outCount, error) { () throws(HalfstepError) in
    try object(report, "report", as: LentList<hs_fold>.self).items.count
  }
}

@_cdecl("hs_fold_report_get") @implementation
public func hs_fold_report_get(
  _ report: OpaquePointer?, _ index: Int, _ outFold: UnsafeMutablePointer<hs_fold>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  item(outFold, hs_fold(), "out_fold", index, error) { () throws(HalfstepError) in
    try object(report, "report", as: LentList<hs_fold>.self).items
  }
}

@_cdecl("hs_fold_report_free") @implementation
public func hs_fold_report_free(_ report: OpaquePointer?) { release(report) }

// MARK: - Equalization

/// Behind `hs_equalization_report`.
private final class EqualizationReportHandle {
  let iterations: Int
  let sets: LentList<hs_equalized_set>

  init(_ report: EqualizationReport) {
    iterations = report.iterations
    sets = LentList(report.sets) { set, memory in
      hs_equalized_set(
        layers: memory.array(set.layers.map { memory.string($0) as UnsafePointer<CChar>? }),
        factors: memory.array(set.factors.map { memory.array($0) as UnsafePointer<Float>? }),
        channel_counts: memory.array(set.factors.map(\.count)), layer_count: set.layers.count,
        factor_count: set.factors.count)
    }
  }
}

@_cdecl("hs_equalization_options_init") @implementation
public func hs_equalization_options_init(
  _ options: UnsafeMutablePointer<hs_equalization_options>?
) {
  options?.pointee = hs_equalization_options()
  options?.pointee.struct_size = MemoryLayout<hs_equalization_options>.size
}

@_cdecl("hs_model_equalize") @implementation
public func hs_model_equalize(
  _ model: OpaquePointer?, _ options: UnsafePointer<hs_equalization_options>?,
  _ outReport: UnsafeMutablePointer<OpaquePointer?>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outReport?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(model, "model", as: ModelHandle.self)
    let given = try HalfstepC.options(options, hs_equalization_options())
    var options = EqualizationOptions()
    options.absorbsHighBiases = given.absorbs_high_biases != 0
    if given.maximum_iterations != 0 { options.maximumIterations = Int(given.maximum_iterations) }
    let result = try handle.model.equalize(
      options, progress: given.progress.map { call in { call($0, $1, given.user_data) == 0 } })
    outReport?.pointee = handOver(EqualizationReportHandle(result))
  }
}

@_cdecl("hs_equalization_report_iterations") @implementation
public func hs_equalization_report_iterations(
  _ report: OpaquePointer?, _ outIterations: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  count(outIterations, error) { () throws(HalfstepError) in
    try object(report, "report", as: EqualizationReportHandle.self).iterations
  }
}

@_cdecl("hs_equalization_report_count") @implementation
public func hs_equalization_report_count(
  _ report: OpaquePointer?, _ outCount: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  count(outCount, error) { () throws(HalfstepError) in
    try object(report, "report", as: EqualizationReportHandle.self).sets.items.count
  }
}

@_cdecl("hs_equalization_report_get") @implementation
public func hs_equalization_report_get(
  _ report: OpaquePointer?, _ index: Int, _ outSet: UnsafeMutablePointer<hs_equalized_set>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  item(outSet, hs_equalized_set(), "out_set", index, error) { () throws(HalfstepError) in
    try object(report, "report", as: EqualizationReportHandle.self).sets.items
  }
}

@_cdecl("hs_equalization_report_free") @implementation
public func hs_equalization_report_free(_ report: OpaquePointer?) { release(report) }
