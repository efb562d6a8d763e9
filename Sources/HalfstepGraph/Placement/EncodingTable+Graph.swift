// SPDX-License-Identifier: Apache-2.0
// Settles what an encodings file leaves open, with the graph at hand.

import HalfstepNumerics
import OrderedCollections

extension EncodingTable {
  /// Settles which entries belong to constants and along which axis their scales run.
  ///
  /// Files of version 0.6.1 and 1.0.0 do not record axes, and version 2.0.0 does not tell constants
  /// from activations. Axes follow the operator that reads the constant if that fits the number of
  /// scales, then the entry as it is, then the only axis that fits. Entries of tensors that the
  /// graph does not have stay as they are.
  ///
  /// - Throws: `HalfstepError.encodingMismatch` naming a constant whose shape has no axis that fits.
  package mutating func adapt(to graph: Graph) throws(HalfstepError) {
    let index = GraphIndex(graph)
    var constants: [String: Tensor] = [:]
    for (name, tensor) in graph.initializers { constants[name] = tensor }
    for node in graph.nodes where node.isOperator("Constant") {
      if case .tensor(let tensor)? = node.attributes["value"], let name = node.outputs.first {
        constants[name] = tensor
      }
    }
    for (name, encoding) in activations where constants[name] != nil {
      activations[name] = nil
      parameters[name] = encoding
    }
    let tensors = Set(graph.inputs.map(\.name)).union(index.producers.keys)
    for (name, encoding) in parameters where constants[name] == nil && tensors.contains(name) {
      parameters[name] = nil
      activations[name] = encoding
    }
    for (name, encoding) in parameters {
      guard let tensor = constants[name] else { continue }
      let axes = Self.operatorAxes(of: name, rank: tensor.shape.rank, graph, index)
      let settled = try Self.settle(encoding, of: name, tensor.shape, axes)
      guard settled != encoding.granularity else { continue }
      parameters[name] = try Encoding(
        bits: encoding.bits, isSigned: encoding.isSigned, isSymmetric: encoding.isSymmetric,
        isStrict: encoding.isStrict, granularity: settled, scales: encoding.scales,
        zeroPoints: encoding.zeroPoints)
    }
  }

  private static func settle(
    _ encoding: Encoding, of name: String, _ shape: Shape,
    _ axes: (channel: Int, block: Int?)?
  ) throws(HalfstepError) -> Granularity {
    var candidates: [Granularity] = []
    switch encoding.granularity {
    case .perTensor: return .perTensor
    case .perChannel:
      if let axes { candidates.append(.perChannel(axis: axes.channel)) }
      candidates.append(encoding.granularity)
      let fitting = shape.dimensions.indices.filter { shape[$0] == encoding.scales.count }
      if fitting.count == 1 { candidates.append(.perChannel(axis: fitting[0])) }
    case .perBlock(_, _, let size):
      if let axes, let block = axes.block {
        candidates.append(.perBlock(channelAxis: axes.channel, axis: block, size: size))
      }
      candidates.append(encoding.granularity)
    }
    for candidate in candidates
    where (try? candidate.groupCount(for: shape)) == encoding.scales.count {
      return candidate
    }
    throw HalfstepError(
      .encodingMismatch,
      "encoding of '\(name)': \(encoding.scales.count) scales do not fit shape \(shape)")
  }

  /// The axes of output channels and of input channels that a constant's first reader suggests.
  private static func operatorAxes(
    of name: String, rank: Int, _ graph: Graph, _ index: GraphIndex
  ) -> (channel: Int, block: Int?)? {
    guard let use = index.uses[name]?.first, let input = use.input, rank > 0 else { return nil }
    let node = graph.nodes[use.node]
    guard node.domain.isEmpty else { return nil }
    if rank == 1 { return (0, nil) }
    switch (node.opType, input) {
    case ("Conv", 1): return (0, 1)
    case ("ConvTranspose", 1): return (1, 0)
    case ("Gemm", 0): return node.intAttribute("transA") == 1 ? (1, 0) : (0, 1)
    case ("Gemm", 1): return node.intAttribute("transB") == 1 ? (0, 1) : (1, 0)
    case ("MatMul", 0): return (rank - 2, rank - 1)
    case ("MatMul", 1): return (rank - 1, rank - 2)
    case ("PRelu", 1): return (0, nil)
    default: return nil
    }
  }
}
