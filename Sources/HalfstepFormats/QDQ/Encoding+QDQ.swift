// SPDX-License-Identifier: Apache-2.0
// Operands of QuantizeLinear and DequantizeLinear for an encoding.

import HalfstepNumerics

extension Encoding {
  /// The narrowest ONNX type that holds the codes and that integer runtimes know.
  var storageType: DataType {
    switch bits {
    case 4: isSigned ? .int4 : .uint4
    case ...8: isSigned ? .int8 : .uint8
    case ...16: isSigned ? .int16 : .uint16
    default: isSigned ? .int32 : .uint32
    }
  }

  /// Whether the storage type has codes that the grid lacks.
  var isNarrowerThanStorage: Bool { isStrict || storageType.bitWidth != bits }

  /// The operand `y_scale` for a tensor of a shape.
  func scaleOperand(for shape: Shape) throws(HalfstepError) -> Tensor {
    let extents = try operandShape(for: shape)
    return try Tensor(expanded(scales, over: extents), shape: extents)
  }

  /// The operand `y_zero_point` for a tensor of a shape.
  func zeroPointOperand(for shape: Shape) throws(HalfstepError) -> Tensor {
    let extents = try operandShape(for: shape)
    return try Self.pack(expanded(zeroPoints, over: extents), storageType, shape: extents)
  }

  /// The codes of a tensor's values, in the storage type.
  ///
  /// - Throws: `HalfstepError.typeMismatch` unless float32; `.shapeMismatch`; `.outOfMemory`.
  func codes(of tensor: Tensor) throws(HalfstepError) -> Tensor {
    let layout = try layout(for: tensor.shape)
    var codes = [Int32](repeating: 0, count: tensor.count)
    try tensor.withFloats { (values) throws(HalfstepError) in
      for index in 0..<layout.runCount {
        let run = layout.run(index)
        let low = Double(minimumCode - Int(zeroPoints[run.group]))
        let high = Double(maximumCode - Int(zeroPoints[run.group]))
        let reciprocal = 1 / scales[run.group]
        for element in run.offset..<run.offset + run.count {
          // Wide grids need a wider product; narrow ones round as the simulation does.
          let scaled =
            bits > 16
            ? Double(values[element]) / Double(scales[run.group])
            : Double(values[element] * reciprocal)
          let rounded = scaled.rounded(.toNearestOrEven)
          // NaN compares false and takes the lowest code.
          let clamped = rounded > low ? min(rounded, high) : low
          codes[element] = Int32(clamped) + zeroPoints[run.group]
        }
      }
    }
    return try Self.pack(codes, storageType, shape: tensor.shape.dimensions)
  }

  /// Extents of scales and zero points: those of the tensor with blocks counted along their axis.
  private func operandShape(for shape: Shape) throws(HalfstepError) -> [Int] {
    switch granularity {
    case .perTensor: return []
    case .perChannel: return [scales.count]
    case .perBlock(_, let axis, let size):
      guard try granularity.groupCount(for: shape) == scales.count else {
        throw HalfstepError(
          .shapeMismatch, "\(scales.count) scales do not fit blocks of shape \(shape)")
      }
      var extents = shape.dimensions
      extents[axis] = Granularity.blockCount(extent: extents[axis], size: size)
      return extents
    }
  }

  /// One value for each element of an operand; those of a block repeat along the axes that do not
  /// decide the group.
  private func expanded<Value>(_ values: [Value], over extents: [Int]) -> [Value] {
    guard case .perBlock(let channelAxis, let axis, _) = granularity else { return values }
    let blocks = extents[axis]
    func stride(_ axis: Int) -> Int { extents[(axis + 1)...].reduce(1, *) }
    let (channelStride, blockStride) = (stride(channelAxis), stride(axis))
    return (0..<extents.reduce(1, *)).map { element in
      values[
        element / channelStride % extents[channelAxis] * blocks + element / blockStride % blocks]
    }
  }

  /// Codes in an integer type of 4 to 32 bits.
  private static func pack(
    _ codes: [Int32], _ type: DataType, shape: [Int]
  ) throws(HalfstepError) -> Tensor {
    switch type.bitWidth {
    case 4:
      // Two codes a byte, the first in the low half.
      var bytes = [UInt8](repeating: 0, count: (codes.count + 1) / 2)
      for (index, code) in codes.enumerated() {
        bytes[index / 2] |= UInt8(truncatingIfNeeded: code & 0xF) << (index % 2 == 0 ? 0 : 4)
      }
      let shape = try Shape(shape)
      let storage = try TensorStorage(byteCount: bytes.count)
      storage.baseAddress.copyMemory(from: bytes, byteCount: bytes.count)
      return try Tensor(type, shape: shape, storage: storage)
    case 8:
      return try Tensor(
        elements: codes.map { UInt8(truncatingIfNeeded: $0) }, type, shape: shape)
    case 16:
      return try Tensor(
        elements: codes.map { UInt16(truncatingIfNeeded: $0) }, type, shape: shape)
    default:
      return try Tensor(elements: codes, type, shape: shape)
    }
  }
}
