// SPDX-License-Identifier: Apache-2.0
// Bias correction without data, from what batch norms say about activations.

import HalfstepGraph
import HalfstepNumerics

/// Moves what rounding to nearest is expected to do to the mean of a layer's output into its bias,
/// without data.
///
/// `b += (w − q)·E(x)`, where the mean of each input channel comes from the batch norms that were folded
/// into the layers before (`ExpectedMoments`). Layers whose inputs are not known stay as they are.
/// Padding is taken for more of the same. Weights do not change.
///
/// - Reference: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
///   Correction", 2019, §4.2.1 and appendix C. arXiv:1906.04721
package struct AnalyticBiasCorrection: Sendable {
  /// What the layer's report calls a bias that was corrected.
  package static let note = "nearest, bias corrected analytically"

  package var options: LayerReconstruction.Options
  package init(options: LayerReconstruction.Options) { self.options = options }

  /// Corrects all layers whose weights the configuration quantizes and whose inputs are known.
  ///
  /// - Parameters:
  ///   - graph: The float network, batch norms folded; unchanged if an error is thrown.
  ///   - progress: Told after each layer; false cancels.
  /// - Returns: For each layer, before: the squared shift of the means over the variance that the
  ///   output is expected to have, summed over channels; after: 0 where the bias was corrected.
  /// - Throws: `HalfstepError.emptyStatistics` if no layer's input is known; `.cancelled`; what
  ///   `QuantizationSimulation` throws.
  @discardableResult
  package func apply(
    to graph: inout Graph, progress: ((LayerReconstruction.Progress) -> Bool)? = nil
  ) throws(HalfstepError) -> LayerReconstruction.Report {
    let walk = try DataFreeWalk(graph, options)
    var report = LayerReconstruction.Report()
    let result = try walk.run(&report, progress) { (layer) throws(HalfstepError) in
      guard let inputs = layer.inputs, layer.weights.canChangeBias else { return nil }
      let rounded = try layer.nearest.fakeQuantize(layer.weights.weight)
      let (bias, shift) = try layer.weights.shifted(rounded, means: inputs.map(\.mean))
      let variance = try layer.weights.variance(inputs.map(\.variance)).reduce(0, +)
      let ratio = variance > 0 ? shift.reduce(0) { $0 + $1 * $1 } / variance : 0
      return DataFreeWalk.Change(
        rounding: LayerRounding(
          weight: rounded, encoding: layer.nearest, bias: bias.map { Float($0) },
          note: Self.note),
        before: ratio, after: 0)
    }
    guard report.layers.contains(where: { $0.kept == Self.note }) else {
      throw HalfstepError(
        .emptyStatistics,
        "bias correction without data: no layer reads what a folded batch norm tells about; fold "
          + "batch norms first, or give data")
    }
    graph = result
    return report
  }
}

extension LayerWeights {
  /// The bias that gives the mean output back to weights that were changed, and how far it moved.
  ///
  /// - Parameters:
  ///   - changed: Shape of the weight.
  ///   - means: Mean of each input channel.
  func shifted(
    _ changed: Tensor, means: [Double]
  ) throws(HalfstepError) -> (bias: [Double], shift: [Double]) {
    var shift = [Double](repeating: 0, count: bias.count)
    for group in 0..<layout.groups {
      let float = try weight.withFloats { (values) throws(HalfstepError) in
        layout.matrix(of: values, group: group)
      }
      let grid = try changed.withFloats { (values) throws(HalfstepError) in
        layout.matrix(of: values, group: group)
      }
      for row in 0..<layout.outputsPerGroup {
        var sum = 0.0
        for column in 0..<layout.columns {
          let index = row * layout.columns + column
          sum +=
            (Double(float[index]) - Double(grid[index]))
            * means[group * layout.inputsPerGroup + column / layout.spatial]
        }
        shift[group * layout.outputsPerGroup + row] = alpha * sum
      }
    }
    return (zip(bias, shift).map { $0 + $1 }, shift)
  }

  /// Variance of each output, for inputs that are independent.
  func variance(_ inputs: [Double]) throws(HalfstepError) -> [Double] {
    var result = [Double](repeating: 0, count: bias.count)
    for group in 0..<layout.groups {
      let matrix = try weight.withFloats { (values) throws(HalfstepError) in
        layout.matrix(of: values, group: group)
      }
      for row in 0..<layout.outputsPerGroup {
        for column in 0..<layout.columns {
          let value = alpha * Double(matrix[row * layout.columns + column])
          result[group * layout.outputsPerGroup + row] +=
            value * value * inputs[group * layout.inputsPerGroup + column / layout.spatial]
        }
      }
    }
    return result
  }
}
