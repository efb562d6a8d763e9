// SPDX-License-Identifier: Apache-2.0
// Moves what rounding does to the mean of a layer's output into its bias.

import HalfstepGraph
import HalfstepNumerics

/// Moves what rounding to nearest does to the mean of a layer's output into its bias.
///
/// `b += E(w·x_float) − E(q·x)`, where x is the input behind a quantized prefix whose biases are
/// already corrected. Use with `LayerReconstruction.Options.writesWeights` off to change biases only.
///
/// - Reference: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
///   Correction", 2019, §4.2 and appendix D. arXiv:1906.04721
package struct EmpiricalBiasCorrection: LayerRounder, Sendable {
  package init() {}

  package func round(_ problem: LayerProblem) throws(HalfstepError) -> LayerRounding {
    let rounded = try problem.nearest.fakeQuantize(problem.weight)
    let note = "nearest, bias corrected"
    guard problem.canChangeBias else {
      return LayerRounding(weight: rounded, encoding: problem.nearest, note: "nearest")
    }
    let layout = problem.layer.layout
    var reference = [Double](repeating: 0, count: layout.groups * layout.columns)
    var quantized = reference
    var count = 0
    for chunk in 0..<problem.chunkCount {
      if problem.chunkCount > 1 && problem.isHeldOut(chunk) { continue }
      let inputs = try problem.inputs(chunk)
      let unfolding = try problem.unfolding(inputs.quantized.shape)
      let rows = problem.rows(
        chunk, of: unfolding.rowCount, isHeldOut: false, limit: problem.options.maximumRows)
      for start in stride(from: 0, to: rows.count, by: Self.height) {
        let table = unfolding.table(rows[start..<min(start + Self.height, rows.count)])
        try Self.addSums(inputs.reference, unfolding, table, to: &reference)
        try Self.addSums(inputs.quantized, unfolding, table, to: &quantized)
      }
      count += rows.count
      try problem.progress(Double(chunk + 1) / Double(problem.chunkCount))
    }
    var bias = problem.bias
    let scale = problem.alpha / Double(max(count, 1))
    for group in 0..<layout.groups {
      let float = try problem.weight.withFloats { (values) throws(HalfstepError) in
        layout.matrix(of: values, group: group)
      }
      let grid = try rounded.withFloats { (values) throws(HalfstepError) in
        layout.matrix(of: values, group: group)
      }
      for row in 0..<layout.outputsPerGroup {
        var sum = 0.0
        for column in 0..<layout.columns {
          let index = row * layout.columns + column
          let at = group * layout.columns + column
          sum += Double(float[index]) * reference[at] - Double(grid[index]) * quantized[at]
        }
        bias[group * layout.outputsPerGroup + row] += scale * sum
      }
    }
    return LayerRounding(
      weight: rounded, encoding: problem.nearest, bias: bias.map { Float($0) }, note: note)
  }

  private static let height = 256

  private static func addSums(
    _ tensor: Tensor, _ unfolding: LayerUnfolding, _ table: LayerUnfolding.RowTable,
    to sums: inout [Double]
  ) throws(HalfstepError) {
    var panel = [Float](repeating: 0, count: unfolding.columns * table.count)
    try tensor.withFloats { (values) throws(HalfstepError) in
      for group in 0..<unfolding.groups {
        panel.withUnsafeMutableBufferPointer { panel in
          guard let from = values.baseAddress, let to = panel.baseAddress else { return }
          unfolding.gather(table, group: group, from: from, into: to, stride: table.count)
          for column in 0..<unfolding.columns {
            var sum = 0.0
            for row in 0..<table.count { sum += Double(to[column * table.count + row]) }
            sums[group * unfolding.columns + column] += sum
          }
        }
      }
    }
  }
}
