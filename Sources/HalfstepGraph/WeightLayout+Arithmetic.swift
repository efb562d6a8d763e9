// SPDX-License-Identifier: Apache-2.0
// Arithmetic on weights by output and input channel.

import HalfstepNumerics

extension WeightLayout {
  /// Multiplies each weight by its output channel's and its input channel's factor.
  ///
  /// Computes in `Double` and rounds once.
  ///
  /// - Parameters:
  ///   - weight: Float weights in this layout.
  ///   - outputFactors: Factors, `[K]`; nil for ones.
  ///   - inputFactors: Factors, `[C]`; nil for ones.
  /// - Returns: A new tensor of the same shape.
  /// - Throws: `HalfstepError.nonFiniteValue` for a NaN or infinite product; `.typeMismatch` unless the
  ///   weight is float32; `.outOfMemory`.
  /// - Complexity: O(weights), on all threads.
  package func scaled(
    _ weight: Tensor, outputFactors: [Double]?, inputFactors: [Double]?
  ) throws(HalfstepError) -> Tensor {
    var result = try Tensor(uninitialized: .float32, shape: weight.shape)
    let outerFactors = (outputIsOuter ? outputFactors : inputFactors)
      ?? [Double](repeating: 1, count: groups * outer)
    let innerFactors = (outputIsOuter ? inputFactors : outputFactors)
      ?? [Double](repeating: 1, count: groups * inner)
    let (outer, inner, spatial) = (outer, inner, spatial)
    let rowLength = inner * spatial
    // Largest bit pattern without the sign, by thread: from that of infinity on, something is not finite.
    var largest = [UInt32](repeating: 0, count: Parallel.maximumThreads)
    try weight.withFloats { (source) throws(HalfstepError) in
      try result.withMutableFloats { (target) throws(HalfstepError) in
        nonisolated(unsafe) let target = target
        largest.withUnsafeMutableBufferPointer { largest in
        nonisolated(unsafe) let largest = largest
        Parallel.forEachRange(groups * outer, grain: 1 + 65_536 / rowLength) { thread, rows in
          var bits: UInt32 = 0
          innerFactors.withUnsafeBufferPointer { innerFactors in
            for row in rows {
              let outerFactor = outerFactors[row]
              let firstInner = row / outer * inner
              let start = row * rowLength
              if spatial == 1 {
                for column in 0..<inner {
                  let factor = outerFactor * innerFactors[firstInner + column]
                  let value = Float(Double(source[start + column]) * factor)
                  target[start + column] = value
                  bits = max(bits, value.bitPattern & 0x7FFF_FFFF)
                }
              } else {
                for column in 0..<inner {
                  let factor = outerFactor * innerFactors[firstInner + column]
                  let first = start + column * spatial
                  for element in first..<first + spatial {
                    let value = Float(Double(source[element]) * factor)
                    target[element] = value
                    bits = max(bits, value.bitPattern & 0x7FFF_FFFF)
                  }
                }
              }
            }
          }
          largest[thread] = max(largest[thread], bits)
        }
        }
      }
    }
    guard largest.allSatisfy({ $0 < Float.infinity.bitPattern }) else {
      throw HalfstepError(.nonFiniteValue, "weight \(weight.shape): NaN or infinite")
    }
    return result
  }

  /// Largest magnitude of each kernel slice, `[groups, outer, inner]`.
  ///
  /// - Complexity: O(weights), on all threads.
  package func sliceMagnitudes(_ weight: Tensor) throws(HalfstepError) -> [Float] {
    let (rowLength, inner, spatial) = (inner * spatial, inner, spatial)
    let rowCount = groups * outer
    return try weight.withFloats { (source) throws(HalfstepError) in
      [Float](unsafeUninitializedCapacity: rowCount * inner) { target, count in
        nonisolated(unsafe) let target = target
        Parallel.forEachRange(rowCount, grain: 1 + 65_536 / rowLength) { _, rows in
          for slice in rows.lowerBound * inner..<rows.upperBound * inner {
            var largest: Float = 0
            for element in slice * spatial..<(slice + 1) * spatial {
              largest = max(largest, abs(source[element]))
            }
            target.initializeElement(at: slice, to: largest)
          }
        }
        count = rowCount * inner
      }
    }
  }

  /// What a constant input of one value per channel adds to each output channel where the kernel sees
  /// no padding: the kernels' sums times the values.
  ///
  /// - Parameters:
  ///   - weight: Float weights in this layout.
  ///   - values: Input values, `[C]`.
  /// - Returns: Sums, `[K]`.
  package func response(_ weight: Tensor, to values: [Double]) throws(HalfstepError) -> [Double] {
    let (outer, inner, spatial, outputIsOuter) = (outer, inner, spatial, outputIsOuter)
    var sums = [Double](repeating: 0, count: outputChannels)
    try weight.withFloats { (source) throws(HalfstepError) in
      for row in 0..<groups * outer {
        let firstInner = row / outer * inner
        for column in 0..<inner {
          let first = (row * inner + column) * spatial
          var kernel = 0.0
          for element in first..<first + spatial { kernel += Double(source[element]) }
          if outputIsOuter {
            sums[row] += kernel * values[firstInner + column]
          } else {
            sums[firstInner + column] += kernel * values[row]
          }
        }
      }
    }
    return sums
  }
}
