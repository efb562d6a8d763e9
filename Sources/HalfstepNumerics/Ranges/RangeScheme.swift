// SPDX-License-Identifier: Apache-2.0
// How a quantizer's range is chosen from what it saw.

/// How a range is chosen from the values that a quantizer saw.
public enum RangeScheme: Hashable, Sendable {
  /// The smallest and the largest value.
  case minMax
  /// The grid with the best signal-to-quantization-noise ratio, clipping noise weighted by 3
  /// (AIMET's "tf_enhanced").
  case sqnr
  /// Quantiles: the share `1 − p/100` of values is clipped at each end; `p` is 50...100.
  case percentile(Double)
  /// The grid with the least mean squared error.
  case mse
  /// The grid whose distribution of codes diverges least (Kullback-Leibler) from the data's.
  case entropy
}
