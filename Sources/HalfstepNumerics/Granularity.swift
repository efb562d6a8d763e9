// SPDX-License-Identifier: Apache-2.0
// Which elements of a tensor share a scale.

/// Which elements of a tensor share one scale and zero point.
public enum Granularity: Hashable, Sendable {
  /// One scale for the whole tensor.
  case perTensor
  /// One scale for each index along `axis`; scales have shape `[extent(axis)]`.
  case perChannel(axis: Int)
  /// One scale for each channel and each run of `size` indices along `axis`, where the last run may
  /// be shorter; scales have shape `[extent(channelAxis), ceil(extent(axis)/size)]`, row-major.
  case perBlock(channelAxis: Int, axis: Int, size: Int)

  /// Number of scales for a tensor of the given shape.
  ///
  /// - Throws: `HalfstepError.invalidArgument` if an axis is outside the shape or a block is empty.
  public func groupCount(for shape: Shape) throws(HalfstepError) -> Int {
    switch self {
    case .perTensor:
      return 1
    case .perChannel(let axis):
      try check(axis, in: shape)
      return shape[axis]
    case .perBlock(let channelAxis, let axis, let size):
      try check(channelAxis, in: shape)
      try check(axis, in: shape)
      guard size > 0, axis != channelAxis else {
        throw HalfstepError(
          .invalidArgument, "block of \(size) along axis \(axis), channels on \(channelAxis)")
      }
      return shape[channelAxis] * Self.blockCount(extent: shape[axis], size: size)
    }
  }

  /// Number of blocks along an axis; any positive size will do, however large.
  package static func blockCount(extent: Int, size: Int) -> Int {
    extent == 0 ? 0 : (extent - 1) / size + 1
  }

  private func check(_ axis: Int, in shape: Shape) throws(HalfstepError) {
    guard axis >= 0, axis < shape.rank else {
      throw HalfstepError(.invalidArgument, "axis \(axis) is outside shape \(shape)")
    }
  }
}
