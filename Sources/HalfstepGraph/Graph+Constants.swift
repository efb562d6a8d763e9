// SPDX-License-Identifier: Apache-2.0
// Constants of a graph: where they come from and how a pass replaces one.

import HalfstepNumerics

extension Graph {
  /// The value of a tensor that does not depend on the graph's inputs, or nil.
  ///
  /// Finds initializers and `Constant` nodes, also through `Identity`.
  package func constant(_ tensor: String, _ index: GraphIndex) -> Tensor? {
    var name = tensor
    // A valid graph has no cycle; the bound only keeps an invalid one from looping for ever.
    for _ in 0...nodes.count {
      if let value = initializers[name] { return value }
      guard let position = index.producers[name], position < nodes.count else { return nil }
      let node = nodes[position]
      if node.isOperator("Identity"), let source = node.input(0) {
        name = source
      } else if node.isOperator("Constant"), case .tensor(let value)? = node.attributes["value"] {
        return value
      } else {
        return nil
      }
    }
    return nil
  }

  /// The value of a constant scalar or one-element float tensor, or nil.
  package func constantScalar(_ tensor: String, _ index: GraphIndex) -> Float? {
    guard let value = constant(tensor, index), value.count == 1 else { return nil }
    return try? value.floats().first
  }

  /// Gives one input of a node another constant value; other readers of the old one keep it.
  ///
  /// An initializer that only this input reads is overwritten under its name; otherwise the value gets
  /// a fresh name made from `stem`. `index` may be older than the edit as long as positions hold.
  package mutating func replaceConstant(
    at position: Int, input: Int, with value: Tensor, _ index: GraphIndex, stem: String,
    names: inout NameAllocator
  ) {
    let node = nodes[position]
    if let name = node.input(input), initializers[name] != nil, !index.outputs.contains(name),
      index.uses[name]?.count == 1
    {
      initializers[name] = value
      return
    }
    let name = names.fresh(stem)
    initializers[name] = value
    update(at: position) { node in
      while node.inputs.count <= input { node.inputs.append("") }
      node.inputs[input] = name
    }
  }

  /// Removes initializers and `Constant` nodes that nothing reads and that are not graph outputs.
  package mutating func removeUnusedConstants() {
    var used = Set(outputs.map(\.name))
    for node in nodes {
      used.formUnion(node.inputs)
      used.formUnion(node.capturedInputs)
    }
    removeNodes { $0.isOperator("Constant") && used.isDisjoint(with: $0.outputs) }
    removeUnusedInitializers()
  }

  /// The number of dimensions of a tensor if the graph tells, or nil.
  ///
  /// Uses declared types and operators whose output rank follows from their kind or their operands.
  package func rank(of tensor: String, _ index: GraphIndex) -> Int? {
    var name = tensor
    for _ in 0...nodes.count {
      if let value = initializers[name] { return value.shape.rank }
      if let dimensions = valueInfos[name]?.dimensions { return dimensions.count }
      for info in inputs + outputs where info.name == name {
        if let dimensions = info.dimensions { return dimensions.count }
      }
      guard let position = index.producers[name] else { return nil }
      let node = nodes[position]
      guard node.domain.isEmpty else { return nil }
      switch node.opType {
      case "Flatten", "Gemm": return 2
      case "Conv", "ConvTranspose":
        return node.input(1).flatMap { constant($0, index) }?.shape.rank
      case "Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh",
        "Identity", "Dropout", "BatchNormalization", "MaxPool", "AveragePool", "GlobalAveragePool",
        "GlobalMaxPool", "Softmax", "Elu", "Selu", "Gelu", "Erf":
        guard let source = node.input(0) else { return nil }
        name = source
      case "MatMul":
        guard let source = node.input(0), let other = node.input(1),
          constant(other, index)?.shape.rank == 2
        else { return nil }
        name = source
      case "Add", "Sub", "Mul", "Div", "Min", "Max":
        // A constant vector or scalar broadcasts without adding a dimension.
        guard node.inputs.count == 2 else { return nil }
        let isSmall = node.inputs.map { (constant($0, index)?.shape.rank ?? 2) <= 1 }
        guard let small = isSmall.firstIndex(of: true) else { return nil }
        name = node.inputs[1 - small]
      case "Reshape":
        guard let shape = node.input(1).flatMap({ constant($0, index) }) else { return nil }
        return shape.shape.rank == 1 ? shape.count : nil
      default: return nil
      }
    }
    return nil
  }
}
