// SPDX-License-Identifier: Apache-2.0
// Exports: encodings JSON and models for other tools.

import CHalfstep
import Halfstep

// MARK: - Encodings

/// The version of a format that a text names; NULL means 1.0.0.
private func version(
  _ pointer: UnsafePointer<CChar>?
) throws(HalfstepError) -> EncodingsVersion {
  pointer == nil ? .v1_0_0 : try EncodingsVersion(text: try text(pointer, "version"))
}

/// The bytes of an encodings file.
private func encodings(
  _ handle: SimulationHandle, _ version: String
) throws(HalfstepError) -> [UInt8] {
  try handle.simulation.encodings(version: try EncodingsVersion(text: version))
}

@_cdecl("hs_simulation_encodings_size") @implementation
public func hs_simulation_encodings_size(
  _ simulation: OpaquePointer?, _ version: UnsafePointer<CChar>?,
  _ outSize: UnsafeMutablePointer<Int>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  pendingSize(
    simulation, "simulation", outSize, error,
    key: { () throws(HalfstepError) in try HalfstepC.version(version).rawValue },
    make: encodings)
}

@_cdecl("hs_simulation_encodings_json") @implementation
public func hs_simulation_encodings_json(
  _ simulation: OpaquePointer?, _ version: UnsafePointer<CChar>?,
  _ buffer: UnsafeMutableRawPointer?, _ capacity: Int, _ outSize: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  pendingCopy(
    simulation, "simulation", to: buffer, capacity, outSize, error,
    key: { () throws(HalfstepError) in try HalfstepC.version(version).rawValue },
    make: encodings)
}

@_cdecl("hs_simulation_export") @implementation
public func hs_simulation_export(
  _ simulation: OpaquePointer?, _ directory: UnsafePointer<CChar>?,
  _ prefix: UnsafePointer<CChar>?, _ version: UnsafePointer<CChar>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let handle = try object(simulation, "simulation", as: SimulationHandle.self)
    let directory = try text(directory, "directory")
    let prefix = try text(prefix, "prefix")
    try handle.simulation.export(
      to: directory, prefix: prefix, version: try HalfstepC.version(version))
  }
}

@_cdecl("hs_qdq_options_init") @implementation
public func hs_qdq_options_init(_ options: UnsafeMutablePointer<hs_qdq_options>?) {
  options?.pointee = hs_qdq_options()
  options?.pointee.struct_size = MemoryLayout<hs_qdq_options>.size
}

@_cdecl("hs_simulation_export_qdq") @implementation
public func hs_simulation_export_qdq(
  _ simulation: OpaquePointer?, _ path: UnsafePointer<CChar>?,
  _ options: UnsafePointer<hs_qdq_options>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let handle = try object(simulation, "simulation", as: SimulationHandle.self)
    let path = try text(path, "path")
    let given = try HalfstepC.options(options, hs_qdq_options())
    var options = QDQOptions()
    options.prequantizesConstants = given.prequantizes_constants != 0
    options.exportsInt32Bias = given.exports_int32_bias != 0
    try handle.simulation.exportQDQ(to: path, options: options)
  }
}

// MARK: - Loading

/// Behind `hs_load_report`: one list a kind.
private final class LoadReportHandle {
  private let lists: [LentList<UnsafePointer<CChar>?>]

  init(_ report: EncodingsLoadReport) {
    lists = [report.unknown, report.missing, report.different].map { texts in
      LentList(texts) { text, memory in memory.string(text) }
    }
  }

  func items(_ kind: hs_load_mismatch) throws(HalfstepError) -> [UnsafePointer<CChar>?] {
    guard kind >= 0, kind < lists.count else {
      throw HalfstepError(.invalidArgument, "unknown kind of mismatch \(kind)")
    }
    return lists[Int(kind)].items
  }
}

@_cdecl("hs_simulation_load_encodings") @implementation
public func hs_simulation_load_encodings(
  _ simulation: OpaquePointer?, _ data: UnsafeRawPointer?, _ size: Int, _ strict: Int32,
  _ outReport: UnsafeMutablePointer<OpaquePointer?>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outReport?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(simulation, "simulation", as: SimulationHandle.self)
    let json = try bytes(data, size)
    handle.changed()
    let result = try handle.simulation.loadEncodings(json: json, isStrict: strict != 0)
    outReport?.pointee = handOver(LoadReportHandle(result))
  }
}

@_cdecl("hs_load_report_count") @implementation
public func hs_load_report_count(
  _ report: OpaquePointer?, _ kind: hs_load_mismatch, _ outCount: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  count(outCount, error) { () throws(HalfstepError) in
    try object(report, "report", as: LoadReportHandle.self).items(kind).count
  }
}

@_cdecl("hs_load_report_get") @implementation
public func hs_load_report_get(
  _ report: OpaquePointer?, _ kind: hs_load_mismatch, _ index: Int,
  _ outText: UnsafeMutablePointer<UnsafePointer<CChar>?>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  item(outText, nil, "out_text", index, error) { () throws(HalfstepError) in
    try object(report, "report", as: LoadReportHandle.self).items(kind)
  }
}

@_cdecl("hs_load_report_free") @implementation
public func hs_load_report_free(_ report: OpaquePointer?) { release(report) }
