// SPDX-License-Identifier: Apache-2.0
// Algorithms that change a model and keep its function.

import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics

/// A batch norm that a layer took in.
public struct BatchNormFold: Hashable, Sendable {
  /// The layer.
  public let layer: String
  /// The batch norm that is gone.
  public let batchNorm: String
  /// Whether the batch norm came before the layer.
  public let isForward: Bool
}

/// How to equalize layers.
public struct EqualizationOptions: Hashable, Sendable {
  /// Whether the next layer absorbs high biases, which may change the function; default no.
  public var absorbsHighBiases: Bool = false
  /// Passes over the model at most, 1 or more; default 50.
  public var maximumIterations: Int = 50

  /// Creates the default options.
  public init() {}
}

/// Layers that were equalized together.
public struct EqualizedSet: Hashable, Sendable {
  /// Layers in the order in which they run.
  public let layers: [String]
  /// What each tensor between two layers was divided by, `[C]` each.
  public let factors: [[Float]]
}

/// What equalization did.
public struct EqualizationReport: Hashable, Sendable {
  /// Sets of layers.
  public let sets: [EqualizedSet]
  /// Passes that were made over the model.
  public let iterations: Int
}

extension Model {
  /// Folds batch norms into the layers beside them; those left are rewritten as scale and shift.
  ///
  /// The network's function stays the same up to float rounding.
  ///
  /// - Returns: The folds that were made.
  /// - Throws: `HalfstepError`; the model is then unchanged.
  /// - Complexity: O(weights).
  @discardableResult
  public mutating func foldBatchNorms() throws(HalfstepError) -> [BatchNormFold] {
    // Weights with one owner change in place.
    var graph = Graph()
    swap(&graph, &self.graph)
    defer { self.graph = graph }
    let folds = try BatchNormFolding().apply(to: &graph)
    return folds.map {
      BatchNormFold(layer: $0.layer, batchNorm: $0.batchNorm, isForward: $0.isForward)
    }
  }

  /// Balances the weight ranges of consecutive layers, without changing the network's function.
  ///
  /// Only absorbing high biases, if asked for, changes it: inputs far below a channel's mean then come
  /// out as if they were larger.
  /// Fold batch norms first: a batch norm between two layers keeps them apart.
  ///
  /// - Parameters:
  ///   - options: How to equalize.
  ///   - progress: Told after each pass how many were made, and how many may be; false cancels.
  /// - Returns: Which layers were equalized with which.
  /// - Throws: `HalfstepError.invalidArgument` for options out of range; `.nonFiniteValue` for
  ///   weights; `.cancelled` if `progress` returned false; the model is then unchanged.
  /// - Complexity: O(weights · iterations).
  /// - Reference: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
  ///   Correction", 2019. arXiv:1906.04721
  @discardableResult
  public mutating func equalize(
    _ options: EqualizationOptions = EqualizationOptions(),
    progress: ((_ completed: Int, _ total: Int) -> Bool)? = nil
  ) throws(HalfstepError) -> EqualizationReport {
    guard (1...1_000_000).contains(options.maximumIterations) else {
      throw HalfstepError(
        .invalidArgument,
        "maximum iterations: expected 1...1000000, got \(options.maximumIterations)")
    }
    var algorithm = CrossLayerEqualization.Options()
    algorithm.absorbsHighBiases = options.absorbsHighBiases
    algorithm.maximumIterations = options.maximumIterations
    // Weights with one owner change in place.
    var graph = Graph()
    swap(&graph, &self.graph)
    defer { self.graph = graph }
    let report = try CrossLayerEqualization(options: algorithm).apply(
      to: &graph, progress: progress.map { tell in { tell($0, options.maximumIterations) } })
    return EqualizationReport(
      sets: report.sets.map { EqualizedSet(layers: $0.layers, factors: $0.factors) },
      iterations: report.iterations)
  }
}
