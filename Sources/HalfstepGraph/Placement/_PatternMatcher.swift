// SPDX-License-Identifier: Apache-2.0
// Finds patterns of nodes that a target runs as one operator.

import HalfstepNumerics

/// Finds patterns of nodes that a target runs as one operator.
///
/// A tensor inside a pattern has no reader outside it and is not a graph output.
struct _PatternMatcher {
  let graph: Graph
  let index: GraphIndex
  let constants: _Constants
  private var taken: Set<Int> = []

  init(graph: Graph, index: GraphIndex, constants: _Constants) {
    self.graph = graph
    self.index = index
    self.constants = constants
  }

  /// Whether a node is part of a pattern.
  func isTaken(_ position: Int) -> Bool { taken.contains(position) }

  /// Names that `supergroup_pass_list` may hold.
  static let passNames: Set<String> = [
    "MatmulAdd", "LayerNormalization", "RMSNormalization", "MaskedSoftmax",
  ]

  /// All patterns, by the position of the node that writes their output.
  mutating func matchAll(_ passes: Set<String>) -> [Int: _Operation] {
    var found: [Int: _Operation] = [:]
    for position in graph.nodes.indices.reversed() where !taken.contains(position) {
      guard let match = match(position, passes), taken.isDisjoint(with: match.nodes) else {
        continue
      }
      taken.formUnion(match.nodes)
      found[position] = match
    }
    return found
  }

  private func match(_ position: Int, _ passes: Set<String>) -> _Operation? {
    guard graph.nodes[position].domain.isEmpty else { return nil }
    switch graph.nodes[position].opType {
    case "Min": return boundedRelu(position)
    case "Add":
      if passes.contains("LayerNormalization"), let match = layerNormWithBias(position) {
        return match
      }
      return passes.contains("MatmulAdd") ? matMulAdd(position) : nil
    case "Mul", "Div":
      if passes.contains("LayerNormalization"), let match = layerNorm(position) { return match }
      return passes.contains("RMSNormalization") ? rmsNorm(position) : nil
    case "Softmax": return passes.contains("MaskedSoftmax") ? maskedSoftmax(position) : nil
    default: return nil
    }
  }

  // MARK: Patterns

  /// Relu, then Min with a constant: a clipped activation with a bound for each channel.
  private func boundedRelu(_ position: Int) -> _Operation? {
    let node = graph.nodes[position]
    guard node.inputs.count == 2 else { return nil }
    for (data, bound) in [(0, 1), (1, 0)] {
      guard constants.source(of: node.inputs[bound]) != nil,
        let relu = inner(node.inputs[data], "Relu"), let input = graph.nodes[relu].input(0)
      else { continue }
      return operation("Clip", [relu, position], inputs: [input])
    }
    return nil
  }

  /// MatMul by a constant matrix, then Add of a constant vector: a fully connected layer.
  private func matMulAdd(_ position: Int) -> _Operation? {
    let node = graph.nodes[position]
    guard node.inputs.count == 2 else { return nil }
    for (data, other) in [(0, 1), (1, 0)] {
      guard let product = inner(node.inputs[data], "MatMul"),
        let bias = constants.source(of: node.inputs[other]), constants[bias]?.shape.rank == 1,
        let input = graph.nodes[product].input(0), let factor = graph.nodes[product].input(1)
      else { continue }
      var nodes = [product, position]
      var weight = constants.source(of: factor)
      var isTransposed = false
      if weight == nil, let transpose = inner(factor, "Transpose"),
        [nil, [1, 0]].contains(graph.nodes[transpose].intsAttribute("perm"))
      {
        weight = graph.nodes[transpose].input(0).flatMap { constants.source(of: $0) }
        nodes.insert(transpose, at: 0)
        isTransposed = true
      }
      guard let weight, let rank = constants[weight]?.shape.rank, rank >= 2 else { continue }
      // A stack of matrices stays a MatMul, whose sum with the bias is still one operation.
      if rank > 2 && isTransposed { continue }
      var result = operation(
        rank == 2 ? "Gemm" : "MatMul", nodes, inputs: [input, weight, bias])
      result.parameters = ["weight": weight, "bias": bias]
      result.isTransposed = isTransposed
      return result
    }
    return nil
  }

  private func layerNormWithBias(_ position: Int) -> _Operation? {
    let node = graph.nodes[position]
    guard node.inputs.count == 2 else { return nil }
    for (data, other) in [(0, 1), (1, 0)] {
      guard let bias = constants.source(of: node.inputs[other]),
        let scaled = inner(node.inputs[data], "Mul"), var match = layerNorm(scaled),
        match.parameters["weight"] != nil
      else { continue }
      match.nodes.append(position)
      match.outputs = node.outputs
      match.inputs.append(bias)
      match.parameters["bias"] = bias
      return match
    }
    return nil
  }

  private func layerNorm(_ position: Int) -> _Operation? {
    normalization("LayerNormalization", position) { core in
      // The normalized value is x − mean(x), read by the square and by the division.
      guard let center = index.producers[core.input], graph.nodes[center].isOperator("Sub"),
        !index.outputs.contains(core.input),
        let input = graph.nodes[center].input(0),
        let mean = graph.nodes[center].input(1).flatMap({ inner($0, "ReduceMean") }),
        graph.nodes[mean].input(0) == input,
        Set(index.uses[core.input]?.map(\.node) ?? []).isSubset(of: core.nodes)
      else { return nil }
      return (input, [mean, center] + core.nodes)
    }
  }

  private func rmsNorm(_ position: Int) -> _Operation? {
    normalization("RMSNormalization", position) { core in (core.input, core.nodes) }
  }

  /// A division by the root mean square, and the multiplication by a constant behind it if there is
  /// one.
  private func normalization(
    _ type: String, _ position: Int,
    _ complete: ((input: String, nodes: [Int])) -> (input: String, nodes: [Int])?
  ) -> _Operation? {
    let node = graph.nodes[position]
    if node.opType == "Mul", node.inputs.count == 2 {
      for (data, other) in [(0, 1), (1, 0)] {
        guard let weight = constants.source(of: node.inputs[other]),
          let divided = inner(node.inputs[data], "Div") ?? inner(node.inputs[data], "Mul"),
          let core = rootMeanSquareDivision(divided), let match = complete(core)
        else { continue }
        var result = operation(type, match.nodes + [position], inputs: [match.input, weight])
        result.parameters = ["weight": weight]
        return result
      }
    }
    guard let core = rootMeanSquareDivision(position), let match = complete(core) else {
      return nil
    }
    return operation(type, match.nodes, inputs: [match.input])
  }

  /// `x / sqrt(mean(x²) + ε)` in its spellings; the nodes end with `position`.
  private func rootMeanSquareDivision(_ position: Int) -> (input: String, nodes: [Int])? {
    let node = graph.nodes[position]
    guard node.inputs.count == 2 else { return nil }
    if node.opType == "Div" {
      guard let root = inner(node.inputs[1], "Sqrt"),
        let chain = meanSquare(graph.nodes[root].input(0), of: node.inputs[0])
      else { return nil }
      return (node.inputs[0], chain + [root, position])
    }
    for (data, other) in [(0, 1), (1, 0)] {
      guard let inverse = soleReadNode(node.inputs[other]) else { continue }
      let factor = graph.nodes[inverse]
      var nodes = [inverse, position]
      var argument: String?
      switch factor.opType {
      case "Pow" where constants.scalar(factor.input(1)) == -0.5: argument = factor.input(0)
      case "Reciprocal", "Div":
        let operand = factor.opType == "Div" ? factor.input(1) : factor.input(0)
        if factor.opType == "Div" && constants.scalar(factor.input(0)) != 1 { continue }
        guard let operand, let root = inner(operand, "Sqrt") else { continue }
        nodes.insert(root, at: 0)
        argument = graph.nodes[root].input(0)
      default: continue
      }
      guard let chain = meanSquare(argument, of: node.inputs[data]) else { continue }
      return (node.inputs[data], chain + nodes)
    }
    return nil
  }

  /// The nodes of `mean(x²) + ε`.
  private func meanSquare(_ tensor: String?, of input: String) -> [Int]? {
    guard let tensor, let sum = inner(tensor, "Add"), graph.nodes[sum].inputs.count == 2 else {
      return nil
    }
    for (data, other) in [(0, 1), (1, 0)] {
      let node = graph.nodes[sum]
      guard constants.scalar(node.inputs[other]) != nil,
        let mean = inner(node.inputs[data], "ReduceMean"),
        let square = graph.nodes[mean].input(0).flatMap({ soleReadNode($0) })
      else { continue }
      let factors = graph.nodes[square]
      let isSquare =
        factors.isOperator("Pow")
        ? factors.input(0) == input && constants.scalar(factors.input(1)) == 2
        : factors.isOperator("Mul") && factors.inputs == [input, input]
      if isSquare { return [square, mean, sum] }
    }
    return nil
  }

  // MARK: Helpers

  func operation(_ type: String, _ nodes: [Int], inputs: [String]) -> _Operation {
    _Operation(
      type: type, domain: "", nodes: nodes, inputs: inputs,
      outputs: graph.nodes[nodes.last!].outputs
    )
  }

  /// The node that writes a tensor with a single reader.
  func soleReadNode(_ tensor: String) -> Int? {
    guard index.soleUse(of: tensor) != nil, let position = index.producers[tensor],
      !taken.contains(position), graph.nodes[position].domain.isEmpty
    else { return nil }
    return position
  }

  /// The node of the given type that writes a tensor with a single reader.
  func inner(_ tensor: String, _ type: String) -> Int? {
    guard let position = soleReadNode(tensor), graph.nodes[position].opType == type else {
      return nil
    }
    return position
  }
}
