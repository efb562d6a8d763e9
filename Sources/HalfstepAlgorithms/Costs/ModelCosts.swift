// SPDX-License-Identifier: Apache-2.0
// What the layers of a network cost: multiply-accumulates and weights.

import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime

/// What something costs.
package struct Cost: Hashable, Sendable {
  /// Multiply-accumulates for one sample.
  package var macs: Int
  /// Elements of weights; biases are not counted, as in AIMET.
  package var parameters: Int

  package init(macs: Int, parameters: Int) {
    self.macs = macs
    self.parameters = parameters
  }

  package static let zero = Cost(macs: 0, parameters: 0)

  package static func + (a: Cost, b: Cost) -> Cost {
    Cost(macs: a.macs + b.macs, parameters: a.parameters + b.parameters)
  }

  /// The part that a target speaks of.
  package func value(_ metric: CostMetric) -> Int { metric == .macs ? macs : parameters }
}

/// What a target ratio speaks of.
package enum CostMetric: Int32, Hashable, Sendable {
  /// Multiply-accumulates.
  case macs = 0
  /// Weights in memory.
  case memory = 1
}

/// The cost of one layer.
package struct LayerCost: Hashable, Sendable {
  /// What messages call the node.
  package let name: String
  /// Operator, such as `Conv`.
  package let operatorType: String
  /// Name of the weight.
  package let weight: String
  package let cost: Cost
  /// Position of the node.
  package let node: Int
}

/// The costs of a network's convolutions and matrix products with constant float weights.
///
/// A convolution takes one multiply-accumulate for each weight at each output position, a matrix
/// product one for each weight in each row, a transposed convolution one for each weight at each input
/// position. The first axis is the batch and does not count.
package struct ModelCosts: Sendable {
  package let layers: [LayerCost]

  package var total: Cost { layers.reduce(.zero) { $0 + $1.cost } }

  /// Counts.
  ///
  /// - Parameters:
  ///   - graph: A valid graph.
  ///   - inputShapes: Shapes of inputs whose extents are open; an open first extent alone becomes 1.
  /// - Throws: `HalfstepError.invalidArgument` for an open extent that is not given; what compiling
  ///   the network throws.
  package init(_ graph: Graph, inputShapes: [String: Shape]) throws(HalfstepError) {
    let index = GraphIndex(graph)
    var found: [LinearLayer] = []
    var wanted: [String] = []
    for position in graph.nodes.indices {
      guard let layer = LinearLayer(graph, at: position, index) else { continue }
      found.append(layer)
      wanted.append(Self.countedTensor(layer, graph.nodes[position]))
    }
    let shapes = try TensorShapes.infer(graph, wanted, inputShapes: inputShapes)
    var layers: [LayerCost] = []
    for (layer, tensor) in zip(found, wanted) {
      let node = graph.nodes[layer.node]
      let weights = try layer.weight(in: graph, index).count
      guard let shape = shapes[tensor] else {
        throw HalfstepError(.internalError, "tensor '\(tensor)' has no shape")
      }
      let positions = Self.positions(layer.kind, shape)
      let (macs, overflow) = weights.multipliedReportingOverflow(by: positions)
      guard !overflow, macs < 1 << 55 else {
        throw HalfstepError(
          .invalidArgument, "node '\(node.label)': too many multiply-accumulates",
          node: node.label)
      }
      layers.append(
        LayerCost(
          name: node.label, operatorType: node.opType, weight: node.inputs[1],
          cost: Cost(macs: macs, parameters: weights), node: layer.node))
    }
    self.layers = layers
    guard layers.reduce(0, { $0 &+ $1.cost.macs >> 10 }) < 1 << 52 else {
      throw HalfstepError(.invalidArgument, "the network has too many multiply-accumulates")
    }
  }

  /// The tensor whose extents say how often each weight is used.
  static func countedTensor(_ layer: LinearLayer, _ node: Node) -> String {
    layer.kind == .convTranspose ? layer.input : node.outputs[0]
  }

  /// How often each weight is used for one sample, by the shape of the counted tensor.
  static func positions(_ kind: LinearLayer.Kind, _ shape: Shape) -> Int {
    switch kind {
    case .conv, .convTranspose: shape.dimensions.dropFirst(2).reduce(1, *)
    case .gemm: 1
    case .matMul: shape.dimensions.dropFirst().dropLast().reduce(1, *)
    }
  }
}

/// Shapes of tensors for given input shapes.
package enum TensorShapes {
  /// Finds the shapes of tensors by compiling the network.
  ///
  /// - Throws: `HalfstepError.invalidArgument` for an open extent that is not given, other than a
  ///   first one; `.unknownName` for a shape of something that is no input; what compiling throws.
  package static func infer(
    _ graph: Graph, _ tensors: [String], inputShapes: [String: Shape]
  ) throws(HalfstepError) -> [String: Shape] {
    var inputs: [String: Shape] = [:]
    for input in graph.inputs where graph.initializers[input.name] == nil {
      if let given = inputShapes[input.name] {
        inputs[input.name] = given
        continue
      }
      var extents: [Int] = []
      for (axis, dimension) in (input.dimensions ?? [.unknown, .unknown]).enumerated() {
        if case .fixed(let extent) = dimension {
          extents.append(extent)
        } else if axis == 0, input.dimensions != nil {
          extents.append(1)
        } else {
          throw HalfstepError(
            .invalidArgument,
            "input '\(input.name)': its shape is open along axis \(axis); give an input shape")
        }
      }
      inputs[input.name] = try Shape(extents)
    }
    for name in inputShapes.keys.sorted() where inputs[name] == nil {
      throw HalfstepError(.unknownName, "input shapes: the network has no input '\(name)'")
    }
    var result = inputs
    for (name, tensor) in graph.initializers { result[name] = tensor.shape }
    let names = Set(graph.inputs.map(\.name))
    let computed = tensors.filter { result[$0] == nil && !names.contains($0) }
    if computed.isEmpty { return result }
    // Nothing but what was asked for has to run.
    var part = graph
    part.outputs = []
    let session = try Session(graph: part, extraOutputs: computed, isForRuns: false)
    result.merge(try session.outputShapes(inputs)) { $1 }
    return result
  }
}
