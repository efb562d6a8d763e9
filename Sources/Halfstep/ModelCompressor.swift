// SPDX-License-Identifier: Apache-2.0
// Compression: weight SVD, spatial SVD, and the choice of ratios.

import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics

/// How layers are made smaller.
public enum CompressionScheme: Int32, Hashable, Sendable, CaseIterable {
  /// A 1×1 layer to fewer channels before each layer.
  case weightSVD = 0
  /// A vertical and a horizontal kernel instead of each kernel.
  case spatialSVD = 1
  /// Fewer channels between layers.
  case channelPruning = 2
}

/// Which channels go first in channel pruning.
public enum ChannelImportance: Int32, Hashable, Sendable, CaseIterable {
  /// Those that the layers reading them miss least once the others make up for them; needs data.
  case reconstruction = 0
  /// Those that are read with the smallest squared weights, as in AIMET.
  case magnitude = 1
}

/// What a ratio speaks of: compressed cost over original cost.
public enum CompressionMetric: Int32, Hashable, Sendable, CaseIterable {
  /// Multiply-accumulates.
  case macs = 0
  /// Elements of weights.
  case memory = 1
}

/// How to compress.
public struct CompressionOptions: Sendable {
  /// How layers are made smaller; default spatial SVD.
  public var scheme: CompressionScheme = .spatialSVD
  /// What ratios speak of; default multiply-accumulates.
  public var metric: CompressionMetric = .macs
  /// Ranks and numbers of channels are rounded up to multiples of this, 1...1048576; default 1.
  public var multiplicity: Int = 1
  /// Layers that stay as they are, by node name, weight, or weight without `.weight`; default none.
  public var ignoredLayers: [String] = []
  /// Shapes of inputs whose extents are open; an open first extent counts as 1. Default none.
  public var inputShapes: [String: Shape] = [:]
  /// Which channels go first, for channel pruning; default by reconstruction, which needs data.
  public var importance: ChannelImportance = .reconstruction
  /// Whether channel pruning fits layers to the channels that are left, which needs data; default yes.
  public var reconstructs: Bool = true
  /// Layers that keep all channels that they read, as AIMET's `modules_to_ignore`, by node name, weight,
  /// or weight without `.weight`, for channel pruning; default none.
  public var inputKeepers: [String] = []
  /// Whether channel pruning keeps channels that Split, Slice and Gather pick by position; default no.
  ///
  /// For networks that are described elsewhere, in a program that nothing can change but its weights.
  public var keepsPositions: Bool = false

  /// Creates the default options.
  public init() {}
}

/// The cost of one layer or of a network, for one sample.
public struct ComputeCost: Hashable, Sendable {
  /// Multiply-accumulates.
  public let macs: Int
  /// Elements of weights; biases are not counted.
  public let parameters: Int

  init(_ cost: Cost) {
    macs = cost.macs
    parameters = cost.parameters
  }
}

/// A layer and its cost.
public struct CostedLayer: Hashable, Sendable {
  /// Node name, or operator and first output if the node has no name.
  public let name: String
  /// Operator, such as `Conv`.
  public let operatorType: String
  /// Name of the weight.
  public let weight: String
  /// What it costs.
  public let cost: ComputeCost
}

/// A layer that can be split, or whose output channels can be pruned.
///
/// Layers whose outputs are added, or that are coupled in another way, lose the same channels: the first
/// of them stands for all.
public struct CompressibleLayer: Hashable, Sendable {
  /// The layer.
  public let layer: CostedLayer
  /// Largest rank, or number of channels that can be pruned.
  public let maximumUnits: Int
}

/// A layer that cannot be compressed.
public struct CompressionRefusal: Hashable, Sendable {
  /// The layer.
  public let layer: String
  /// Why.
  public let reason: String
}

/// What compression did.
public struct CompressionStats: Hashable, Sendable {
  /// What happened to a layer.
  public struct Layer: Hashable, Sendable {
    /// Node name before compression.
    public let name: String
    /// Operator, such as `Conv`.
    public let operatorType: String
    /// Rank, or number of channels that stayed of those that can be pruned; nil if none was chosen.
    public let units: Int?
    /// Largest rank or number of channels; 0 if the layer cannot be compressed.
    public let maximumUnits: Int
    /// Cost before.
    public let before: ComputeCost
    /// Cost after, of both layers if it was split.
    public let after: ComputeCost
    /// Name of the weight before compression.
    public let weight: String
    /// Constants of the pair that replaces the layer; nil if it stayed as it was.
    public let pair: Pair?
    /// What the factors do to the layer's output; nil without data.
    public let noise: Noise?
    /// Name of the bias that was fitted when the layer lost channels; nil if none was.
    public let fittedBias: String?
  }
  /// Names of the constants of a pair of layers.
  public struct Pair: Hashable, Sendable {
    /// Weight of the first layer, which has no bias.
    public let firstWeight: String
    /// Weight of the second layer.
    public let secondWeight: String
    /// Bias of the second layer; nil if it has none.
    public let bias: String?
  }
  /// Noise over signal of a layer's output on held-out rows.
  public struct Noise: Hashable, Sendable {
    /// With the factors that are best for the weight alone.
    public let plain: Double
    /// With what was kept; never larger.
    public let kept: Double
  }
  /// Every layer, in the order in which they run.
  public let layers: [Layer]
  /// Cost of the network before.
  public let before: ComputeCost
  /// Cost of the network after.
  public let after: ComputeCost
  /// What cannot be compressed, and why.
  public let refusals: [CompressionRefusal]
  /// Constants that lost channels, and which of them stay; an entry for each axis.
  public let constants: [PrunedConstant]

  /// Multiply-accumulates after over before; 1 for a network without layers.
  public var macRatio: Double { Self.share(after.macs, before.macs) }
  /// Weights after over before; 1 for a network without layers.
  public var memoryRatio: Double { Self.share(after.parameters, before.parameters) }

  private static func share(_ after: Int, _ before: Int) -> Double {
    before > 0 ? Double(after) / Double(before) : 1
  }
}

/// A constant that lost channels along an axis.
public struct PrunedConstant: Hashable, Sendable {
  /// Name before; constants that several nodes read may have an entry for each.
  public let name: String
  /// Name in the compressed network.
  public let result: String
  /// Axis of the channels.
  public let axis: Int
  /// Indices that stay, rising.
  public let kept: [Int]
}

/// What a layer's ratios do to the network's score, for `ModelCompressor.selectGreedily`.
public struct RatioCurve: Hashable, Sendable {
  /// Ratios in rising order, in (0, 1].
  public var ratios: [Double]
  /// Score of the network with only this layer compressed, for each ratio; higher is better.
  public var scores: [Double]

  /// Creates a curve.
  public init(ratios: [Double], scores: [Double]) {
    self.ratios = ratios
    self.scores = scores
  }
}

/// Compresses a network, as often as wanted; the model it was made of stays as it is.
///
/// Sizes are ranks or numbers of channels, one for each of `layers`; nil leaves a layer as it is.
///
///     var compressor = try ModelCompressor(model)
///     let sizes = try compressor.select(target: 0.5)
///     let (smaller, stats) = try compressor.compress(sizes)
public struct ModelCompressor: Sendable {
  private var compressor: Compressor
  private let original: Model

  /// Finds out what can be compressed.
  ///
  /// - Parameters:
  ///   - model: A trained network.
  ///   - options: How to compress.
  /// - Throws: `HalfstepError.invalidArgument` for options out of range, or an input whose shape is
  ///   open; `.unknownName` for an ignored layer or input that does not exist; `.unsupportedOperator`
  ///   if shapes cannot be found.
  /// - Complexity: O(nodes + weights).
  public init(
    _ model: Model, _ options: CompressionOptions = CompressionOptions()
  ) throws(HalfstepError) {
    var inner = HalfstepAlgorithms.CompressionOptions()
    inner.scheme =
      switch options.scheme {
      case .weightSVD: .weightSVD
      case .spatialSVD: .spatialSVD
      case .channelPruning: .channelPruning
      }
    inner.importance = options.importance == .magnitude ? .magnitude : .reconstruction
    inner.reconstructs = options.reconstructs
    inner.metric = options.metric == .macs ? .macs : .memory
    inner.multiplicity = options.multiplicity
    inner.ignoredLayers = options.ignoredLayers
    inner.inputKeepers = options.inputKeepers
    inner.keepsPositions = options.keepsPositions
    inner.inputShapes = options.inputShapes
    compressor = try Compressor(model.graph, inner)
    original = model
  }

  /// Costs of every convolution and matrix product, in the order in which they run.
  ///
  /// A convolution takes one multiply-accumulate for each weight at each output position (a transposed
  /// one at each input position), a matrix product one for each weight in each row. The first axis is
  /// the batch and does not count.
  public var costs: [CostedLayer] {
    compressor.costs.layers.map {
      CostedLayer(
        name: $0.name, operatorType: $0.operatorType, weight: $0.weight, cost: ComputeCost($0.cost))
    }
  }
  /// What can be compressed, in the order in which it runs.
  public var layers: [CompressibleLayer] {
    compressor.layers.map {
      CompressibleLayer(
        layer: CostedLayer(
          name: $0.name, operatorType: $0.operatorType, weight: $0.weight,
          cost: ComputeCost($0.cost)),
        maximumUnits: $0.maximumUnits)
    }
  }
  /// What cannot be compressed, and why.
  public var refusals: [CompressionRefusal] {
    compressor.refusals.map { CompressionRefusal(layer: $0.layer, reason: $0.reason) }
  }

  /// Position in `layers` of a layer by node name, weight, or weight without `.weight`.
  ///
  /// - Throws: `HalfstepError.unknownName`; `.unsupportedOperator` with the reason if the layer cannot
  ///   be compressed.
  public func position(of layer: String) throws(HalfstepError) -> Int {
    try compressor.position(of: layer)
  }

  /// Positions in `layers` of what a layer reads: AIMET gives ratios of channel pruning to layers that
  /// read the channels, this package to layers that write them.
  ///
  /// - Parameter layer: By node name, weight, or weight without `.weight`.
  /// - Returns: One or more, ascending; where layers are split, the layer itself.
  /// - Throws: `HalfstepError.unknownName`; `.unsupportedOperator` with the reason if no channel that
  ///   it reads can be pruned.
  public func positions(readBy layer: String) throws(HalfstepError) -> [Int] {
    try compressor.positions(readBy: layer)
  }

  /// Layers that write and that read the channels of one of `layers`; where layers are split, the layer
  /// itself for both.
  ///
  /// - Parameter position: Position in `layers`.
  /// - Returns: Positions in `costs`, ascending.
  /// - Throws: `HalfstepError.invalidArgument` for a position out of range.
  public func members(
    _ position: Int
  ) throws(HalfstepError) -> (writers: [Int], readers: [Int]) {
    guard compressor.layers.indices.contains(position) else {
      throw HalfstepError(
        .invalidArgument,
        "layer: expected a position below \(compressor.layers.count), got \(position)")
    }
    return compressor.members(position)
  }

  /// The rank that brings a layer's cost to a ratio, or that share of its channels, rounded up to the
  /// multiplicity.
  ///
  /// - Parameters:
  ///   - position: Position in `layers`.
  ///   - ratio: Above 0.
  /// - Returns: nil for ratios of 1 and more.
  /// - Throws: `HalfstepError.invalidArgument` for a position or ratio out of range.
  public func units(_ position: Int, ratio: Double) throws(HalfstepError) -> Int? {
    guard compressor.layers.indices.contains(position) else {
      throw HalfstepError(
        .invalidArgument,
        "layer: expected a position below \(compressor.layers.count), got \(position)")
    }
    return try compressor.units(position, ratio: ratio)
  }

  /// The ratio that a size of a layer amounts to.
  ///
  /// - Parameters:
  ///   - position: Position in `layers`.
  ///   - units: 1 to the layer's maximum.
  /// - Throws: `HalfstepError.invalidArgument` for a position or size out of range.
  public func ratio(_ position: Int, units: Int) throws(HalfstepError) -> Double {
    guard compressor.layers.indices.contains(position),
      (1...compressor.layers[position].maximumUnits).contains(units)
    else {
      throw HalfstepError(
        .invalidArgument,
        "layer \(position) with size \(units): expected a position below "
          + "\(compressor.layers.count) and a size within its maximum")
    }
    return compressor.actualRatio(position, units)
  }

  /// Takes unlabeled inputs: from now on layers are split for them, and sizes chosen by what they do to
  /// the layers' outputs.
  ///
  /// Each layer's factors minimize the error of its output in the second moments of its input, behind
  /// the layers that were split before it, and the bias takes the means. Factors that are best for the
  /// weight alone stay where they do better on rows that were held out.
  ///
  /// - Parameter data: Values of the network's inputs, `[N, …]` each; copied. A few hundred samples
  ///   are plenty.
  /// - Throws: `HalfstepError.emptyStatistics` without rows; `.unknownName`, `.shapeMismatch`,
  ///   `.nonFiniteValue` for the data.
  public mutating func calibrate(_ data: [String: Tensor]) throws(HalfstepError) {
    try compressor.calibrate([data])
  }

  /// The share of each layer that each size loses when nothing else is compressed.
  ///
  /// Of the power of the layer's output around its mean with data, else of its squared weight. The
  /// first call does the work, `select(target:progress:)` counts as one.
  ///
  /// - Parameter progress: Called with the share that is done; returns false to cancel.
  /// - Returns: For each of `layers` the shares from size 0 on, falling from 1 to 0; up to the largest
  ///   size, or with data to the largest that does not cost more than the layer.
  /// - Throws: `HalfstepError.nonFiniteValue` for weights or data; `.cancelled`; with data, what
  ///   running the network throws.
  public func errorCurves(
    progress: ((Double) -> Bool)? = nil
  ) throws(HalfstepError) -> [[Double]] {
    try compressor.errorCurves(progress: Self.check(progress))
  }

  /// Chooses sizes without evaluating the network: the sum of the layers' relative errors, which
  /// `errorCurves(progress:)` gives, is least among all choices within the target.
  ///
  /// - Parameters:
  ///   - target: Cost wanted over original cost, in (0, 1].
  ///   - progress: Called with the share that is done; returns false to cancel.
  /// - Returns: Sizes of `layers`.
  /// - Throws: `HalfstepError.invalidArgument` for a target that is out of range or cannot be reached;
  ///   `.nonFiniteValue` for weights; `.cancelled`.
  public func select(
    target: Double, progress: ((Double) -> Bool)? = nil
  ) throws(HalfstepError) -> [Int?] {
    try compressor.select(target: target, progress: Self.check(progress))
  }

  /// Chooses sizes from scores of networks in which one layer is compressed, as AIMET does.
  ///
  /// - Parameters:
  ///   - target: Cost wanted over original cost, in (0, 1]; met within 0.001 where scores allow it.
  ///   - curves: Ratios and scores of each of `layers`.
  ///   - usesMonotonicFit: Whether each curve is replaced by a rising polynomial of degree 7 first;
  ///     default no.
  /// - Returns: Sizes of `layers`.
  /// - Throws: `HalfstepError.invalidArgument` for a target or curves out of range.
  public func selectGreedily(
    target: Double, curves: [RatioCurve], usesMonotonicFit: Bool = false
  ) throws(HalfstepError) -> [Int?] {
    try compressor.select(
      target: target,
      curves: curves.map { GreedySelection.Curve(ratios: $0.ratios, scores: $0.scores) },
      usesMonotonicFit: usesMonotonicFit)
  }

  /// Evaluates the network at every ratio of every layer.
  ///
  /// - Parameters:
  ///   - candidates: Number of ratios, 2 or more: 1/candidates ... (candidates − 1)/candidates.
  ///   - evaluate: Score of a network; higher is better.
  /// - Returns: Curves for `selectGreedily`.
  /// - Throws: What `compress` and `evaluate` throw.
  public func curves(
    candidates: Int = 10, evaluate: (Model) throws(HalfstepError) -> Double
  ) throws(HalfstepError) -> [RatioCurve] {
    guard (2...1000).contains(candidates) else {
      throw HalfstepError(
        .invalidArgument, "candidates: expected 2...1000, got \(candidates)")
    }
    var curves: [RatioCurve] = []
    for position in layers.indices {
      var curve = RatioCurve(ratios: [], scores: [])
      for step in 1..<candidates {
        let ratio = Double(step) / Double(candidates)
        var sizes = [Int?](repeating: nil, count: layers.count)
        sizes[position] = try units(position, ratio: ratio)
        curve.ratios.append(ratio)
        curve.scores.append(try evaluate(try compress(sizes).model))
      }
      curves.append(curve)
    }
    return curves
  }

  /// Compresses.
  ///
  /// - Parameters:
  ///   - sizes: Rank of each of `layers`, 1 to its maximum; nil leaves a layer as it
  ///     is.
  ///   - progress: Called with the share that is done; returns false to cancel.
  /// - Returns: The smaller network, and what was done.
  /// - Throws: `HalfstepError.invalidArgument` for sizes out of range; `.nonFiniteValue` for weights;
  ///   `.numericFailure`; `.cancelled`.
  /// - Complexity: O(weights · ranks).
  /// - Reference: Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank
  ///   Expansions", 2014, arXiv:1405.3866 (spatial SVD).
  public func compress(
    _ sizes: [Int?], progress: ((Double) -> Bool)? = nil
  ) throws(HalfstepError) -> (model: Model, stats: CompressionStats) {
    let result = try compressor.compress(units: sizes, progress: Self.check(progress))
    var model = original
    model.graph = result.graph
    return (model, CompressionStats(result.report))
  }

  private static func check(
    _ progress: ((Double) -> Bool)?
  ) -> (Double) throws(HalfstepError) -> Void {
    { (share: Double) throws(HalfstepError) in
      if let progress, !progress(share) {
        throw HalfstepError(.cancelled, "compression was cancelled")
      }
    }
  }
}

extension CompressionStats {
  init(_ report: CompressionReport) {
    layers = report.layers.map {
      Layer(
        name: $0.name, operatorType: $0.operatorType, units: $0.units,
        maximumUnits: $0.maximumUnits, before: ComputeCost($0.before), after: ComputeCost($0.after),
        weight: $0.weight,
        pair: $0.pair.map {
          Pair(firstWeight: $0.firstWeight, secondWeight: $0.secondWeight, bias: $0.bias)
        },
        noise: $0.noise.map { Noise(plain: $0.plain, kept: $0.kept) }, fittedBias: $0.fittedBias)
    }
    before = ComputeCost(report.before)
    after = ComputeCost(report.after)
    refusals = report.refusals.map { CompressionRefusal(layer: $0.layer, reason: $0.reason) }
    constants = report.constants.map {
      PrunedConstant(name: $0.name, result: $0.result, axis: $0.axis, kept: $0.kept)
    }
  }
}
