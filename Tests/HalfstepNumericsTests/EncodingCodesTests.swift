// SPDX-License-Identifier: Apache-2.0
// Integer codes: worked cases, agreement with fake quantization, errors.

import HalfstepNumerics
import TestSupport
import Testing

@Suite struct EncodingCodesTests {
  @Test func workedCodes() throws {
    // Scale 0.5, zero point 3, codes 0...15: 0.25 and 0.75 are ties and go to even steps.
    let encoding = try Encoding(
      bits: 4, isSigned: false, isSymmetric: false, scales: [0.5], zeroPoints: [3])
    let values = try Tensor([-9, -1.5, 0, 0.25, 0.75, 6, 99], shape: [7])
    let codes = try encoding.quantize(values)
    #expect(codes.dataType == .uint8)
    #expect(try bytes(codes) == [0, 0, 3, 3, 5, 15, 15])
    // Packed: first code in the low half; the last byte has one code.
    #expect(try bytes(encoding.quantize(values, as: .uint4)) == [0x00, 0x33, 0xF5, 0x0F])
    let reals = try encoding.dequantize(encoding.quantize(values, as: .uint4))
    #expect(try reals.floats() == [-1.5, -1.5, 0, 0, 1, 6, 6])
  }

  @Test(arguments: [2, 3, 4, 7, 8, 12, 16]) func codesEqualFakeQuantization(bits: Int) throws {
    let shape = try Shape([5, 7, 6])
    var random = SeededGenerator(seed: 11)
    let values = try Tensor(
      (0..<shape.elementCount).map { _ in Float.random(in: -3...3, using: &random) },
      shape: shape.dimensions)
    let granularities: [Granularity] = [
      .perTensor, .perChannel(axis: 0), .perChannel(axis: 1), .perChannel(axis: 2),
      .perBlock(channelAxis: 0, axis: 1, size: 3), .perBlock(channelAxis: 2, axis: 1, size: 4),
    ]
    for granularity in granularities {
      for isSymmetric in [true, false] {
        let spec = QuantizerSpec(
          bits: bits, isSymmetric: isSymmetric, granularity: granularity)
        let encoding = try Encoding.make(for: values, spec: spec, scheme: .minMax)
        let simulated = try encoding.fakeQuantize(values).floats()
        var types: [DataType] = [encoding.codeType, .int32]
        if bits <= 4 { types.append(isSymmetric ? .int4 : .uint4) }
        for type in types {
          let codes = try encoding.quantize(values, as: type)
          #expect(try encoding.dequantize(codes).floats() == simulated)
        }
      }
    }
  }

  @Test func biasCodesReachTheEndsOf32Bits() throws {
    let encoding = try Encoding(
      bits: 32, isSigned: true, isSymmetric: true, scales: [1], zeroPoints: [0])
    let codes = try encoding.quantize(
      Tensor([3e9, -3e9, 2.5, .nan, 16_777_216], shape: [5]))
    let expected: [Int] = [2_147_483_647, -2_147_483_648, 2, -2_147_483_648, 16_777_216]
    #expect(try codes.integers() == expected)
  }

  @Test func typesThatDoNotHoldTheCodesAreRefused() throws {
    let encoding = try Encoding(
      bits: 8, isSigned: false, isSymmetric: false, scales: [1], zeroPoints: [3])
    let values = try Tensor([1], shape: [1])
    for type in [DataType.int8, .uint4, .float32, .bool, .int64] {
      #expect(throws: HalfstepError.self) { try encoding.quantize(values, as: type) }
    }
    #expect(throws: HalfstepError.self) { try encoding.dequantize(values) }
    #expect(throws: HalfstepError.self) { try encoding.quantize(Tensor([Int64(1)])) }
  }

  private func bytes(_ tensor: Tensor) throws -> [UInt8] {
    let start = tensor.storage.baseAddress.assumingMemoryBound(to: UInt8.self)
    return Array(UnsafeBufferPointer(start: start, count: tensor.byteCount))
  }
}
