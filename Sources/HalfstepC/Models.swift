// SPDX-License-Identifier: Apache-2.0
// Exports: models, their files and tensors.

import CHalfstep
import Halfstep

/// Behind `hs_model`: a model, and what was lent from it.
final class ModelHandle: LendsBytes {
  var model: Model {
    didSet {
      pending.clear()
      lentInputs = nil
      lentOutputs = nil
    }
  }
  var pending: PendingBytes = PendingBytes()
  private var lentInputs: LentList<hs_value_info>?
  private var lentOutputs: LentList<hs_value_info>?

  init(_ model: Model) { self.model = model }

  var inputs: [hs_value_info] {
    let list = lentInputs ?? LentList(model.inputs, hs_value_info.init)
    lentInputs = list
    return list.items
  }

  var outputs: [hs_value_info] {
    let list = lentOutputs ?? LentList(model.outputs, hs_value_info.init)
    lentOutputs = list
    return list.items
  }
}

extension hs_value_info {
  fileprivate init(_ info: TensorInfo, _ memory: LentMemory) {
    let shape: [Int64]? = info.dimensions.map {
      $0.map { if case .fixed(let extent) = $0 { Int64(extent) } else { -1 } }
    }
    self.init(
      name: memory.string(info.name),
      shape: shape.flatMap { $0.isEmpty ? nil : memory.array($0) },
      dtype: info.dataType?.rawValue ?? 0, rank: shape.map { Int32(clamping: $0.count) } ?? -1)
  }
}

// MARK: - Opening and saving

@_cdecl("hs_open_options_init") @implementation
public func hs_open_options_init(_ options: UnsafeMutablePointer<hs_open_options>?) {
  options?.pointee = hs_open_options()
  options?.pointee.struct_size = MemoryLayout<hs_open_options>.size
}

@_cdecl("hs_model_open") @implementation
public func hs_model_open(
  _ path: UnsafePointer<CChar>?, _ options: UnsafePointer<hs_open_options>?,
  _ outModel: UnsafeMutablePointer<OpaquePointer?>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outModel?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let path = try text(path, "path")
    _ = try HalfstepC.options(options, hs_open_options())
    let out = try required(outModel, "out_model")
    out.pointee = handOver(ModelHandle(try Model(contentsOf: path)))
  }
}

@_cdecl("hs_model_open_memory") @implementation
public func hs_model_open_memory(
  _ data: UnsafeRawPointer?, _ size: Int, _ options: UnsafePointer<hs_open_options>?,
  _ outModel: UnsafeMutablePointer<OpaquePointer?>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outModel?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let bytes = UnsafeRawBufferPointer(
      start: try required(data, "data"), count: try length(size, "size"))
    let options = try HalfstepC.options(options, hs_open_options())
    let out = try required(outModel, "out_model")
    var folder: String?
    if let given = options.external_data_folder { folder = try text(given, "external_data_folder") }
    out.pointee = handOver(ModelHandle(try Model(bytes: bytes, externalDataFolder: folder)))
  }
}

@_cdecl("hs_model_clone") @implementation
public func hs_model_clone(
  _ model: OpaquePointer?, _ outModel: UnsafeMutablePointer<OpaquePointer?>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outModel?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(model, "model", as: ModelHandle.self)
    try required(outModel, "out_model").pointee = handOver(ModelHandle(handle.model))
  }
}

@_cdecl("hs_model_free") @implementation
public func hs_model_free(_ model: OpaquePointer?) { release(model) }

@_cdecl("hs_save_options_init") @implementation
public func hs_save_options_init(_ options: UnsafeMutablePointer<hs_save_options>?) {
  options?.pointee = hs_save_options()
  options?.pointee.struct_size = MemoryLayout<hs_save_options>.size
}

@_cdecl("hs_model_save") @implementation
public func hs_model_save(
  _ model: OpaquePointer?, _ path: UnsafePointer<CChar>?,
  _ options: UnsafePointer<hs_save_options>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let handle = try object(model, "model", as: ModelHandle.self)
    let path = try text(path, "path")
    let options = try HalfstepC.options(options, hs_save_options())
    try handle.model.save(to: path, usesExternalData: options.external_data != 0)
  }
}

@_cdecl("hs_model_serialized_size") @implementation
public func hs_model_serialized_size(
  _ model: OpaquePointer?, _ outSize: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  pendingSize(
    model, "model", outSize, error, key: { "model" },
    make: { (handle: ModelHandle, _) throws(HalfstepError) in try handle.model.serialized() })
}

@_cdecl("hs_model_serialize") @implementation
public func hs_model_serialize(
  _ model: OpaquePointer?, _ buffer: UnsafeMutableRawPointer?, _ capacity: Int,
  _ outSize: UnsafeMutablePointer<Int>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  pendingCopy(
    model, "model", to: buffer, capacity, outSize, error, key: { "model" },
    make: { (handle: ModelHandle, _) throws(HalfstepError) in try handle.model.serialized() })
}

// MARK: - Tensors

@_cdecl("hs_model_input_count") @implementation
public func hs_model_input_count(
  _ model: OpaquePointer?, _ outCount: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  count(outCount, error) { () throws(HalfstepError) in
    try object(model, "model", as: ModelHandle.self).inputs.count
  }
}

@_cdecl("hs_model_input") @implementation
public func hs_model_input(
  _ model: OpaquePointer?, _ index: Int, _ outInfo: UnsafeMutablePointer<hs_value_info>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  item(outInfo, hs_value_info(), "out_info", index, error) { () throws(HalfstepError) in
    try object(model, "model", as: ModelHandle.self).inputs
  }
}

@_cdecl("hs_model_output_count") @implementation
public func hs_model_output_count(
  _ model: OpaquePointer?, _ outCount: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  count(outCount, error) { () throws(HalfstepError) in
    try object(model, "model", as: ModelHandle.self).outputs.count
  }
}

@_cdecl("hs_model_output") @implementation
public func hs_model_output(
  _ model: OpaquePointer?, _ index: Int, _ outInfo: UnsafeMutablePointer<hs_value_info>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  item(outInfo, hs_value_info(), "out_info", index, error) { () throws(HalfstepError) in
    try object(model, "model", as: ModelHandle.self).outputs
  }
}

@_cdecl("hs_model_initializers") @implementation
public func hs_model_initializers(
  _ model: OpaquePointer?, _ outTensors: UnsafeMutablePointer<OpaquePointer?>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outTensors?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(model, "model", as: ModelHandle.self)
    let out = try required(outTensors, "out_tensors")
    out.pointee = handOver(TensorsHandle(handle.model.initializers))
  }
}

@_cdecl("hs_model_set_initializer") @implementation
public func hs_model_set_initializer(
  _ model: OpaquePointer?, _ name: UnsafePointer<CChar>?, _ value: UnsafePointer<hs_tensor_view>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let handle = try object(model, "model", as: ModelHandle.self)
    let name = try text(name, "name")
    let view = try required(value, "value").pointee
    try handle.model.setInitializer(name, to: try Tensor(copying: view, name))
  }
}

@_cdecl("hs_model_set_initializer_borrowed") @implementation
public func hs_model_set_initializer_borrowed(
  _ model: OpaquePointer?, _ name: UnsafePointer<CChar>?, _ value: UnsafePointer<hs_tensor_view>?,
  _ release: (@convention(c) (UnsafeMutableRawPointer?) -> Void)?,
  _ userData: UnsafeMutableRawPointer?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    try setBorrowed(model, name, value, isWritable: false, release, userData)
  }
}

@_cdecl("hs_model_set_initializer_lent") @implementation
public func hs_model_set_initializer_lent(
  _ model: OpaquePointer?, _ name: UnsafePointer<CChar>?, _ value: UnsafePointer<hs_tensor_view>?,
  _ release: (@convention(c) (UnsafeMutableRawPointer?) -> Void)?,
  _ userData: UnsafeMutableRawPointer?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    try setBorrowed(model, name, value, isWritable: true, release, userData)
  }
}

private func setBorrowed(
  _ model: OpaquePointer?, _ name: UnsafePointer<CChar>?, _ value: UnsafePointer<hs_tensor_view>?,
  isWritable: Bool, _ release: (@convention(c) (UnsafeMutableRawPointer?) -> Void)?,
  _ userData: UnsafeMutableRawPointer?
) throws(HalfstepError) {
  let handle = try object(model, "model", as: ModelHandle.self)
  let name = try text(name, "name")
  let view = try required(value, "value").pointee
  // Checked first with a tensor that releases nothing, since a failure must not call `release`.
  var rehearsal = handle.model
  try rehearsal.setInitializer(name, to: try Tensor(borrowing: view, name, release: {}))
  nonisolated(unsafe) let userData = userData
  let tensor = try Tensor(
    borrowing: view, name, isWritable: isWritable, release: { release?(userData) })
  try handle.model.setInitializer(name, to: tensor)
}

@_cdecl("hs_model_take_initializer") @implementation
public func hs_model_take_initializer(
  _ model: OpaquePointer?, _ name: UnsafePointer<CChar>?,
  _ outTensors: UnsafeMutablePointer<OpaquePointer?>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outTensors?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(model, "model", as: ModelHandle.self)
    let name = try text(name, "name")
    let out = try required(outTensors, "out_tensors")
    var tensors = NamedTensors()
    tensors[name] = try handle.model.takeInitializer(name)
    out.pointee = handOver(TensorsHandle(tensors))
  }
}

@_cdecl("hs_run_options_init") @implementation
public func hs_run_options_init(_ options: UnsafeMutablePointer<hs_run_options>?) {
  options?.pointee = hs_run_options()
  options?.pointee.struct_size = MemoryLayout<hs_run_options>.size
}

@_cdecl("hs_model_run") @implementation
public func hs_model_run(
  _ model: OpaquePointer?, _ names: UnsafePointer<UnsafePointer<CChar>?>?,
  _ values: UnsafePointer<hs_tensor_view>?, _ count: Int,
  _ options: UnsafePointer<hs_run_options>?, _ outOutputs: UnsafeMutablePointer<OpaquePointer?>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outOutputs?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(model, "model", as: ModelHandle.self)
    let extra = try HalfstepC.options(options, hs_run_options()).extraOutputs
    let inputs = try HalfstepC.inputs(names, values, count)
    let out = try required(outOutputs, "out_outputs")
    out.pointee = handOver(TensorsHandle(try handle.model.run(inputs, extraOutputs: extra)))
  }
}
