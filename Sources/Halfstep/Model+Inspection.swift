// SPDX-License-Identifier: Apache-2.0
// What the layers of a model look like.

import HalfstepGraph
import HalfstepNumerics

/// A layer that has a weight.
public struct Layer: Hashable, Sendable {
  /// Node name, or operator and first output if the node has no name.
  public let name: String
  /// Operator, such as `Conv`.
  public let operatorType: String
  /// Name of the weight.
  public let weight: String
  /// Shape of the weight.
  public let weightShape: Shape
  /// Axis of the weight along which output channels lie.
  public let channelAxis: Int
  /// Least weight of each output channel, `[K]`.
  public let channelMinimums: [Float]
  /// Largest weight of each output channel, `[K]`.
  public let channelMaximums: [Float]

  /// Least weight of the layer; 0 without weights.
  public var minimum: Float { channelMinimums.min() ?? 0 }
  /// Largest weight of the layer; 0 without weights.
  public var maximum: Float { channelMaximums.max() ?? 0 }
}

/// What the layers of a model look like, and what the algorithms would do with them.
public struct Inspection: Hashable, Sendable {
  /// Convolutions and matrix products with constant float weights, in the order in which they run.
  public let layers: [Layer]
  /// Folds that `foldBatchNorms()` would make.
  public let folds: [BatchNormFold]
  /// Sets that `equalize()` would form after folding.
  public let equalizedSets: [EqualizedSet]
}

extension Model {
  /// The layers' weights, in the order in which they run.
  ///
  /// NaN counts as neither less nor larger than anything; a channel of nothing else gets 0.
  ///
  /// - Returns: Convolutions and matrix products with constant float weights.
  /// - Complexity: O(weights).
  public func layers() throws(HalfstepError) -> [Layer] {
    var layers: [Layer] = []
    for node in graph.nodes {
      guard let name = node.input(1), let weight = graph.initializers[name],
        weight.dataType == .float32, let axis = node.weightChannelAxis(rank: weight.shape.rank)
      else { continue }
      let (minimums, maximums) = try weight.ranges(along: axis)
      layers.append(
        Layer(
          name: node.label, operatorType: node.opType, weight: name, weightShape: weight.shape,
          channelAxis: axis, channelMinimums: minimums, channelMaximums: maximums))
    }
    return layers
  }

  /// The layers, and a rehearsal of folding and equalization on a copy.
  ///
  /// - Throws: What `foldBatchNorms()` and `equalize()` throw.
  /// - Complexity: O(weights · iterations).
  public func inspect() throws(HalfstepError) -> Inspection {
    var copy = self
    let folds = try copy.foldBatchNorms()
    let report = try copy.equalize()
    return Inspection(layers: try layers(), folds: folds, equalizedSets: report.sets)
  }
}

extension Node {
  /// Axis of a layer's weight along which output channels lie; nil for other nodes.
  fileprivate func weightChannelAxis(rank: Int) -> Int? {
    guard domain.isEmpty, rank >= 2 else { return nil }
    switch opType {
    case "Conv": return 0
    case "ConvTranspose": return 1
    case "Gemm": return rank == 2 ? (intAttribute("transB") ?? 0 != 0 ? 0 : 1) : nil
    case "MatMul": return rank - 1
    default: return nil
    }
  }
}

extension Tensor {
  /// Least and largest value at each index along an axis.
  fileprivate func ranges(along axis: Int) throws(HalfstepError) -> ([Float], [Float]) {
    let inner = shape.dimensions[(axis + 1)...].reduce(1, *)
    let channels = shape[axis]
    var minimums = [Float](repeating: .infinity, count: channels)
    var maximums = [Float](repeating: -.infinity, count: channels)
    try withFloats { (values) throws(HalfstepError) in
      guard inner > 0, channels > 0 else { return }
      var start = 0
      while start < values.count {
        for channel in 0..<channels {
          var low = minimums[channel]
          var high = maximums[channel]
          for value in values[start..<(start + inner)] {
            if value < low { low = value }
            if value > high { high = value }
          }
          minimums[channel] = low
          maximums[channel] = high
          start += inner
        }
      }
    }
    for channel in 0..<channels where minimums[channel] > maximums[channel] {
      minimums[channel] = 0
      maximums[channel] = 0
    }
    return (minimums, maximums)
  }
}
