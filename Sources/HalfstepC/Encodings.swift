// SPDX-License-Identifier: Apache-2.0
// Exports: encodings and the fake-quantization kernel.

import CHalfstep
import Halfstep
import HalfstepNumerics

extension hs_encoding {
  init(_ encoding: Encoding, _ memory: LentMemory) {
    self.init()
    scales = memory.array(encoding.scales)
    zero_points = memory.array(encoding.zeroPoints)
    count = encoding.scales.count
    switch encoding.granularity {
    case .perTensor:
      granularity = hs_granularity(HS_GRANULARITY_PER_TENSOR)
    case .perChannel(let channelAxis):
      granularity = hs_granularity(HS_GRANULARITY_PER_CHANNEL)
      axis = Int32(clamping: channelAxis)
    case .perBlock(let channelAxis, let blockAxis, let size):
      granularity = hs_granularity(HS_GRANULARITY_PER_BLOCK)
      axis = Int32(clamping: channelAxis)
      block_axis = Int32(clamping: blockAxis)
      block_size = Int64(size)
    }
    bits = Int32(encoding.bits)
    is_signed = encoding.isSigned ? 1 : 0
    is_symmetric = encoding.isSymmetric ? 1 : 0
    is_strict = encoding.isStrict ? 1 : 0
  }
}

extension Encoding {
  /// - Throws: `HalfstepError.invalidArgument` for NULL, counts and numbers that no grid has.
  init(_ encoding: hs_encoding) throws(HalfstepError) {
    let count = try length(encoding.count, "encoding.count")
    let scales = UnsafeBufferPointer(
      start: try required(encoding.scales, "encoding.scales"), count: count)
    let zeroPoints = UnsafeBufferPointer(
      start: try required(encoding.zero_points, "encoding.zero_points"), count: count)
    let granularity: Granularity
    switch Int(encoding.granularity) {
    case HS_GRANULARITY_PER_TENSOR:
      granularity = .perTensor
    case HS_GRANULARITY_PER_CHANNEL:
      granularity = .perChannel(axis: Int(encoding.axis))
    case HS_GRANULARITY_PER_BLOCK:
      granularity = .perBlock(
        channelAxis: Int(encoding.axis), axis: Int(encoding.block_axis),
        size: Int(encoding.block_size))
    default:
      throw HalfstepError(.invalidArgument, "encoding: unknown granularity \(encoding.granularity)")
    }
    try self.init(
      bits: Int(encoding.bits), isSigned: encoding.is_signed != 0,
      isSymmetric: encoding.is_symmetric != 0, isStrict: encoding.is_strict != 0,
      granularity: granularity, scales: Array(scales), zeroPoints: Array(zeroPoints))
  }
}

@_cdecl("hs_fake_quantize") @implementation
public func hs_fake_quantize(
  _ input: UnsafePointer<hs_tensor_view>?, _ encoding: UnsafePointer<hs_encoding>?,
  _ outValues: UnsafeMutablePointer<Float>?, _ capacity: Int,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let view = try required(input, "input").pointee
    let encoding = try Encoding(try required(encoding, "encoding").pointee)
    let out = try required(outValues, "out_values")
    guard Int(bitPattern: out) % MemoryLayout<Float>.alignment == 0 else {
      throw HalfstepError(.invalidArgument, "out_values is not aligned to 4 bytes")
    }
    let tensor = try Tensor(viewing: view, "input")
    guard try length(capacity, "capacity") >= tensor.count else {
      throw HalfstepError(
        .invalidArgument, "out_values: expected room for \(tensor.count), got \(capacity)")
    }
    let layout = try encoding.layout(for: tensor.shape)
    try tensor.withFloats { (values) throws(HalfstepError) in
      if let start = values.baseAddress, !values.isEmpty {
        encoding.fakeQuantize(start, into: out, layout: layout)
      }
    }
  }
}
