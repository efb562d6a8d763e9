// SPDX-License-Identifier: Apache-2.0
// A layer that two thinner layers can replace, seen as a matrix.

import HalfstepGraph
import HalfstepNumerics

/// Which pair of layers replaces a layer.
package enum LowRankForm: Hashable, Sendable {
  /// A 1×1 layer to the rank, then a layer of the old kernel.
  case channels
  /// A vertical kernel to the rank, then a horizontal one.
  case spatial
}

/// A layer that two thinner layers can replace.
///
/// Its weight is a matrix with a row for each input channel (and kernel row, if spatial) and a column
/// for each output channel and remaining kernel position; a factorization of rank r gives the two.
package struct LowRankLayer: Sendable {
  package let form: LowRankForm
  package let layer: LinearLayer
  /// What messages call the node.
  package let name: String
  /// Name of the weight.
  package let weightName: String
  package let weightShape: Shape
  /// What the layer costs now.
  package let cost: Cost
  /// Output positions of one sample.
  let positions: Int
  let strides: [Int]

  /// Kernel extents; empty for a matrix product.
  var kernel: [Int] { Array(weightShape.dimensions.dropFirst(2)) }

  /// Reads a layer.
  ///
  /// - Throws: `HalfstepError.unsupportedOperator` that says why the layer cannot be split.
  init(
    _ form: LowRankForm, _ graph: Graph, _ layer: LinearLayer, _ cost: LayerCost
  ) throws(HalfstepError) {
    let node = graph.nodes[layer.node]
    func refuse(_ reason: String) -> HalfstepError {
      HalfstepError(.unsupportedOperator, "node '\(node.label)': \(reason)", node: node.label)
    }
    guard let shape = graph.constant(cost.weight, GraphIndex(graph))?.shape else {
      throw refuse("the weight is gone")
    }
    switch (form, layer.kind) {
    case (_, .convTranspose): throw refuse("SVD does not split transposed convolutions")
    case (.spatial, .gemm), (.spatial, .matMul):
      throw refuse("spatial SVD needs a kernel; use weight SVD for matrix products")
    case (.spatial, .conv) where shape.rank != 4:
      throw refuse("spatial SVD needs a kernel of two axes, got \(shape.rank - 2)")
    case (_, .conv) where layer.layout.groups > 1:
      throw refuse("SVD does not split convolutions with groups, got \(layer.layout.groups)")
    default: break
    }
    self.form = form
    self.layer = layer
    self.cost = cost.cost
    name = node.label
    weightName = cost.weight
    weightShape = shape
    positions = cost.cost.macs / cost.cost.parameters
    let given = node.intsAttribute("strides") ?? []
    strides =
      layer.kind == .conv
      ? (given.isEmpty ? [Int](repeating: 1, count: shape.rank - 2) : given) : []
  }

  /// Rows of the matrix: input channels, times kernel rows if spatial.
  package var rowCount: Int { layer.inputChannels * (form == .spatial ? kernel[0] : 1) }
  /// Kernel positions that stay with the second layer.
  package var shiftCount: Int { form == .spatial ? kernel[1] : kernel.reduce(1, *) }
  /// Columns of the matrix.
  package var columnCount: Int { layer.outputChannels * shiftCount }
  /// Largest rank.
  package var maximumRank: Int { min(rowCount, columnCount) }

  /// What the pair costs, by AIMET's estimate: the first layer's picture is the second one's times
  /// the strides.
  ///
  /// The same as the true count unless a stride does not divide the picture.
  package func cost(rank: Int) -> Cost {
    let first = rowCount * rank
    let second = rank * columnCount
    let enlarged: Int =
      form == .spatial ? strides[1] : strides.reduce(1, *)
    return Cost(
      macs: (first * enlarged + second) * positions, parameters: first + second)
  }

  /// The largest rank whose cost is within a ratio of the layer's; at least 1.
  package func rank(ratio: Double, _ metric: CostMetric) -> Int {
    let limit = Double(cost.value(metric)) * ratio
    // Costs are proportional to the rank.
    let unit = Double(cost(rank: 1).value(metric))
    // A hundred units in the last place: 0.1 · n is not exact.
    let rank = (limit / unit * (1 + 2e-14)).rounded(.down)
    return max(1, min(maximumRank, rank < Double(maximumRank) ? Int(rank) : maximumRank))
  }

  // MARK: Matrix

  private func offset(_ output: Int, _ input: Int) -> Int {
    let spatial = layer.layout.spatial
    return layer.layout.outputIsOuter
      ? (output * layer.inputChannels + input) * spatial
      : (input * layer.outputChannels + output) * spatial
  }

  /// The weight as a matrix, `[rowCount, columnCount]`.
  func matrix(_ weight: Tensor) throws(HalfstepError) -> Matrix {
    Matrix(rows: rowCount, columns: columnCount, values: try values(weight).map(Double.init))
  }

  /// The elements of the matrix, column by column.
  private func values(_ weight: Tensor) throws(HalfstepError) -> [Float] {
    let (rows, shifts) = (rowCount, shiftCount)
    let kernelRows = form == .spatial ? kernel[0] : 1
    var result = [Float](repeating: 0, count: rows * columnCount)
    try weight.withFloats { (values) throws(HalfstepError) in
      result.withUnsafeMutableBufferPointer { result in
        for output in 0..<layer.outputChannels {
          for input in 0..<layer.inputChannels {
            let start = offset(output, input)
            for kernelRow in 0..<kernelRows {
              for shift in 0..<shifts {
                result[(output * shifts + shift) * rows + input * kernelRows + kernelRow] =
                  values[start + kernelRow * shifts + shift]
              }
            }
          }
        }
      }
    }
    guard result.allSatisfy(\.isFinite) else {
      throw HalfstepError(
        .nonFiniteValue, "node '\(name)' weight \(weight.shape): NaN or infinite", node: name)
    }
    return result
  }

  /// The singular vectors of the layer's matrix.
  ///
  /// - Parameter rank: Of the factors that are wanted; nil for any.
  package func decomposition(
    _ graph: Graph, rank: Int? = nil
  ) throws(HalfstepError) -> SingularDecomposition {
    try decomposition(of: weight(graph), rank: rank)
  }

  /// The singular vectors of the matrix of a weight that takes the place of the layer's.
  func decomposition(
    of weight: Tensor, rank: Int?
  ) throws(HalfstepError) -> SingularDecomposition {
    do throws(HalfstepError) {
      guard let rank else { return try SingularDecomposition(matrix(weight)) }
      return try SingularDecomposition(
        values(weight), rows: rowCount, columns: columnCount, rank: rank)
    } catch {
      throw HalfstepError(error.code, "node '\(name)': \(error.message)", node: name)
    }
  }

  func weight(_ graph: Graph) throws(HalfstepError) -> Tensor {
    guard let weight = graph.constant(weightName, GraphIndex(graph)) else {
      throw HalfstepError(.internalError, "node '\(name)': the weight is gone", node: name)
    }
    return weight
  }

  // MARK: Weights of the pair

  /// Turns factors into the weights of the two layers.
  ///
  /// - Parameters:
  ///   - left: `[rowCount, rank]`.
  ///   - rightTransposed: `[columnCount, rank]`.
  func weights(
    _ left: Matrix, _ rightTransposed: Matrix
  ) throws(HalfstepError) -> (first: Tensor, second: Tensor) {
    let rank = left.columns
    let (outputs, shifts) = (layer.outputChannels, shiftCount)
    if layer.kind == .conv {
      // [rank, C, kh, 1] or [rank, C, 1, …]: a column of the left factor is in this order.
      var firstShape = [rank, layer.inputChannels] + kernel.map { _ in 1 }
      var secondShape = [outputs, rank] + kernel
      if form == .spatial {
        firstShape[2] = kernel[0]
        secondShape[2] = 1
      }
      var second = [Float](repeating: 0, count: outputs * rank * shifts)
      for index in 0..<rank {
        let source = index * rightTransposed.rows
        for output in 0..<outputs {
          for shift in 0..<shifts {
            second[(output * rank + index) * shifts + shift] =
              Float(rightTransposed.values[source + output * shifts + shift])
          }
        }
      }
      return (
        try Tensor(left.values.map { Float($0) }, shape: firstShape),
        try Tensor(second, shape: secondShape)
      )
    }
    if layer.layout.outputIsOuter {
      // Gemm with transB: [rank, C] and [K, rank].
      var second = [Float](repeating: 0, count: outputs * rank)
      for output in 0..<outputs {
        for index in 0..<rank {
          second[output * rank + index] = Float(rightTransposed[output, index])
        }
      }
      return (
        try Tensor(left.values.map { Float($0) }, shape: [rank, rowCount]),
        try Tensor(second, shape: [outputs, rank])
      )
    }
    var first = [Float](repeating: 0, count: rowCount * rank)
    for row in 0..<rowCount {
      for index in 0..<rank { first[row * rank + index] = Float(left[row, index]) }
    }
    return (
      try Tensor(first, shape: [rowCount, rank]),
      try Tensor(rightTransposed.values.map { Float($0) }, shape: [rank, outputs])
    )
  }
}
