// SPDX-License-Identifier: Apache-2.0
// Visits linear layers when there is no data.

import HalfstepGraph
import HalfstepNumerics

/// What rounding needs to know of a layer besides its inputs.
package struct LayerWeights: Sendable {
  /// The node's label.
  package let label: String
  package let layout: WeightLayout
  /// The float weight.
  package let weight: Tensor
  /// The float bias, `[K]`; zeros if there is none.
  package let bias: [Double]
  /// Gemm's alpha; 1 for other layers.
  package let alpha: Double
  /// The grid that is asked for.
  package let spec: QuantizerSpec
  /// Whether the rounded layer may have another bias.
  package let canChangeBias: Bool
}

extension LayerProblem {
  /// The layer without its data.
  package var weights: LayerWeights {
    LayerWeights(
      label: node.label, layout: layer.layout, weight: weight, bias: bias, alpha: alpha,
      spec: spec, canChangeBias: canChangeBias)
  }
}

/// Visits the linear layers of a network in order, with what is expected of their inputs.
struct DataFreeWalk {
  struct Layer {
    let weights: LayerWeights
    /// The grid that weights rounded to nearest get.
    let nearest: Encoding
    /// Mean and variance of each input channel; nil if they are not known.
    let inputs: [(mean: Double, variance: Double)]?
  }
  /// What is to become of a layer, with the figures of its report.
  struct Change {
    var rounding: LayerRounding
    var before: Double
    var after: Double
  }

  private let graph: Graph
  private let index: GraphIndex
  private let simulation: QuantizationSimulation
  private let moments: ExpectedMoments
  private let options: LayerReconstruction.Options

  /// - Throws: What `QuantizationSimulation` throws.
  init(_ source: Graph, _ options: LayerReconstruction.Options) throws(HalfstepError) {
    var graph = source
    try graph.validateAndSort()
    self.graph = graph
    self.options = options
    index = GraphIndex(graph)
    moments = try ExpectedMoments(graph, index)
    var settings = QuantizationSimulation.Options()
    settings.parameterBits = options.parameterBits
    settings.activationBits = options.activationBits ?? 8
    settings.parameterBlockSize = options.parameterBlockSize
    settings.scheme = options.scheme
    settings.excludedLayers = options.excludedLayers
    settings.usesWeightEncodings = false
    simulation = try QuantizationSimulation(
      graph: graph, configuration: options.configuration, options: settings)
    try simulation.setLayerBits(options.layerBits, in: graph)
  }

  /// Changes one layer after the other.
  ///
  /// - Parameter body: What is to become of a layer; nil to leave it.
  /// - Returns: The changed network.
  func run(
    _ report: inout LayerReconstruction.Report,
    _ progress: ((LayerReconstruction.Progress) -> Bool)?,
    _ body: (Layer) throws(HalfstepError) -> Change?
  ) throws(HalfstepError) -> Graph {
    var result = graph
    var names = NameAllocator(graph)
    var seen: Set<String> = []
    let layers = graph.nodes.indices.compactMap { LinearLayer(graph, at: $0, index) }
    for (number, layer) in layers.enumerated() {
      let node = graph.nodes[layer.node]
      if let progress,
        !progress(
          .init(completed: number, total: layers.count, layer: node.label, fraction: 0))
      {
        throw HalfstepError(
          .cancelled, "rounding was cancelled at node '\(node.label)'", node: node.label)
      }
      guard let name = node.input(1), let quantizer = simulation.quantizers[name],
        quantizer.isEnabled, quantizer.site.role == .parameter, let nearest = quantizer.encoding
      else {
        report.skipped.append((node.label, "the configuration does not quantize its weight"))
        continue
      }
      guard seen.insert(name).inserted else {
        report.skipped.append((node.label, "its weight was rounded for an earlier layer"))
        continue
      }
      let weights = LayerWeights(
        label: node.label, layout: layer.layout, weight: try layer.weight(in: graph, index),
        bias: try layer.bias(in: graph, index),
        alpha: layer.kind == .gemm ? Double(node.floatAttribute("alpha") ?? 1) : 1,
        spec: quantizer.site.spec,
        canChangeBias: layer.kind != .matMul || layer.hasBias
          || graph.rank(of: layer.input, index) == 2)
      let change = try body(
        Layer(
          weights: weights, nearest: nearest,
          inputs: moments[layer.input]?.inputs(layer.inputChannels)))
      report.layers.append(
        .init(
          layer: node.label, weight: name, bits: quantizer.site.spec.bits,
          before: change?.before ?? 0, after: change?.after ?? 0,
          kept: change?.rounding.note ?? "nearest"))
      guard let change else { continue }
      try change.rounding.put(
        into: &result, layer, name, index, writesWeight: options.writesWeights, names: &names)
      if options.writesWeights { result.weightEncodings[name] = change.rounding.encoding }
    }
    result.checkInvariants()
    return result
  }
}
