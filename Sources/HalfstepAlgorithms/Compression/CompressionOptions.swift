// SPDX-License-Identifier: Apache-2.0
// How to compress, and what compression did.

import HalfstepNumerics

/// How layers are made smaller.
package enum CompressionScheme: Int32, Hashable, Sendable {
  /// A 1×1 layer before each layer.
  case weightSVD = 0
  /// A vertical and a horizontal kernel instead of each kernel.
  case spatialSVD = 1
  /// Fewer channels between layers.
  case channelPruning = 2
}

/// How to compress.
package struct CompressionOptions: Sendable {
  package var scheme: CompressionScheme = .spatialSVD
  /// What ratios speak of.
  package var metric: CostMetric = .macs
  /// Sizes are rounded up to multiples of this, 1 or more.
  package var multiplicity: Int = 1
  /// Layers that stay as they are: names of nodes or weights.
  package var ignoredLayers: [String] = []
  /// Shapes of inputs whose extents are open.
  package var inputShapes: [String: Shape] = [:]
  /// Which channels go; for channel pruning.
  package var importance: ChannelImportance = .reconstruction
  /// Whether layers are fitted to the channels that are left; for channel pruning.
  package var reconstructs = true
  /// Layers that keep all channels that they read: names of nodes or weights; for channel pruning.
  package var inputKeepers: [String] = []
  /// Whether channels stay that the network picks by position, since nothing but constants can be
  /// changed where the result is used; for channel pruning.
  package var keepsPositions = false

  package init() {}
}

/// A layer that can be split, or whose output channels can be pruned with those of the layers that are
/// coupled with it.
package struct CompressibleLayer: Hashable, Sendable {
  /// What messages call the node.
  package let name: String
  package let operatorType: String
  package let weight: String
  package let cost: Cost
  /// Largest rank, or number of channels that may go.
  package let maximumUnits: Int
}

/// A layer that cannot be compressed.
package struct CompressionRefusal: Hashable, Sendable {
  package let layer: String
  package let reason: String
}

/// What compression did.
package struct CompressionReport: Sendable {
  /// What happened to a layer.
  package struct Layer: Hashable, Sendable {
    package let name: String
    package let operatorType: String
    /// Rank or number of channels that stay; nil if none was chosen.
    package let units: Int?
    package let maximumUnits: Int
    package let before: Cost
    package let after: Cost
    /// Name of the weight before.
    package let weight: String
    /// Constants of the pair; nil if the layer stayed as it was.
    package let pair: Pair?
    /// Noise over signal of the layer's output on held-out rows; nil without data.
    package let noise: Noise?
    /// Name of the bias that a pruned layer got; nil if its bias lost channels at most.
    package var fittedBias: String?
  }
  /// Names of the constants of a pair of layers.
  package struct Pair: Hashable, Sendable {
    package let firstWeight: String
    package let secondWeight: String
    /// Nil if the second layer has no bias.
    package let bias: String?
  }
  /// What a layer's factors do to its output.
  package struct Noise: Hashable, Sendable {
    /// With the factors that are best for the weight.
    package let plain: Double
    /// With what was kept; never larger.
    package let kept: Double
  }
  package let layers: [Layer]
  package let before: Cost
  package let after: Cost
  package let refusals: [CompressionRefusal]
  /// Constants that lost channels.
  package var constants: [PrunedConstant] = []
}

/// A constant that lost channels along an axis.
package struct PrunedConstant: Hashable, Sendable {
  /// Name before.
  package let name: String
  /// Name in the compressed network.
  package let result: String
  package let axis: Int
  /// Indices that stay, rising.
  package let kept: [Int]
}
