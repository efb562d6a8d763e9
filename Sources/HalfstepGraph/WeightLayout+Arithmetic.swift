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
    var largest: UInt32 = 0
    try weight.withFloats { (source) throws(HalfstepError) in
      try result.withMutableFloats { (target) throws(HalfstepError) in
        guard let source = source.baseAddress, let target = target.baseAddress else { return }
        largest = scale(source, into: target, outputFactors, inputFactors)
      }
    }
    guard largest < Float.infinity.bitPattern else {
      throw HalfstepError(.nonFiniteValue, "weight \(weight.shape): NaN or infinite")
    }
    return result
  }

  /// Does what `scaled` does in the weight's own memory if nothing else refers to that.
  ///
  /// - Throws: `HalfstepError.typeMismatch` unless the weight is float32; `.outOfMemory` if the memory is
  ///   shared or borrowed and there is none for a copy. The weight is then unchanged.
  package func scale(
    _ weight: inout Tensor, outputFactors: [Double]?, inputFactors: [Double]?
  ) throws(HalfstepError) {
    try weight.withMutableFloats { (values) throws(HalfstepError) in
      guard let values = values.baseAddress else { return }
      _ = scale(values, into: values, outputFactors, inputFactors)
    }
  }

  /// Whether no product with factors of at most these magnitudes can be NaN or infinite; false if in
  /// doubt.
  ///
  /// - Complexity: O(weights), on all threads.
  package func staysFinite(
    _ weight: Tensor, outputFactors: [Double]?, inputFactors: [Double]?
  ) throws(HalfstepError) -> Bool {
    func bound(_ factors: [Double]?) -> Double {
      factors.map { $0.reduce(0) { $1.isNaN ? .infinity : max($0, abs($1)) } } ?? 1
    }
    let magnitude = try Self.largestMagnitude(weight)
    // Half of what a float can hold leaves room for every rounding.
    let limit = Double(Float.greatestFiniteMagnitude) / 2
    return magnitude.isFinite
      && Double(magnitude) * bound(outputFactors) * bound(inputFactors) < limit
  }

  /// The largest magnitude among floats; NaN counts as above infinity.
  ///
  /// - Complexity: O(elements), on all threads.
  package static func largestMagnitude(_ weight: Tensor) throws(HalfstepError) -> Float {
    var largest = [UInt32](repeating: 0, count: Parallel.maximumThreads)
    try weight.withFloats { (source) throws(HalfstepError) in
      guard let start = source.baseAddress else { return }
      nonisolated(unsafe) let source = start
      largest.withUnsafeMutableBufferPointer { largest in
        nonisolated(unsafe) let largest = largest
        Parallel.forEachRange(weight.count, grain: 65_536) { thread, elements in
          var bits: UInt32 = 0
          for element in elements { bits = max(bits, source[element].bitPattern & 0x7FFF_FFFF) }
          largest[thread] = max(largest[thread], bits)
        }
      }
    }
    return Float(bitPattern: largest.max() ?? 0)
  }

  /// Multiplies weights from one place into another, which may be the same; returns the largest bit
  /// pattern without the sign. From that of infinity on, something is not finite.
  private func scale(
    _ source: UnsafePointer<Float>, into target: UnsafeMutablePointer<Float>,
    _ outputFactors: [Double]?, _ inputFactors: [Double]?
  ) -> UInt32 {
    let outerFactors = outputIsOuter ? outputFactors : inputFactors
    // One factor for each element of a row, so that rows are straight runs.
    var rowFactors: [Double]?
    if let innerFactors = outputIsOuter ? inputFactors : outputFactors {
      rowFactors =
        spatial == 1
        ? innerFactors : innerFactors.flatMap { [Double](repeating: $0, count: spatial) }
    }
    let (outer, rowLength) = (outer, inner * spatial)
    nonisolated(unsafe) let (from, to) = (source, target)
    var largest = [UInt32](repeating: 0, count: Parallel.maximumThreads)
    largest.withUnsafeMutableBufferPointer { largest in
      nonisolated(unsafe) let largest = largest
      Parallel.forEachRange(groups * outer, grain: 1 + 65_536 / rowLength) { thread, rows in
        var bits: UInt32 = 0
        for row in rows {
          let factor = outerFactors?[row] ?? 1
          let start = row * rowLength
          let rowBits: UInt32
          if let rowFactors {
            rowBits = rowFactors.withUnsafeBufferPointer { factors in
              Self.scaleRun(
                from + start, to + start, rowLength, factor,
                factors.baseAddress! + row / outer * rowLength)
            }
          } else {
            rowBits = Self.scaleRun(from + start, to + start, rowLength, factor)
          }
          bits = max(bits, rowBits)
        }
        largest[thread] = max(largest[thread], bits)
      }
    }
    return largest.max() ?? 0
  }

  /// Multiplies a run by one factor; returns the largest bit pattern without the sign.
  private static func scaleRun(
    _ source: UnsafePointer<Float>, _ target: UnsafeMutablePointer<Float>, _ count: Int,
    _ factor: Double
  ) -> UInt32 {
    var bits: UInt32 = 0
    for element in 0..<count {
      let value = Float(Double(source[element]) * factor)
      target[element] = value
      bits = max(bits, value.bitPattern & 0x7FFF_FFFF)
    }
    return bits
  }

  /// Multiplies a run by one factor and by one for each element.
  private static func scaleRun(
    _ source: UnsafePointer<Float>, _ target: UnsafeMutablePointer<Float>, _ count: Int,
    _ factor: Double, _ factors: UnsafePointer<Double>
  ) -> UInt32 {
    var bits: UInt32 = 0
    for element in 0..<count {
      let value = Float(Double(source[element]) * (factor * factors[element]))
      target[element] = value
      bits = max(bits, value.bitPattern & 0x7FFF_FFFF)
    }
    return bits
  }

  /// One value for each kernel slice, `[groups · outer · inner]`, that has the slice's largest magnitude;
  /// the weight's own memory if slices have one element.
  package func slices(_ weight: Tensor) throws(HalfstepError) -> Tensor {
    let shape = try Shape([groups * outer * inner])
    if spatial == 1 { return try weight.reshaped(shape) }
    return try Tensor(sliceMagnitudes(weight), shape: shape.dimensions)
  }

  /// Largest magnitude of each kernel slice, `[groups, outer, inner]`; NaN counts as above infinity.
  ///
  /// - Complexity: O(weights), on all threads.
  package func sliceMagnitudes(_ weight: Tensor) throws(HalfstepError) -> [Float] {
    let (rowLength, inner, spatial) = (inner * spatial, inner, spatial)
    let rowCount = groups * outer
    return try weight.withFloats { (source) throws(HalfstepError) in
      guard let start = source.baseAddress else { return [] }
      nonisolated(unsafe) let source = start
      return [Float](unsafeUninitializedCapacity: rowCount * inner) { target, count in
        nonisolated(unsafe) let target = target.baseAddress!
        Parallel.forEachRange(rowCount, grain: 1 + 65_536 / rowLength) { _, rows in
          let slices = rows.lowerBound * inner..<rows.upperBound * inner
          // Bit patterns of magnitudes are ordered like the magnitudes.
          if spatial == 1 {
            for slice in slices {
              (target + slice).initialize(
                to: Float(bitPattern: source[slice].bitPattern & 0x7FFF_FFFF))
            }
            return
          }
          var element = source + slices.lowerBound * spatial
          for slice in slices {
            var bits: UInt32 = 0
            for _ in 0..<spatial {
              bits = max(bits, element.pointee.bitPattern & 0x7FFF_FFFF)
              element += 1
            }
            (target + slice).initialize(to: Float(bitPattern: bits))
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
