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
      let (choice, merged) = try choose(items[position], problem, ranks[position], split, position)
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

  private func choose(
    _ item: LowRankLayer, _ problem: LayerProblem, _ rank: Int,
    _ split: SingularDecomposition.Split, _ position: Int
  ) throws(HalfstepError) -> (LowRankChoice, Tensor) {
    let matrix = try item.matrix(problem.weight)
    let heldOut = try problem.heldOut()
    let plain = try LAPACK.onOneThread { () throws(HalfstepError) in
      try SingularDecomposition(matrix).factors(rank: rank, split)
    }
    var factors = plain
    var merged = try item.merged(plain.left, plain.rightTransposed)
    var bias: [Double]?
    let before = try heldOut.noise(weight: merged, bias: nil)
    var after = before
    // Nothing before the first layer that is split differs from the float network.
    let moments = try GramRounding.statistics(of: problem, keepsCross: position > 0)
    let isWide = problem.layer.layout.columns > Self.widestChoice
    for shrinkage in Self.shrinkages.prefix(isWide ? 1 : Self.shrinkages.count) {
      let found = try LAPACK.onOneThread { () throws(HalfstepError) in
        try MetricDecomposition(
          matrix, moments, shifts: item.shiftCount, ranks: rank,
          isCentered: problem.canChangeBias, shrinkage: shrinkage)?.factors(rank: rank, split)
      }
      guard let found else { continue }
      let weight = try item.merged(found.left, found.rightTransposed)
      let shifted =
        problem.canChangeBias ? try Self.bias(problem, weight, moments) : nil
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
    _ problem: LayerProblem, _ weight: Tensor, _ moments: GramStatistics
  ) throws(HalfstepError) -> [Double] {
    let layout = problem.layer.layout
    let (mean, shift) = (moments.mean(group: 0), moments.differenceMean(group: 0))
    func rows(_ tensor: Tensor) throws(HalfstepError) -> [Float] {
      try tensor.withFloats { (values) throws(HalfstepError) in
        layout.matrix(of: values, group: 0)
      }
    }
    let (old, new) = (try rows(problem.weight), try rows(weight))
    var bias = problem.bias
    for row in bias.indices {
      var sum = 0.0
      for column in 0..<layout.columns {
        let index = row * layout.columns + column
        sum += Double(old[index]) * (mean[column] + shift[column])
        sum -= Double(new[index]) * mean[column]
      }
      bias[row] += problem.alpha * sum
    }
    return bias
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
