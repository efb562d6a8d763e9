// SPDX-License-Identifier: Apache-2.0
// Extremes of a tensor's groups.

extension Tensor {
  /// Finds the extremes of every group.
  ///
  /// - Parameter granularity: Which elements form a group; per channel for the range of each channel.
  /// - Returns: Minimum and maximum of each group; (∞, −∞) for a group without elements.
  /// - Throws: `HalfstepError.nonFiniteValue` if a value is NaN or infinite; `.typeMismatch` unless
  ///   float32; `.invalidArgument` for an axis outside the shape.
  /// - Complexity: O(elements); one read.
  package func ranges(_ granularity: Granularity) throws(HalfstepError) -> GroupRanges {
    let layout = try GroupLayout(granularity, shape: shape)
    return try withFloats { (values) throws(HalfstepError) in
      guard let start = values.baseAddress else {
        throw HalfstepError(.internalError, "tensor \(shape) without storage")
      }
      return try layout.ranges(of: start)
    }
  }

  /// Finds the largest magnitude of every channel along an axis.
  ///
  /// - Returns: `max |x|` for each index along the axis; 0 for a channel without elements.
  /// - Throws: As `ranges(_:)`.
  /// - Complexity: O(elements); one read.
  package func channelMagnitudes(axis: Int) throws(HalfstepError) -> [Float] {
    try ranges(.perChannel(axis: axis)).magnitude
  }
}
