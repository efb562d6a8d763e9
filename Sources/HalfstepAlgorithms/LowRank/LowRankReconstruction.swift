// SPDX-License-Identifier: Apache-2.0
// Splits layers one after the other with data, each seeing what the ones before it became.

import HalfstepGraph
import HalfstepNumerics

/// What data made of a layer that is split.
package struct LowRankChoice: Sendable {
  /// Weights of the pair.
  package let weights: (first: Tensor, second: Tensor)
  /// The second layer's bias, `[K]`; nil to keep it.
  package let bias: [Float]?
  /// Noise over signal of the layer's output on held-out rows, with the plain factors.
  package let noiseBefore: Double
  /// The same with what was kept; never larger.
  package let noiseAfter: Double
}

/// Splits layers one after the other with data.
///
/// A layer's moments are taken behind the layers that were split before it, and its target is what the
/// network computed before; the plain factors stay if they do better on held-out rows.
struct LowRankReconstruction {
  let graph: Graph
  let data: ReconstructionData

  /// Rows that a layer learns from at most.
  private static let maximumRows = 1 << 14
  /// Strengths to choose from, as shares of the moments' mean diagonal.
  private static let shrinkages = [0.01, 0.1]
  /// Layers whose weight has more columns take the first strength without a choice.
  private static let widestChoice = 2500
  /// Strength for error curves.
  private static let curveShrinkage = 0.003

  /// Visits layers in the order in which they run.
  ///
  /// - Parameters:
  ///   - items: Layers, in the order of their nodes.
  ///   - body: Gets the position in `items`, and the layer with its data.
  private func visit(
    _ items: [LowRankLayer], _ progress: (Double) throws(HalfstepError) -> Void,
    _ body: (Int, LayerProblem, LayerWalk) throws(HalfstepError) -> Void
  ) throws(HalfstepError) {
    var visits = LayerVisits(graph: graph, data: data)
    visits.maximumRows = Self.maximumRows
    try visits.forEach(
      items.map { LayerWalk.Stop(layer: $0.layer, weight: $0.weightName) }, progress, body)
  }

  /// The share of each layer's output power that each rank loses when nothing else is split.
  ///
  /// - Parameters:
  ///   - items: Layers, in the order of their nodes.
  ///   - ranks: Largest rank of each that is wanted.
  /// - Returns: For each layer `[ranks + 1]`, from rank 0; nil where moments say nothing.
  func lostShares(
    _ items: [LowRankLayer], ranks: [Int], _ progress: (Double) throws(HalfstepError) -> Void
  ) throws(HalfstepError) -> [[Double]?] {
    var result = [[Double]?](repeating: nil, count: items.count)
    try visit(items, progress) { (position, problem, _) throws(HalfstepError) in
      let item = items[position]
      let moments = try GramRounding.statistics(of: problem, keepsCross: false)
      let matrix = try item.matrix(problem.weight)
      result[position] = try LAPACK.onOneThread { () throws(HalfstepError) in
        try MetricDecomposition(
          matrix, moments, shifts: item.shiftCount, ranks: ranks[position],
          isCentered: problem.canChangeBias, shrinkage: Self.curveShrinkage)?.lostShares
      }
    }
    return result
  }

  /// Chooses the factors of layers.
  ///
  /// - Parameters:
  ///   - items: Layers that are split, in the order of their nodes.
  ///   - ranks: Rank of each.
  ///   - split: How lengths are shared between factors.
  func choices(
    _ items: [LowRankLayer], ranks: [Int], _ split: SingularDecomposition.Split,
    _ progress: (Double) throws(HalfstepError) -> Void
  ) throws(HalfstepError) -> [LowRankChoice] {
    var result: [LowRankChoice] = []
    var names = NameAllocator(graph)
    try visit(items, progress) { (position, problem, walk) throws(HalfstepError) in
      let prepared = try prepare(
        items[position], problem, rank: ranks[position], keepsCross: position > 0)
      let (choice, merged) = try choose(items[position], prepared, ranks[position], split)
      result.append(choice)
      try walk.commit { (graph) throws(HalfstepError) in
        problem.layer.setWeight(merged, in: &graph, walk.index, names: &names)
        if let bias = choice.bias {
          try problem.layer.setBias(bias, in: &graph, walk.index, names: &names)
        }
      }
    }
    return result
  }

  /// Chooses the factors of a layer when nothing else is split.
  ///
  /// - Parameters:
  ///   - known: What an earlier call for the same layer prepared; results do not depend on it.
  /// - Returns: As `choices`, and what a call for another rank can be given.
  func choice(
    _ item: LowRankLayer, rank: Int, _ split: SingularDecomposition.Split,
    known: PreparedLayer?, _ progress: (Double) throws(HalfstepError) -> Void
  ) throws(HalfstepError) -> (LowRankChoice, PreparedLayer) {
    var found = known
    if found == nil {
      try visit([item], progress) { (_, problem, _) throws(HalfstepError) in
        found = try prepare(item, problem, rank: nil, keepsCross: false)
      }
    } else {
      try progress(1)
    }
    guard let found else {
      throw HalfstepError(.internalError, "node '\(item.name)' was not visited", node: item.name)
    }
    return (try choose(item, found, rank, split).0, found)
  }

  /// Everything about a layer that no rank decides.
  ///
  /// - Parameters:
  ///   - rank: The one that will be chosen; nil for any.
  ///   - keepsCross: Whether the network before the layer was changed: nothing before the first layer
  ///     that is split differs from the float network.
  private func prepare(
    _ item: LowRankLayer, _ problem: LayerProblem, rank: Int?, keepsCross: Bool
  ) throws(HalfstepError) -> PreparedLayer {
    PreparedLayer(
      problem, matrix: try item.matrix(problem.weight), heldOut: try problem.heldOut(),
      plain: try LAPACK.onOneThread { () throws(HalfstepError) in
        try item.decomposition(of: problem.weight, rank: rank)
      },
      moments: try GramRounding.statistics(of: problem, keepsCross: keepsCross))
  }

  private func choose(
    _ item: LowRankLayer, _ prepared: PreparedLayer, _ rank: Int,
    _ split: SingularDecomposition.Split
  ) throws(HalfstepError) -> (LowRankChoice, Tensor) {
    let (heldOut, matrix, moments) = (prepared.heldOut, prepared.matrix, prepared.moments)
    let plain = prepared.plain.factors(rank: rank, split)
    var factors = plain
    var merged = try item.merged(plain.left, plain.rightTransposed)
    var bias: [Double]?
    let before = try heldOut.noise(weight: merged, bias: nil)
    var after = before
    let isWide = prepared.layout.columns > Self.widestChoice
    for shrinkage in Self.shrinkages.prefix(isWide ? 1 : Self.shrinkages.count) {
      let found = try LAPACK.onOneThread { () throws(HalfstepError) in
        try MetricDecomposition(
          matrix, moments, shifts: item.shiftCount, ranks: rank,
          isCentered: prepared.canChangeBias, shrinkage: shrinkage)?.factors(rank: rank, split)
      }
      guard let found else { continue }
      let weight = try item.merged(found.left, found.rightTransposed)
      let shifted =
        prepared.canChangeBias ? try Self.bias(prepared, weight) : nil
      let noise = try heldOut.noise(weight: weight, bias: shifted)
      guard noise < after else { continue }
      (factors, merged, bias, after) = (found, weight, shifted, noise)
    }
    let choice = LowRankChoice(
      weights: try item.weights(factors.left, factors.rightTransposed),
      bias: bias?.map { Float($0) }, noiseBefore: before, noiseAfter: after)
    return (choice, merged)
  }

  /// The bias that takes what a new weight does to the means.
  private static func bias(
    _ layer: PreparedLayer, _ weight: Tensor
  ) throws(HalfstepError) -> [Double] {
    let (layout, moments) = (layer.layout, layer.moments)
    let (mean, shift) = (moments.mean(group: 0), moments.differenceMean(group: 0))
    func rows(_ tensor: Tensor) throws(HalfstepError) -> [Float] {
      try tensor.withFloats { (values) throws(HalfstepError) in
        layout.matrix(of: values, group: 0)
      }
    }
    let (old, new) = (try rows(layer.weight), try rows(weight))
    var bias = layer.bias
    for row in bias.indices {
      var sum = 0.0
      for column in 0..<layout.columns {
        let index = row * layout.columns + column
        sum += Double(old[index]) * (mean[column] + shift[column])
        sum -= Double(new[index]) * mean[column]
      }
      bias[row] += layer.alpha * sum
    }
    return bias
  }
}

/// What is known about a layer before a rank is chosen.
///
/// Sendable as long as one thread uses it at a time: `PreparedLayers` hands it to one.
final class PreparedLayer: @unchecked Sendable {
  let weight: Tensor
  let bias: [Double]
  let alpha: Double
  let layout: WeightLayout
  let canChangeBias: Bool
  let matrix: Matrix
  let heldOut: HeldOutRows
  let plain: SingularDecomposition
  let moments: GramStatistics

  init(
    _ problem: LayerProblem, matrix: Matrix, heldOut: HeldOutRows, plain: SingularDecomposition,
    moments: GramStatistics
  ) {
    weight = problem.weight
    bias = problem.bias
    alpha = problem.alpha
    layout = problem.layer.layout
    canChangeBias = problem.canChangeBias
    self.matrix = matrix
    self.heldOut = heldOut
    self.plain = plain
    self.moments = moments
  }
}

extension LowRankLayer {
  /// The weight that a pair of layers amounts to, in the shape of the layer's own.
  func merged(
    _ left: Matrix, _ rightTransposed: Matrix
  ) throws(HalfstepError) -> Tensor {
    let product = try LAPACK.onOneThread { () throws(HalfstepError) in
      Matrix.product(left, transposed: false, rightTransposed, transposed: true)
    }
    let (rows, shifts, layout) = (rowCount, shiftCount, layer.layout)
    var matrix = [Float](repeating: 0, count: rows * columnCount)
    for output in 0..<layer.outputChannels {
      for shift in 0..<shifts {
        let source = (output * shifts + shift) * rows
        for row in 0..<rows {
          matrix[(output * rows + row) * shifts + shift] = Float(product.values[source + row])
        }
      }
    }
    var result = try Tensor(uninitialized: .float32, shape: weightShape)
    try result.withMutableFloats { (values) throws(HalfstepError) in
      layout.store(matrix, group: 0, into: values)
    }
    return result
  }
}
