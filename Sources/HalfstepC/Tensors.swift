// SPDX-License-Identifier: Apache-2.0
// Exports: collections of named tensors.

import CHalfstep
import Halfstep

/// Behind `hs_tensors`: tensors, and what their views point to.
final class TensorsHandle {
  private(set) var tensors: NamedTensors
  private let memory: LentMemory = LentMemory()
  private let names: [UnsafePointer<CChar>]
  private let shapes: [UnsafePointer<Int64>]

  init(_ tensors: NamedTensors) {
    let memory = memory
    self.tensors = tensors
    names = tensors.map { memory.string($0.name) }
    shapes = tensors.map { memory.array($0.tensor.shape.dimensions.map(Int64.init)) }
  }

  func name(_ index: Int) -> UnsafePointer<CChar> { names[index] }

  func mutableData(_ index: Int) throws(HalfstepError) -> UnsafeMutableRawPointer {
    try tensors.makeUnique(at: index)
    return tensors[index].tensor.storage.baseAddress
  }

  func view(_ index: Int) -> hs_tensor_view {
    let tensor = tensors[index].tensor
    return hs_tensor_view(
      data: UnsafeRawPointer(tensor.storage.baseAddress), shape: shapes[index], strides: nil,
      dtype: tensor.dataType.rawValue, rank: Int32(tensor.shape.rank))
  }
}

@_cdecl("hs_tensors_open_numpy") @implementation
public func hs_tensors_open_numpy(
  _ path: UnsafePointer<CChar>?, _ outTensors: UnsafeMutablePointer<OpaquePointer?>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outTensors?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let path = try text(path, "path")
    let out = try required(outTensors, "out_tensors")
    out.pointee = handOver(TensorsHandle(try NamedTensors(contentsOfNumPyFile: path)))
  }
}

@_cdecl("hs_tensors_count") @implementation
public func hs_tensors_count(
  _ tensors: OpaquePointer?, _ outCount: UnsafeMutablePointer<Int>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  count(outCount, error) { () throws(HalfstepError) in
    try object(tensors, "tensors", as: TensorsHandle.self).tensors.count
  }
}

@_cdecl("hs_tensors_get") @implementation
public func hs_tensors_get(
  _ tensors: OpaquePointer?, _ index: Int,
  _ outName: UnsafeMutablePointer<UnsafePointer<CChar>?>?,
  _ outView: UnsafeMutablePointer<hs_tensor_view>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outName?.pointee = nil
  outView?.pointee = hs_tensor_view()
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(tensors, "tensors", as: TensorsHandle.self)
    let out = try required(outView, "out_view")
    _ = try element(handle.tensors, at: index)
    out.pointee = handle.view(index)
    outName?.pointee = handle.name(index)
  }
}

@_cdecl("hs_tensors_find") @implementation
public func hs_tensors_find(
  _ tensors: OpaquePointer?, _ name: UnsafePointer<CChar>?,
  _ outView: UnsafeMutablePointer<hs_tensor_view>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outView?.pointee = hs_tensor_view()
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(tensors, "tensors", as: TensorsHandle.self)
    let name = try text(name, "name")
    let out = try required(outView, "out_view")
    guard let index = handle.tensors.firstIndex(where: { $0.name == name }) else {
      throw HalfstepError(.unknownName, "no tensor is named '\(name)'")
    }
    out.pointee = handle.view(index)
  }
}

@_cdecl("hs_tensors_get_mutable") @implementation
public func hs_tensors_get_mutable(
  _ tensors: OpaquePointer?, _ index: Int,
  _ outData: UnsafeMutablePointer<UnsafeMutableRawPointer?>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  outData?.pointee = nil
  return report(to: error) { () throws(HalfstepError) in
    let handle = try object(tensors, "tensors", as: TensorsHandle.self)
    let out = try required(outData, "out_data")
    _ = try element(handle.tensors, at: index)
    out.pointee = try handle.mutableData(index)
  }
}

@_cdecl("hs_tensors_free") @implementation
public func hs_tensors_free(_ tensors: OpaquePointer?) { release(tensors) }
