// SPDX-License-Identifier: Apache-2.0
// One layer that is to be rounded: its weights, its data, what its grid shall be.

import HalfstepGraph
import HalfstepNumerics

/// One layer that is to be rounded: its weights, its data, and the grid that is asked for.
///
/// Valid only while the rounder that received it runs.
package final class LayerProblem {
  /// Position among the layers that are rounded, and how many they are.
  package let position: Int
  package let layerCount: Int
  package let layer: LinearLayer
  /// The layer's node in the float network.
  package let node: Node
  /// Name of the weight.
  package let weightName: String
  /// The float weight.
  package let weight: Tensor
  /// The float bias, `[K]`; zeros if there is none.
  package let bias: [Double]
  /// Whether the rounded layer may have another bias.
  package let canChangeBias: Bool
  /// Gemm's alpha; 1 for other layers.
  package let alpha: Double
  /// The grid that is asked for.
  package let spec: QuantizerSpec
  /// The grid that weights rounded to nearest get, chosen by the options' scheme.
  package let nearest: Encoding
  /// What follows the layer before its output is used.
  package let activation: Activation
  /// The same, with functions that are not piecewise linear.
  package let following: FollowingActivation
  package let options: LayerReconstruction.Options

  /// An activation function behind a layer.
  package enum Activation: Hashable, Sendable {
    case none
    /// `min(max(x, low), high)`; Relu has an infinite upper end.
    case clip(low: Float, high: Float)
  }

  /// Tensor that is added to the layer's output, if the sum is what the layer aims at.
  private let addend: String?
  private let walk: LayerWalk
  private let report: (Double) throws(HalfstepError) -> Void
  private var validation: HeldOutRows?

  init(
    _ walk: LayerWalk, spec: QuantizerSpec, nearest: Encoding,
    options: LayerReconstruction.Options,
    report: @escaping (Double) throws(HalfstepError) -> Void
  ) throws(HalfstepError) {
    let stop = walk.stops[walk.position]
    let graph = walk.graph
    self.walk = walk
    self.report = report
    self.options = options
    position = walk.position
    layerCount = walk.stops.count
    layer = stop.layer
    node = graph.nodes[layer.node]
    weightName = stop.weight
    weight = try layer.weight(in: graph, walk.index)
    bias = try layer.bias(in: graph, walk.index)
    alpha = layer.kind == .gemm ? Double(node.floatAttribute("alpha") ?? 1) : 1
    // A MatMul takes a bias only by becoming a Gemm, whose input is a matrix.
    canChangeBias =
      layer.kind != .matMul || layer.hasBias || graph.rank(of: layer.input, walk.index) == 2
    self.spec = spec
    self.nearest = nearest
    addend = options.targetsSums ? Self.addend(of: layer, graph, walk.index) : nil
    activation = Self.activation(behind: layer, graph, walk.index)
    following = FollowingActivation(behind: layer, graph, walk.index)
  }

  /// The same problem with another grid asked for.
  ///
  /// - Throws: `HalfstepError.invalidArgument` if the weight does not have the axes.
  package func asking(_ spec: QuantizerSpec) throws(HalfstepError) -> LayerProblem {
    try LayerProblem(
      walk, spec: spec,
      nearest: try Encoding.make(for: weight, spec: spec, scheme: options.scheme),
      options: options, report: report)
  }

  // MARK: Data

  /// Number of pieces that the data is in.
  package var chunkCount: Int { walk.chunkCount }

  /// Number of samples of a piece.
  package func sampleCount(_ chunk: Int) -> Int {
    walk.data.chunks[chunk].values.first?.shape.dimensions.first ?? 1
  }

  /// The layer's input in the float network and with the quantized prefix; float32, same shape.
  ///
  /// - Parameter chunk: Which piece, below `chunkCount`.
  /// - Throws: `HalfstepError.nonFiniteValue` if an input is not finite.
  package func inputs(
    _ chunk: Int
  ) throws(HalfstepError) -> (reference: Tensor, quantized: Tensor) {
    try walk.inputs(chunk)
  }

  /// What the layer's output has to make up for besides its own error: how far the tensor that is
  /// added to it differs between the float network and the quantized prefix.
  ///
  /// - Parameters:
  ///   - chunk: Which piece.
  ///   - rows: Rows of the layer, as `unfolding` numbers them.
  ///   - unfolding: Of the piece's input.
  /// - Returns: Float less quantized, over alpha, `[K, rows.count]`; nil if there is no such tensor.
  package func sumErrors(
    _ chunk: Int, _ rows: [Int], _ unfolding: LayerUnfolding
  ) throws(HalfstepError) -> [Float]? {
    guard let addend, alpha != 0, let tensors = try walk.liveTensors(addend, chunk) else {
      return nil
    }
    let (outputs, shape) = (layer.outputChannels, tensors.reference.shape)
    guard shape == tensors.quantized.shape, shape.elementCount == unfolding.rowCount * outputs,
      tensors.reference.dataType == .float32, tensors.quantized.dataType == .float32
    else { return nil }
    let isConvolution = layer.kind == .conv || layer.kind == .convTranspose
    let picture = unfolding.rowsPerPicture
    // A sum that broadcasts has another shape than the layer's output.
    guard
      isConvolution
        ? shape.rank > 2 && shape[1] == outputs && shape[0] * picture == unfolding.rowCount
        : shape.dimensions.last == outputs
    else { return nil }
    let scale = Float(1 / alpha)
    return try tensors.reference.withFloats { (float) throws(HalfstepError) in
      try tensors.quantized.withFloats { (rounded) throws(HalfstepError) in
        var result = [Float](repeating: 0, count: outputs * rows.count)
        for channel in 0..<outputs {
          for (index, row) in rows.enumerated() {
            let at =
              isConvolution
              ? (row / picture * outputs + channel) * picture + row % picture
              : row * outputs + channel
            result[channel * rows.count + index] = (float[at] - rounded[at]) * scale
          }
        }
        return result
      }
    }
  }

  /// How the rows of an input lie.
  package func unfolding(_ shape: Shape) throws(HalfstepError) -> LayerUnfolding {
    try LayerUnfolding(
      layer, node, kernel: Array(weight.shape.dimensions.dropFirst(2)), input: shape)
  }

  /// Whether a piece validates and is not to be learned from.
  ///
  /// With a single piece no piece is held out, but every fifth row of it.
  package func isHeldOut(_ chunk: Int) -> Bool { Self.isHeldOut(chunk, of: chunkCount) }

  static func isHeldOut(_ chunk: Int, of count: Int) -> Bool {
    if count >= 5 { return chunk % 5 == 4 }
    return count > 1 && chunk == count - 1
  }

  /// Rows of a piece to learn from, or to validate on: drawn with the options' seed, ascending.
  ///
  /// - Parameters:
  ///   - chunk: Which piece.
  ///   - rowCount: Rows that the piece has.
  ///   - isHeldOut: Whether rows for validation are asked for.
  ///   - limit: Rows of all pieces together that are wanted at most, 1 or more.
  package func rows(
    _ chunk: Int, of rowCount: Int, isHeldOut wanted: Bool, limit: Int
  ) -> [Int] {
    let isSplit = chunkCount == 1
    guard isSplit || isHeldOut(chunk) == wanted else { return [] }
    let pieces = isSplit ? 1 : (0..<chunkCount).count { isHeldOut($0) == wanted }
    let share = max(1, (limit + pieces - 1) / pieces)
    // Every fifth row of a single piece validates; the others are numbered without gaps.
    let available =
      isSplit ? (wanted ? rowCount / 5 : rowCount - rowCount / 5) : rowCount
    var random = RowGenerator(
      seed: options.seed, position, chunk, wanted ? 1 : 0)
    let drawn = random.stratified(min(share, available), of: available)
    if !isSplit { return drawn }
    return drawn.map { wanted ? $0 * 5 + 4 : $0 + $0 / 4 }
  }

  /// Rows that validate, gathered once.
  package func heldOut() throws(HalfstepError) -> HeldOutRows {
    if let validation { return validation }
    let rows = try HeldOutRows(self)
    validation = rows
    return rows
  }

  /// Noise over signal that a candidate leaves, on data that validates.
  ///
  /// Of the network's outputs if the options say so and some output tells; otherwise of the layer's own.
  package func noise(of candidate: LayerRounding) throws(HalfstepError) -> Double {
    let noise = try walk.outputNoise { (graph) throws(HalfstepError) in
      var names = NameAllocator(graph)
      try candidate.put(into: &graph, layer, weightName, walk.index, names: &names)
    }
    if let noise { return noise }
    return try heldOut().noise(
      weight: candidate.weight, bias: candidate.bias?.map(Double.init))
  }

  /// Tells how far the layer is, 0...1.
  ///
  /// - Throws: `HalfstepError.cancelled` if the caller asked to stop.
  package func progress(_ fraction: Double) throws(HalfstepError) { try report(fraction) }

  // MARK: Helpers

  /// The other tensor of an addition that alone reads a layer's output.
  private static func addend(
    of layer: LinearLayer, _ graph: Graph, _ index: GraphIndex
  ) -> String? {
    guard let use = index.soleUse(of: layer.output), let slot = use.input, slot < 2,
      graph.nodes[use.node].isOperator("Add"), let other = graph.nodes[use.node].input(1 - slot),
      other != layer.output, graph.constant(other, index) == nil
    else { return nil }
    return other
  }

  private static func activation(
    behind layer: LinearLayer, _ graph: Graph, _ index: GraphIndex
  ) -> Activation {
    guard let use = index.soleUse(of: layer.output), use.input == 0 else { return .none }
    let node = graph.nodes[use.node]
    if node.isOperator("Relu") { return .clip(low: 0, high: .infinity) }
    guard node.isOperator("Clip") else { return .none }
    func bound(_ input: Int, _ key: String, _ open: Float) -> Float? {
      if let name = node.input(input) { return graph.constantScalar(name, index) }
      return node.floatAttribute(key) ?? open
    }
    guard let low = bound(1, "min", -.infinity), let high = bound(2, "max", .infinity) else {
      return .none
    }
    return .clip(low: low, high: high)
  }
}

/// Draws rows: SplitMix64, the same sequence on every machine.
package struct RowGenerator: Sendable {
  private var state: UInt64

  /// Starts a sequence that belongs to a seed and some numbers.
  package init(seed: UInt64, _ parts: Int...) {
    state = seed
    for part in parts {
      state = next() ^ UInt64(truncatingIfNeeded: part) &* 0xD6E8_FEB8_6659_FD93
    }
  }

  package mutating func next() -> UInt64 {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
    return z ^ (z >> 31)
  }

  /// One position of each of `count` equal stretches of `0..<total`, ascending; all if there are as
  /// many.
  package mutating func stratified(_ count: Int, of total: Int) -> [Int] {
    if count >= total { return Array(0..<max(total, 0)) }
    return (0..<count).map { index in
      let (low, high) = (index * total / count, (index + 1) * total / count)
      return low + Int(next() % UInt64(high - low))
    }
  }
}
