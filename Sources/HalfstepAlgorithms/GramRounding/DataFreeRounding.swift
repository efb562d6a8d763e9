// SPDX-License-Identifier: Apache-2.0
// Gram rounding without data: moments that are expected instead of seen.

import HalfstepGraph
import HalfstepNumerics

/// Rounds weights without data, by the moments that a layer's input is expected to have.
///
/// Values of one channel that a kernel reads together are correlated, so errors of a kernel's weights
/// should cancel; where a channel's mean is not left to the bias, errors of a whole row should. The Gram
/// matrix that says so - variances on the diagonal, a share of them between taps of a kernel, products
/// of means everywhere - goes to the solver of `GramRounding`. Means and variances come from folded
/// batch norms; where they are not known every channel has mean and variance 1, which leaves plain
/// compensation of kernels and rows.
///
/// - Reference: Guo et al., "SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian
///   Approximation", 2022, for the compensation of kernels and rows. arXiv:2202.07471
package struct DataFreeRounding: Sendable {
  /// Correlation of neighboring values of a channel; pictures and what early layers make of them have
  /// more, deep layers less.
  package static let correlation = 0.5

  package var options: LayerReconstruction.Options
  package var gram: GramRounding.Options

  package init(options: LayerReconstruction.Options, gram: GramRounding.Options) {
    self.options = options
    self.gram = gram
    // The moments have no noise that would have to be evened out.
    self.gram.correctsTarget = false
  }

  /// Rounds all layers whose weights the configuration quantizes.
  ///
  /// - Parameters:
  ///   - graph: The float network; unchanged if an error is thrown.
  ///   - progress: Told after each layer; false cancels.
  /// - Returns: For each layer the expected noise over the expected power of its output, rounded to
  ///   nearest and as kept.
  /// - Throws: `HalfstepError.cancelled`; what `QuantizationSimulation` and the solver throw.
  @discardableResult
  package func apply(
    to graph: inout Graph, progress: ((LayerReconstruction.Progress) -> Bool)? = nil
  ) throws(HalfstepError) -> LayerReconstruction.Report {
    let walk = try DataFreeWalk(graph, options)
    let rounder = GramRounding(options: gram)
    var report = LayerReconstruction.Report()
    graph = try walk.run(&report, progress) { (layer) throws(HalfstepError) in
      let moments = ExpectedGram(layer, correlation: Self.correlation)
      let leavesMeans = moments.isKnown && gram.correctsBias && layer.weights.canChangeBias
      let plain = try layer.nearest.fakeQuantize(layer.weights.weight)
      let power = try moments.cost(layer.weights, of: nil, isCentered: leavesMeans)
      func ratio(_ weight: Tensor) throws(HalfstepError) -> Double {
        let cost = try moments.cost(layer.weights, of: weight, isCentered: leavesMeans)
        return power > 0 ? cost / power : 0
      }
      let before = try ratio(plain)
      var settings = rounder
      settings.options.correctsBias = leavesMeans
      let rounding = try settings.solve(
        layer.weights, moments, shrinkage: GramRounding.Shrinkage(0.003, 0.01),
        note: "gram, data-free")
      let after = try ratio(rounding.weight)
      if after <= before {
        return DataFreeWalk.Change(rounding: rounding, before: before, after: after)
      }
      return DataFreeWalk.Change(
        rounding: LayerRounding(weight: plain, encoding: layer.nearest, note: "nearest"),
        before: before, after: before)
    }
    return report
  }
}

/// Moments of a layer's rows that follow from means and variances of its channels.
struct ExpectedGram: RowMoments {
  /// Whether means and variances are known, not assumed.
  let isKnown: Bool
  private let layout: WeightLayout
  private let means: [Double]
  private let variances: [Double]
  private let correlation: Double

  init(_ layer: DataFreeWalk.Layer, correlation: Double) {
    layout = layer.weights.layout
    self.correlation = correlation
    isKnown = layer.inputs != nil
    let count = layout.inputChannels
    means = layer.inputs?.map(\.mean) ?? [Double](repeating: 1, count: count)
    variances = layer.inputs?.map(\.variance) ?? [Double](repeating: 1, count: count)
  }

  func mean(group: Int) -> [Double] {
    (0..<layout.columns).map {
      means[group * layout.inputsPerGroup + $0 / layout.spatial]
    }
  }

  func surplusMean(group: Int) -> [Double]? { nil }

  func surplus(group: Int, isCentered: Bool) -> [Double]? { nil }

  func gram(group: Int, isCentered: Bool) -> [Double] {
    let n = layout.columns
    let mean = isCentered ? [Double](repeating: 0, count: n) : mean(group: group)
    var result = [Double](repeating: 0, count: n * n)
    for row in 0..<n {
      let channel = row / layout.spatial
      let variance = variances[group * layout.inputsPerGroup + channel]
      for column in 0..<n {
        var value = mean[row] * mean[column]
        if row == column {
          value += variance
        } else if column / layout.spatial == channel {
          value += correlation * variance
        }
        result[row * n + column] = value
      }
    }
    return result
  }

  /// Expected power of what the layer's output differs by with other weights, or of the output itself.
  ///
  /// - Parameter changed: Other weights; nil for the output itself.
  func cost(
    _ weights: LayerWeights, of changed: Tensor?, isCentered: Bool
  ) throws(HalfstepError) -> Double {
    var total = 0.0
    for group in 0..<layout.groups {
      var matrix = try weights.weight.withFloats { (values) throws(HalfstepError) in
        layout.matrix(of: values, group: group).map(Double.init)
      }
      if let changed {
        let other = try changed.withFloats { (values) throws(HalfstepError) in
          layout.matrix(of: values, group: group)
        }
        for index in matrix.indices { matrix[index] -= Double(other[index]) }
      }
      let mean = isCentered ? [Double](repeating: 0, count: layout.columns) : mean(group: group)
      for row in 0..<layout.outputsPerGroup {
        var shift = 0.0
        for channel in 0..<layout.inputsPerGroup {
          let variance = variances[group * layout.inputsPerGroup + channel]
          var (sum, squares) = (0.0, 0.0)
          for tap in 0..<layout.spatial {
            let column = channel * layout.spatial + tap
            let value = matrix[row * layout.columns + column]
            sum += value
            squares += value * value
            shift += value * mean[column]
          }
          // Variances, and the share of them that taps have in common.
          total += variance * ((1 - correlation) * squares + correlation * sum * sum)
        }
        total += shift * shift
      }
    }
    return total
  }
}
