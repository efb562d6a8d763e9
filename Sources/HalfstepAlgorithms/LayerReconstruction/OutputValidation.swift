// SPDX-License-Identifier: Apache-2.0
// Compares candidates for a layer by what they do to the network's outputs.

import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import OrderedCollections

/// Compares candidates for the layer at which a walk stands by the network's outputs.
///
/// A layer's own error tells little about the network's: a shift that brings a layer nearer to the
/// float one on average may move what counts behind the next activation function the wrong way. So
/// the rest of the network runs on some samples, in float or quantized, as `LayerWalk.Rest` says. They
/// are from all over the data: few candidates are compared, so that samples which were learned from
/// tell as well, and of small data held-out pieces alone would be too few. Not safe for concurrent use; valid until the walk goes on.
final class OutputValidation {
  /// Samples that are run at most.
  static let maximumSamples = 32

  private unowned let walk: LayerWalk
  private let layer: LinearLayer
  private let chunks: [Int]
  /// What the float network makes of each piece.
  private let wanted: [OrderedDictionary<String, Tensor>]
  private let headNodes: [Int]
  /// Runs what lies behind the layer; nil if nothing does.
  private let rest: Session?
  private let restInputs: [String]
  private let readsLayer: Bool

  /// Graph outputs that nodes write.
  static func outputs(of graph: Graph) -> [String] {
    let written = Set(graph.nodes.flatMap(\.outputs))
    return graph.outputs.map(\.name).filter(written.contains)
  }

  /// The pieces that are run, from all over the data.
  static func chunks(of data: ReconstructionData) -> [Int] {
    let total = data.chunks.count
    let rows = data.chunks[0].values.first?.shape.dimensions.first ?? 1
    let count = min(total, max(1, maximumSamples / max(rows, 1)))
    // The middle of each of `count` stretches.
    return (0..<count).map { (2 * $0 + 1) * total / (2 * count) }
  }

  /// Prepares the comparison; nil if no output depends on the layer.
  init?(_ walk: LayerWalk, _ rest: LayerWalk.Rest) throws(HalfstepError) {
    let (graph, cuts) = (walk.graph, walk.cuts)
    let layer = walk.stops[walk.position].layer
    guard cuts.isDynamic[layer.node] else { return nil }
    self.walk = walk
    self.layer = layer
    let head = [layer.node] + (layer.biasNode.map { [$0.position] } ?? [])
    headNodes = _Cuts.withConstants(head, graph, walk.index, cuts.isDynamic)
    let own = graph.nodes.indices.filter {
      $0 > layer.node && cuts.needed[$0] && cuts.isDynamic[$0] && !head.contains($0)
    }
    var written: Set<String> = []
    var read: Set<String> = []
    for position in own { written.formUnion(graph.nodes[position].outputs) }
    // Constants among them may be shapes of tensors that are live.
    let nodes = _Cuts.withConstants(own, graph, walk.index, cuts.isDynamic)
    for position in nodes {
      read.formUnion(graph.nodes[position].inputs + graph.nodes[position].capturedInputs)
    }
    chunks = Self.chunks(of: walk.data)
    wanted = try walk.floatOutputs(chunks)
    let names = Self.outputs(of: graph)
    var inputs: [String] = []
    for name in read.subtracting(written).sorted() where !name.isEmpty && name != layer.output {
      if try walk.simulatedTensor(name, chunks[0]) != nil { inputs.append(name) }
    }
    restInputs = inputs
    readsLayer = read.contains(layer.output)
    var segment = _Cuts.Segment()
    segment.nodes = nodes
    segment.inputs = restInputs + (readsLayer ? [layer.output] : [])
    segment.outputs = names.filter(written.contains)
    self.rest =
      segment.outputs.isEmpty
      ? nil : try walk.session(segment, rest.graph, rest.activations)
    guard self.rest != nil || names.contains(layer.output) else { return nil }
  }

  /// Noise over signal of the network's outputs with a candidate.
  ///
  /// - Parameter change: Puts the candidate into the network.
  /// - Returns: `Σ(y − ŷ)² / Σ(y − mean y)²`, mean over outputs; nil if no output is float or varies.
  func noise(
    _ change: (inout Graph) throws(HalfstepError) -> Void
  ) throws(HalfstepError) -> Double? {
    var graph = walk.quantized
    try change(&graph)
    var segment = _Cuts.Segment()
    segment.nodes = headNodes
    segment.inputs = [layer.input]
    segment.outputs = [layer.output]
    let head = try walk.session(segment, graph, walk.activations)
    var sums: [String: OutputSums] = [:]
    for (number, chunk) in chunks.enumerated() {
      guard let input = try walk.simulatedTensor(layer.input, chunk) else { return nil }
      let written = try head.run([layer.input: input])
      var results = written
      if let rest {
        var inputs: [String: Tensor] = [:]
        for name in restInputs { inputs[name] = try walk.simulatedTensor(name, chunk) }
        if readsLayer { inputs[layer.output] = written[layer.output] }
        for (name, tensor) in try rest.run(inputs) { results[name] = tensor }
      }
      for (name, float) in wanted[number] {
        guard float.dataType == .float32, let got = results[name], got.shape == float.shape
        else { continue }
        try sums[name, default: OutputSums()].add(float, got)
      }
    }
    let ratios = sums.keys.sorted().compactMap { sums[$0]?.ratio }
    return ratios.isEmpty ? nil : ratios.reduce(0, +) / Double(ratios.count)
  }
}

/// Sums over the elements of an output.
private struct OutputSums {
  private var count = 0.0
  private var sum = 0.0
  private var squares = 0.0
  private var noise = 0.0

  mutating func add(_ wanted: Tensor, _ got: Tensor) throws(HalfstepError) {
    try wanted.withFloats { (wanted) throws(HalfstepError) in
      try got.withFloats { got in
        for index in 0..<min(wanted.count, got.count) {
          let (value, error) = (Double(wanted[index]), Double(wanted[index]) - Double(got[index]))
          sum += value
          squares += value * value
          noise += error * error
        }
        count += Double(wanted.count)
      }
    }
  }

  /// Noise over signal; nil if the output does not vary.
  var ratio: Double? {
    let signal = squares - sum * sum / max(count, 1)
    guard signal > 0, signal.isFinite else { return nil }
    return noise.isFinite ? noise / signal : .infinity
  }
}

extension LayerWalk {
  /// What the float network makes of some pieces.
  func floatOutputs(
    _ chunks: [Int]
  ) throws(HalfstepError) -> [OrderedDictionary<String, Tensor>] {
    if let known = knownOutputs { return known }
    let session = try Session(graph: graph)
    let results = try chunks.map { (chunk) throws(HalfstepError) in
      try session.run(data.chunks[chunk])
    }
    knownOutputs = results
    return results
  }

  /// Noise over signal of the network's outputs with a candidate for the current layer; nil if the
  /// walk does not compare candidates, or no output tells.
  func outputNoise(
    _ change: (inout Graph) throws(HalfstepError) -> Void
  ) throws(HalfstepError) -> Double? {
    guard let rest else { return nil }
    if outputs == nil { outputs = try OutputValidation(self, rest) }
    return try outputs?.noise(change)
  }
}
