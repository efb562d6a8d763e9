// SPDX-License-Identifier: Apache-2.0
// Integer codes of values, and back.

extension Encoding {
  /// The smallest integer type that holds all codes and that ONNX can compute with.
  ///
  /// 8 and 16 bits, signed or not, or int32 for biases; narrower codes are stored in 8 bits.
  package var codeType: DataType {
    if bits > 16 { return .int32 }
    if bits > 8 { return isSigned ? .int16 : .uint16 }
    return isSigned ? .int8 : .uint8
  }

  /// Rounds values to integer codes: `clamp(round(x · (1/scale))) + zeroPoint`, half to even.
  ///
  /// `scale · (code − zeroPoint)` is what `fakeQuantize(_:)` gives for the same value, bit for bit, for
  /// codes up to 16 bits. NaN becomes the lowest code.
  ///
  /// - Parameters:
  ///   - tensor: Values, float32, any shape that the granularity's axes fit.
  ///   - dataType: An integer type that holds every code; `codeType` by default. 4-bit codes are packed
  ///     two to a byte, the first in the low half, as in ONNX.
  /// - Returns: Codes, same shape.
  /// - Throws: `HalfstepError.typeMismatch` for values that are not float32 or a type that cannot hold
  ///   the codes; `.shapeMismatch`, `.invalidArgument`, `.outOfMemory` as `fakeQuantize(_:)`.
  /// - Complexity: O(elements).
  package func quantize(
    _ tensor: Tensor, as dataType: DataType? = nil
  ) throws(HalfstepError) -> Tensor {
    let dataType = dataType ?? codeType
    guard let limits = dataType.codeLimits, limits.lowerBound <= minimumCode,
      limits.upperBound >= maximumCode
    else {
      throw HalfstepError(
        .typeMismatch, "\(dataType) does not hold codes \(minimumCode)...\(maximumCode)")
    }
    let layout = try layout(for: tensor.shape)
    let codes = try tensor.withFloats { (values) throws(HalfstepError) -> [Int32] in
      self.codes(of: values, layout: layout)
    }
    switch dataType {
    case .int8: return try pack(codes, Int8.self, dataType, tensor.shape)
    case .uint8: return try pack(codes, UInt8.self, dataType, tensor.shape)
    case .int16: return try pack(codes, Int16.self, dataType, tensor.shape)
    case .uint16: return try pack(codes, UInt16.self, dataType, tensor.shape)
    case .int32: return try pack(codes, Int32.self, dataType, tensor.shape)
    default: return try packHalves(codes, dataType, tensor.shape)
    }
  }

  /// Turns codes into the reals they stand for: `scale · (code − zeroPoint)`.
  ///
  /// Codes outside the grid are not clamped. The difference is exact in 64 bits and rounded once to
  /// float before the product.
  ///
  /// - Parameter codes: int4, uint4, int8, uint8, int16, uint16 or int32.
  /// - Returns: Values, float32, same shape.
  /// - Throws: `HalfstepError.typeMismatch` for another type; `.shapeMismatch`, `.invalidArgument`,
  ///   `.outOfMemory` as `fakeQuantize(_:)`.
  /// - Complexity: O(elements).
  package func dequantize(_ codes: Tensor) throws(HalfstepError) -> Tensor {
    let layout = try layout(for: codes.shape)
    let integers = try codes.codeIntegers()
    var result = try Tensor(uninitialized: .float32, shape: codes.shape)
    try result.withMutableFloats { (values) throws(HalfstepError) in
      for index in 0..<layout.runCount {
        let run = layout.run(index)
        let scale = scales[run.group]
        let zero = Int(zeroPoints[run.group])
        for element in run.offset..<run.offset + run.count {
          values[element] = Float(Int(integers[element]) - zero) * scale
        }
      }
    }
    return result
  }

  // MARK: - Packing

  private func codes(of values: UnsafeBufferPointer<Float>, layout: GroupLayout) -> [Int32] {
    [Int32](unsafeUninitializedCapacity: values.count) { codes, initialized in
      initialized = values.count
      guard let source = values.baseAddress, let target = codes.baseAddress else { return }
      let grids = scales.indices.map { gridConstants(group: $0) }
      let runs = layout.runCount
      let grain = max(1, (1 << 15) / max(layout.elementCount / max(runs, 1), 1))
      Parallel.forEachRange(runs, grain: grain) { _, range in
        for index in range {
          let run = layout.run(index)
          let grid = grids[run.group]
          if bits > 16 {
            for element in run.offset..<run.offset + run.count {
              target[element] = wideCode(source[element], grid)
            }
          } else {
            codeRun(
              source + run.offset, target + run.offset, count: run.count, grid: grid,
              zeroPoint: zeroPoints[run.group])
          }
        }
      }
    }
  }

  private func wideCode(_ value: Float, _ grid: GridConstants) -> Int32 {
    let rounded = Double((value * grid.reciprocal).rounded(.toNearestOrEven))
    // NaN fails the comparison and becomes the lowest code.
    let low = Double(minimumCode)
    let high = Double(maximumCode)
    return Int32(rounded > low ? min(rounded, high) : low)
  }

  private func pack<Code: FixedWidthInteger & BitwiseCopyable>(
    _ codes: [Int32], _ type: Code.Type, _ dataType: DataType, _ shape: Shape
  ) throws(HalfstepError) -> Tensor {
    try Tensor(
      elements: codes.map { Code(truncatingIfNeeded: $0) }, dataType, shape: shape.dimensions)
  }

  private func packHalves(
    _ codes: [Int32], _ dataType: DataType, _ shape: Shape
  ) throws(HalfstepError) -> Tensor {
    let result = try Tensor(uninitialized: dataType, shape: shape)
    let bytes = result.storage.baseAddress.assumingMemoryBound(to: UInt8.self)
    for pair in 0..<result.byteCount {
      let low = UInt8(truncatingIfNeeded: codes[2 * pair]) & 15
      let high = 2 * pair + 1 < codes.count ? UInt8(truncatingIfNeeded: codes[2 * pair + 1]) : 0
      bytes[pair] = low | high << 4
    }
    return result
  }
}

/// Rounds contiguous values to codes of up to 16 bits.
@inline(never)
private func codeRun(
  _ source: UnsafePointer<Float>, _ target: UnsafeMutablePointer<Int32>, count: Int,
  grid: GridConstants, zeroPoint: Int32
) {
  let low = Lanes(repeating: grid.low)
  let high = Lanes(repeating: grid.high)
  // The bits of a float near 1.5·2²³ hold its integer part.
  let shift = SIMD16<Int32>(repeating: Int32(bitPattern: roundingMagic.bitPattern) &- zeroPoint)
  var index = 0
  while index &+ Lanes.width <= count {
    let scaled = Lanes(loading: source + index) * grid.reciprocal
    let sum = scaled.atLeast(low).atMost(high) + roundingMagic
    let codes = unsafeBitCast(sum, to: SIMD16<Int32>.self) &- shift
    UnsafeMutableRawPointer(target + index).storeBytes(of: codes, as: SIMD16<Int32>.self)
    index &+= Lanes.width
  }
  while index < count {
    let scaled = source[index] * grid.reciprocal
    let floored = scaled > grid.low ? scaled : grid.low
    let sum = (floored < grid.high ? floored : grid.high) + roundingMagic
    target[index] = Int32(bitPattern: sum.bitPattern) &- shift[0]
    index &+= 1
  }
}

extension DataType {
  /// Codes that an integer type of quantization holds; nil for other types.
  var codeLimits: ClosedRange<Int>? {
    switch self {
    case .int4: -8...7
    case .uint4: 0...15
    case .int8: -128...127
    case .uint8: 0...255
    case .int16: -32768...32767
    case .uint16: 0...65535
    case .int32: Int(Int32.min)...Int(Int32.max)
    default: nil
    }
  }
}

extension Tensor {
  /// Elements of an integer tensor of up to 32 bits.
  ///
  /// - Throws: `HalfstepError.typeMismatch` for other types.
  func codeIntegers() throws(HalfstepError) -> [Int32] {
    func widened<Code: FixedWidthInteger & BitwiseCopyable>(
      _ type: Code.Type
    ) throws(HalfstepError) -> [Int32] {
      try withElements(dataType) { (codes: UnsafeBufferPointer<Code>) throws(HalfstepError) in
        codes.map { Int32(truncatingIfNeeded: $0) }
      }
    }
    switch dataType {
    case .int8: return try widened(Int8.self)
    case .uint8: return try widened(UInt8.self)
    case .int16: return try widened(Int16.self)
    case .uint16: return try widened(UInt16.self)
    case .int32: return try widened(Int32.self)
    case .int4, .uint4:
      let bytes = storage.baseAddress.assumingMemoryBound(to: UInt8.self)
      return (0..<count).map { index in
        let half = index.isMultiple(of: 2) ? bytes[index / 2] & 15 : bytes[index / 2] >> 4
        return dataType == .int4 ? Int32(Int8(bitPattern: half << 4) >> 4) : Int32(half)
      }
    default:
      throw HalfstepError(.typeMismatch, "tensor \(shape): \(dataType) is not a type of codes")
    }
  }
}
