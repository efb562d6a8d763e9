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

/// The caller's memory for the floats of a tensor.
private func output(
  _ pointer: UnsafeMutablePointer<Float>?, _ capacity: Int, for tensor: Tensor,
  _ name: StaticString
) throws(HalfstepError) -> UnsafeMutablePointer<Float> {
  let out = try required(pointer, name)
  guard Int(bitPattern: out) % MemoryLayout<Float>.alignment == 0 else {
    throw HalfstepError(.invalidArgument, "\(name) is not aligned to 4 bytes")
  }
  guard try length(capacity, "capacity") >= tensor.count else {
    throw HalfstepError(
      .invalidArgument, "\(name): expected room for \(tensor.count), got \(capacity)")
  }
  return out
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
    _ = try required(outValues, "out_values")
    let tensor = try Tensor(viewing: view, "input")
    let out = try output(outValues, capacity, for: tensor, "out_values")
    let layout = try encoding.layout(for: tensor.shape)
    try tensor.withFloats { (values) throws(HalfstepError) in
      if let start = values.baseAddress, !values.isEmpty {
        encoding.fakeQuantize(start, into: out, layout: layout)
      }
    }
  }
}

@_cdecl("hs_fake_quantize_backward") @implementation
public func hs_fake_quantize_backward(
  _ input: UnsafePointer<hs_tensor_view>?, _ encoding: UnsafePointer<hs_encoding>?,
  _ minimums: UnsafePointer<Float>?, _ upstream: UnsafePointer<hs_tensor_view>?,
  _ outInput: UnsafeMutablePointer<Float>?, _ capacity: Int,
  _ outMinimums: UnsafeMutablePointer<Float>?, _ outMaximums: UnsafeMutablePointer<Float>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let view = try required(input, "input").pointee
    let encoding = try Encoding(try required(encoding, "encoding").pointee)
    let upstreamView = try required(upstream, "upstream").pointee
    _ = try required(outInput, "out_input")
    let tensor = try Tensor(viewing: view, "input")
    let gradient = try Tensor(viewing: upstreamView, "upstream")
    guard tensor.shape == gradient.shape else {
      throw HalfstepError(
        .shapeMismatch, "upstream gradient: expected \(tensor.shape), got \(gradient.shape)")
    }
    let out = try output(outInput, capacity, for: tensor, "out_input")
    let layout = try encoding.layout(for: tensor.shape)
    let grid = try tensor.withFloats { (values) throws(HalfstepError) in
      try gradient.withFloats { (upstream) throws(HalfstepError) in
        try encoding.fakeQuantizeGradients(
          of: values, upstream: upstream,
          into: UnsafeMutableBufferPointer(start: out, count: values.count), layout: layout)
      }
    }
    if outMinimums == nil && outMaximums == nil { return }
    let ends = try grid.ends(
      of: encoding,
      minimums: minimums.map { Array(UnsafeBufferPointer(start: $0, count: encoding.scales.count)) }
    )
    for group in encoding.scales.indices {
      outMinimums?[group] = Float(ends.minimum[group])
      outMaximums?[group] = Float(ends.maximum[group])
    }
  }
}

@_cdecl("hs_encoding_from_range") @implementation
public func hs_encoding_from_range(
  _ minimums: UnsafePointer<Float>?, _ maximums: UnsafePointer<Float>?, _ count: Int,
  _ bits: Int32, _ isSigned: Int32, _ isSymmetric: Int32, _ isStrict: Int32,
  _ outScales: UnsafeMutablePointer<Float>?, _ outZeroPoints: UnsafeMutablePointer<Int32>?,
  _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let count = try length(count, "count")
    let encoding = try Encoding.spanning(
      minimums: UnsafeBufferPointer(start: try required(minimums, "minimums"), count: count),
      maximums: UnsafeBufferPointer(start: try required(maximums, "maximums"), count: count),
      bits: Int(bits), isSigned: isSigned != 0, isSymmetric: isSymmetric != 0,
      isStrict: isStrict != 0)
    let scales = try required(outScales, "out_scales")
    let zeroPoints = try required(outZeroPoints, "out_zero_points")
    for group in 0..<count {
      scales[group] = encoding.scales[group]
      zeroPoints[group] = encoding.zeroPoints[group]
    }
  }
}

@_cdecl("hs_encoding_to_range") @implementation
public func hs_encoding_to_range(
  _ encoding: UnsafePointer<hs_encoding>?, _ outMinimums: UnsafeMutablePointer<Float>?,
  _ outMaximums: UnsafeMutablePointer<Float>?, _ error: UnsafeMutablePointer<hs_error>?
) -> hs_status {
  report(to: error) { () throws(HalfstepError) in
    let encoding = try Encoding(try required(encoding, "encoding").pointee)
    let minimums = try required(outMinimums, "out_minimums")
    let maximums = try required(outMaximums, "out_maximums")
    let ends = try encoding.ends()
    for group in encoding.scales.indices {
      minimums[group] = ends.minimums[group]
      maximums[group] = ends.maximums[group]
    }
  }
}
