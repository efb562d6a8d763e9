// SPDX-License-Identifier: Apache-2.0
// Reading and replacing the parameters of a linear layer.

import HalfstepNumerics

extension LinearLayer {
  /// The weight tensor.
  package func weight(in graph: Graph, _ index: GraphIndex) throws(HalfstepError) -> Tensor {
    let node = graph.nodes[self.node]
    guard let name = node.input(1), let weight = graph.constant(name, index) else {
      throw HalfstepError(
        .internalError, "node '\(node.label)': the weight is gone", node: node.label)
    }
    return weight
  }

  /// The bias that the layer adds, `[K]`; zeros if there is none. Gemm's beta is applied.
  package func bias(in graph: Graph, _ index: GraphIndex) throws(HalfstepError) -> [Double] {
    let node = graph.nodes[self.node]
    let name: String?
    if let biasNode {
      name = graph.nodes[biasNode.position].input(biasNode.input)
    } else {
      name = node.input(2)
    }
    guard let name else { return [Double](repeating: 0, count: outputChannels) }
    guard let tensor = graph.constant(name, index) else {
      throw HalfstepError(
        .internalError, "node '\(node.label)': the bias is gone", node: node.label)
    }
    let beta = kind == .gemm ? Double(node.floatAttribute("beta") ?? 1) : 1
    let values = try tensor.floats().map { Double($0) * beta }
    return values.count == outputChannels
      ? values : [Double](repeating: values[0], count: outputChannels)
  }

  /// Replaces the weight.
  package func setWeight(
    _ weight: Tensor, in graph: inout Graph, _ index: GraphIndex, names: inout NameAllocator
  ) {
    graph.replaceConstant(
      at: node, input: 1, with: weight, index, stem: stem(graph, "weight"), names: &names)
  }

  /// Replaces or creates the bias. A MatMul without one becomes a Gemm, so its input must have rank 2.
  package func setBias(
    _ bias: [Float], in graph: inout Graph, _ index: GraphIndex, names: inout NameAllocator
  ) throws(HalfstepError) {
    if let biasNode {
      // The shape may have leading ones, which decide the rank of the sum.
      let old = graph.nodes[biasNode.position].input(biasNode.input)
        .flatMap { graph.constant($0, index) }
      var tensor = try Tensor(bias, shape: [bias.count])
      if let old { tensor = try tensor.reshaped(old.shape) }
      graph.replaceConstant(
        at: biasNode.position, input: biasNode.input, with: tensor, index,
        stem: stem(graph, "bias"), names: &names)
      return
    }
    graph.replaceConstant(
      at: node, input: 2, with: try Tensor(bias, shape: [bias.count]), index,
      stem: stem(graph, "bias"), names: &names)
    graph.update(at: node) { node in
      if node.opType == "MatMul" { node.opType = "Gemm" }
      if node.opType == "Gemm" { node.attributes["beta"] = nil }
    }
  }

  /// Name for a new parameter of this layer.
  private func stem(_ graph: Graph, _ parameter: String) -> String {
    let name = graph.nodes[node].name
    return "\(name.isEmpty ? output : name).\(parameter)"
  }
}
