// SPDX-License-Identifier: Apache-2.0
// Turns ONNX's tensor messages into tensors.

import FoundationEssentials
import HalfstepNumerics
import ONNXProto

/// Turns ONNX's tensor messages into tensors.
///
/// Sizes are checked against the bytes that are there before anything is allocated.
struct TensorReader {
  /// Where external data may lie; nil refuses it.
  let external: ExternalDataReader?

  /// A tensor from a whole message; nil for element types that have no dense form here.
  func tensor(_ proto: ONNXTensorProto, _ label: String) throws(HalfstepError) -> Tensor? {
    guard proto.hasRawData else { return try tensor(proto, raw: nil, label) }
    let data = proto.rawData
    let result: Result<Tensor?, HalfstepError> = data.withUnsafeBytes { bytes in
      do throws(HalfstepError) {
        return .success(try tensor(proto, raw: bytes, label))
      } catch {
        return .failure(error)
      }
    }
    return try result.get()
  }

  /// A tensor from a message whose `raw_data` lies elsewhere; nil for element types that have no
  /// dense form here.
  func tensor(
    _ proto: ONNXTensorProto, raw: UnsafeRawBufferPointer?, _ label: String
  ) throws(HalfstepError) -> Tensor? {
    guard let type = DataType(rawValue: proto.dataType), type.bitWidth != nil else {
      if proto.dataLocation == .external {
        throw HalfstepError(
          .malformedFile, "\(label): element type \(proto.dataType) cannot be external")
      }
      return nil
    }
    guard !proto.hasSegment else {
      throw HalfstepError(.malformedFile, "\(label): tensors in segments are not supported")
    }
    let shape = try Self.shape(proto.dims, label)
    if proto.dataLocation == .external {
      guard let external else {
        throw HalfstepError(
          .unsafePath, "\(label): its data is in another file, and no folder was given")
      }
      return try external.tensor(type, shape, proto.externalData, label)
    }
    if let raw {
      let needed = Tensor.byteCount(of: type, count: shape.elementCount)
      guard raw.count == needed else {
        throw HalfstepError(
          .malformedFile,
          "\(label) \(shape) of \(type): expected \(needed) bytes, got \(raw.count)")
      }
      let tensor = try Tensor(uninitialized: type, shape: shape)
      if let start = raw.baseAddress {
        tensor.storage.baseAddress.copyMemory(from: start, byteCount: needed)
      }
      return tensor
    }
    return try typedTensor(proto, type, shape, label)
  }

  private static func shape(_ dims: [Int64], _ label: String) throws(HalfstepError) -> Shape {
    do throws(HalfstepError) {
      return try Shape(dims.map(Int.init))
    } catch {
      throw HalfstepError(.malformedFile, "\(label): \(error.message)")
    }
  }

  // MARK: Typed fields

  private func typedTensor(
    _ proto: ONNXTensorProto, _ type: DataType, _ shape: Shape, _ label: String
  ) throws(HalfstepError) -> Tensor {
    switch type {
    case .float32, .complex64:
      return try fill(proto.floatData, type, shape, label)
    case .float64, .complex128:
      return try fill(proto.doubleData, type, shape, label)
    case .int32:
      return try fill(proto.int32Data, type, shape, label)
    case .int64:
      return try fill(proto.int64Data, type, shape, label)
    case .uint64:
      return try fill(proto.uint64Data, type, shape, label)
    case .uint32:
      return try fill(narrowed(proto.uint64Data, to: UInt32.self, label), type, shape, label)
    case .uint16, .float16, .bfloat16:
      return try fill(narrowed(proto.int32Data, to: UInt16.self, label), type, shape, label)
    case .int16:
      return try fill(narrowed(proto.int32Data, to: Int16.self, label), type, shape, label)
    case .int8:
      return try fill(narrowed(proto.int32Data, to: Int8.self, label), type, shape, label)
    default:
      // One entry a byte: whole elements, or several sub-byte elements packed.
      return try fill(narrowed(proto.int32Data, to: UInt8.self, label), type, shape, label)
    }
  }

  private func fill<Element: BitwiseCopyable>(
    _ values: [Element], _ type: DataType, _ shape: Shape, _ label: String
  ) throws(HalfstepError) -> Tensor {
    let needed = Tensor.byteCount(of: type, count: shape.elementCount)
    let present = values.count * MemoryLayout<Element>.stride
    guard present == needed else {
      throw HalfstepError(
        .malformedFile, "\(label) \(shape) of \(type): expected \(needed) bytes, got \(present)")
    }
    let tensor = try Tensor(uninitialized: type, shape: shape)
    values.withUnsafeBytes { bytes in
      if let start = bytes.baseAddress {
        tensor.storage.baseAddress.copyMemory(from: start, byteCount: bytes.count)
      }
    }
    return tensor
  }

  /// Values as a narrower type; bit patterns may have been written sign-extended.
  private func narrowed<Wide: FixedWidthInteger, Narrow: FixedWidthInteger>(
    _ values: [Wide], to: Narrow.Type, _ label: String
  ) throws(HalfstepError) -> [Narrow] {
    var result: [Narrow] = []
    result.reserveCapacity(values.count)
    let lowest = Narrow.isSigned ? Int64(Narrow.min) : Int64(-1) << (Narrow.bitWidth - 1)
    for value in values {
      guard let wide = Int64(exactly: value), wide >= lowest, wide <= Int64(Narrow.max) else {
        throw HalfstepError(
          .malformedFile, "\(label): value \(value) does not fit in \(Narrow.bitWidth) bits")
      }
      result.append(Narrow(truncatingIfNeeded: value))
    }
    return result
  }
}

extension ONNXTensorProto {
  /// Removes what a named `Tensor` holds, keeping only what it cannot (and the name).
  mutating func clearValue() {
    dims = []
    clearDataType()
    clearRawData()
    floatData = []
    int32Data = []
    int64Data = []
    doubleData = []
    uint64Data = []
    clearDataLocation()
    externalData = []
  }

  /// This message if it holds more than its name.
  var shell: ONNXTensorProto? {
    var rest = self
    rest.clearName()
    return rest == ONNXTensorProto() ? nil : self
  }
}
