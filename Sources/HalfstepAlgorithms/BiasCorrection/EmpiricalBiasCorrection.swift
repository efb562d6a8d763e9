// SPDX-License-Identifier: Apache-2.0
// Moves what rounding does to the mean of a layer's output into its bias.

import HalfstepGraph
import HalfstepNumerics

/// Moves what rounding to nearest does to the mean of a layer's output into its bias.
///
/// `b += E(w·x − q·x) + s·E(w·x_float − w·x)`, where x is the input behind a quantized prefix whose
/// biases are already corrected. The first part is what rounding the weights does. The second is what
/// the layer inherits, most of it from activations; correcting all of it can do harm although the
/// layer's own error falls. The likely reason: clipping lowers a mean where values were large, and the
/// shift raises those that were not, which decides behind the next activation function. So the share s
/// is the one of 1, 1/2 and 0 that the validation likes best. Use with `LayerReconstruction.Options.writesWeights` off to
/// change biases only, and with `.outputs(isQuantized: true)`: no layer is then changed that does not
/// bring the quantized network's outputs nearer to the float network's on some samples.
///
/// - Reference: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
///   Correction", 2019, §4.2 and appendix D. arXiv:1906.04721
package struct EmpiricalBiasCorrection: LayerRounder, Sendable {
  package init() {}

  package var identity: String? { "empirical bias correction" }

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
    // What rounding the weights does to the mean, and what the quantized prefix does.
    var own = [Double](repeating: 0, count: problem.bias.count)
    var carried = own
    let scale = problem.alpha / Double(max(count, 1))
    for group in 0..<layout.groups {
      let float = try problem.weight.withFloats { (values) throws(HalfstepError) in
        layout.matrix(of: values, group: group)
      }
      let grid = try rounded.withFloats { (values) throws(HalfstepError) in
        layout.matrix(of: values, group: group)
      }
      for row in 0..<layout.outputsPerGroup {
        let channel = group * layout.outputsPerGroup + row
        for column in 0..<layout.columns {
          let index = row * layout.columns + column
          let at = group * layout.columns + column
          own[channel] += scale * (Double(float[index]) - Double(grid[index])) * quantized[at]
          carried[channel] += scale * Double(float[index]) * (reference[at] - quantized[at])
        }
      }
    }
    var best: (rounding: LayerRounding, noise: Double)?
    for share in Self.shares {
      let bias = problem.bias.indices.map {
        Float(problem.bias[$0] + own[$0] + share * carried[$0])
      }
      let candidate = LayerRounding(
        weight: rounded, encoding: problem.nearest, bias: bias, note: note)
      let noise = try problem.noise(of: candidate)
      if best.map({ noise < $0.noise }) ?? true { best = (candidate, noise) }
    }
    return best?.rounding
      ?? LayerRounding(weight: rounded, encoding: problem.nearest, note: "nearest")
  }

  private static let shares = [1, 0.5, 0.0]
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
