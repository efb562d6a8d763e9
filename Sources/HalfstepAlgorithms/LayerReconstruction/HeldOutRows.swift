// SPDX-License-Identifier: Apache-2.0
// How well a candidate for a layer does on rows that nothing was learned from.

import HalfstepGraph
import HalfstepNumerics

/// Rows of a layer that nothing is learned from, and what the float layer makes of them.
package final class HeldOutRows {
  private let layout: WeightLayout
  private let bias: [Double]
  private let alpha: Double
  private let groups: Int
  private let columns: Int
  /// Number of rows.
  package private(set) var count = 0
  /// With the quantized prefix, `[groups, columns, count]`.
  private var rows: [Float] = []
  /// Outputs of the float layer on its own input, `[K, count]`, without alpha and bias, with what the
  /// layer has to make up for.
  private var wanted: [Float] = []
  /// Power of the float layer's outputs around their means, summed over channels.
  package private(set) var signal = 0.0

  /// Floats that the rows may take.
  private static let capacity = 1 << 23

  init(_ problem: LayerProblem) throws(HalfstepError) {
    layout = problem.layer.layout
    bias = problem.bias
    alpha = problem.alpha
    groups = layout.groups
    columns = layout.columns
    let limit = max(
      16, min(problem.options.heldOutRows, Self.capacity / max(groups * columns, 1)))
    var parts: [(chunk: Int, rows: [Int])] = []
    for chunk in 0..<problem.chunkCount where problem.chunkCount == 1 || problem.isHeldOut(chunk) {
      let input = try problem.inputs(chunk).quantized
      let unfolding = try problem.unfolding(input.shape)
      let chosen = problem.rows(chunk, of: unfolding.rowCount, isHeldOut: true, limit: limit)
      parts.append((chunk, chosen))
      count += chosen.count
    }
    let matrices = try Self.matrices(of: problem.weight, layout)
    let outputs = layout.outputsPerGroup
    rows = [Float](repeating: 0, count: groups * columns * count)
    wanted = [Float](repeating: 0, count: groups * outputs * count)
    var start = 0
    for (chunk, chosen) in parts where !chosen.isEmpty {
      let inputs = try problem.inputs(chunk)
      let unfolding = try problem.unfolding(inputs.quantized.shape)
      let table = unfolding.table(chosen)
      try gather(inputs.quantized, unfolding, table, into: &rows, start)
      var reference = [Float](repeating: 0, count: groups * columns * chosen.count)
      let total = count
      count = chosen.count
      defer { count = total }
      try gather(inputs.reference, unfolding, table, into: &reference, 0)
      for group in 0..<groups {
        try Self.multiply(
          matrices[group], outputs, columns, reference, group * columns * chosen.count,
          chosen.count, chosen.count, scale: 1, into: &wanted, group * outputs * total + start,
          total)
      }
      if let errors = try problem.sumErrors(chunk, chosen, unfolding) {
        for channel in 0..<groups * outputs {
          for row in 0..<chosen.count {
            wanted[channel * total + start + row] += errors[channel * chosen.count + row]
          }
        }
      }
      start += chosen.count
    }
    for channel in 0..<groups * outputs {
      signal += Self.variance(wanted[channel * count..<(channel + 1) * count])
    }
  }

  /// Noise that a candidate adds to the layer's output, over the power of the float output.
  ///
  /// - Parameters:
  ///   - weight: Shape of the layer's weight.
  ///   - bias: The candidate's bias, `[K]`; nil for the layer's own.
  /// - Returns: `Σ (y − ŷ)² / Σ (y − mean y)²`; 0 without rows or noise.
  package func noise(weight: Tensor, bias: [Double]?) throws(HalfstepError) -> Double {
    if count == 0 { return 0 }
    let matrices = try Self.matrices(of: weight, layout)
    let outputs = layout.outputsPerGroup
    var noise = 0.0
    for group in 0..<groups {
      var difference = Array(
        wanted[group * outputs * count..<(group + 1) * outputs * count])
      try Self.multiply(
        matrices[group], outputs, columns, rows, group * columns * count, count, count, scale: -1,
        into: &difference, 0, count)
      for output in 0..<outputs {
        let channel = group * outputs + output
        let shift = bias.map { (self.bias[channel] - $0[channel]) / alpha } ?? 0
        for value in difference[output * count..<(output + 1) * count] {
          let error = Double(value) + shift
          noise += error * error
        }
      }
    }
    // A silent layer has nothing to compare with.
    return signal > 0 ? noise / signal : (noise > 0 ? .infinity : 0)
  }

  // MARK: Helpers

  private func gather(
    _ tensor: Tensor, _ unfolding: LayerUnfolding, _ table: LayerUnfolding.RowTable,
    into panel: inout [Float], _ start: Int
  ) throws(HalfstepError) {
    let (groups, columns, count) = (groups, columns, count)
    try tensor.withFloats { (values) throws(HalfstepError) in
      panel.withUnsafeMutableBufferPointer { panel in
        guard let from = values.baseAddress, let to = panel.baseAddress else { return }
        nonisolated(unsafe) let source = from
        nonisolated(unsafe) let target = to
        Parallel.forEachRange(groups, grain: 1) { _, range in
          for group in range {
            unfolding.gather(
              table, group: group, from: source, into: target + group * columns * count + start,
              stride: count)
          }
        }
      }
    }
  }

  private static func multiply(
    _ matrix: [Float], _ outputs: Int, _ columns: Int, _ panel: [Float], _ panelStart: Int,
    _ rows: Int, _ stride: Int, scale: Float, into result: inout [Float], _ start: Int,
    _ resultStride: Int
  ) throws(HalfstepError) {
    var failure: HalfstepError?
    matrix.withUnsafeBufferPointer { a in
      panel.withUnsafeBufferPointer { b in
        result.withUnsafeMutableBufferPointer { c in
          guard let a = a.baseAddress, let b = b.baseAddress, let c = c.baseAddress else { return }
          do throws(HalfstepError) {
            try MatrixProduct.multiply(
              rows: outputs, columns: rows, inner: columns, .init(a, stride: columns),
              .init(b + panelStart, stride: stride), scale: scale, keep: 1, into: c + start,
              cStride: resultStride)
          } catch { failure = error }
        }
      }
    }
    if let failure { throw failure }
  }

  static func matrices(
    of weight: Tensor, _ layout: WeightLayout
  ) throws(HalfstepError) -> [[Float]] {
    try weight.withFloats { (values) throws(HalfstepError) in
      (0..<layout.groups).map { layout.matrix(of: values, group: $0) }
    }
  }

  private static func variance(_ values: ArraySlice<Float>) -> Double {
    if values.isEmpty { return 0 }
    let mean = values.reduce(0) { $0 + Double($1) } / Double(values.count)
    return values.reduce(0) { $0 + (Double($1) - mean) * (Double($1) - mean) }
  }
}
