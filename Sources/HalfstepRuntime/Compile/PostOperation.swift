// SPDX-License-Identifier: Apache-2.0
// What is done to a primitive's result: in the primitive where possible, else in steps after it.

import CDNNL
import HalfstepGraph
import HalfstepNumerics

/// What is done to a primitive's result.
enum PostOperation {
  /// An elementwise function.
  case eltwise(Eltwise)
  /// Adds a tensor of the same shape.
  case sum(Value)
  /// Combines with one number per channel, a constant `[1, C, 1, …]`.
  case perChannel(dnnl_alg_kind_t, Value)
  /// Rounds to a grid.
  case fakeQuantize(Encoding)
}

extension Lowering {
  /// Appends steps that do the operations one after another.
  func apply(_ operations: [PostOperation], to value: Value) throws(HalfstepError) -> Value {
    var value = value
    for operation in operations {
      switch operation {
      case .eltwise(let function):
        value = try eltwise(function, value)
      case .sum(let other):
        value = try arithmetic(.add, value, other)
      case .perChannel(let algorithm, let other):
        let operation: Arithmetic =
          switch algorithm {
          case dnnl_binary_mul: .multiply
          case dnnl_binary_min: .minimum
          case dnnl_binary_max: .maximum
          default: .add
          }
        value = try arithmetic(operation, value, other)
      case .fakeQuantize(let encoding):
        value = try fakeQuantize(value, encoding)
      }
    }
    return value
  }

  /// Appends a step that rounds a tensor to a grid, in whatever layout it has.
  func fakeQuantize(_ value: Value, _ encoding: Encoding) throws(HalfstepError) -> Value {
    let result = try makeValue(value.shape, layout: value.layout)
    // Per tensor: the order in memory does not matter, and padding stays zero.
    let layout = try encoding.layout(for: .vector(value.storedCount))
    let source = value.buffer
    let target = result.buffer
    emit("quantize", reads: [value], writes: [result], inPlace: (value, result)) {
      () throws(HalfstepError) in
      encoding.fakeQuantize(try source.floats, into: try target.floats, layout: layout)
    }
    return result
  }
}

/// Builds the operations of a chain's nodes.
struct ChainReader {
  let lowering: Lowering
  let graph: Graph
  let quantized: [String: Encoding]

  /// The operations of the nodes after the first, as many as can be expressed, and how many nodes
  /// these are.
  ///
  /// - Parameters:
  ///   - chain: Positions of the nodes, the leader first.
  ///   - shape: Shape of the leader's result.
  ///   - observed: Tensors that must be seen before they are rounded.
  func operations(
    of chain: [Int], shape: Shape, observed: Set<String>
  ) throws(HalfstepError) -> (operations: [PostOperation], nodes: Int) {
    var result: [PostOperation] = []
    var consumed = 1
    var tensor = graph.nodes[chain[0]].outputs[0]
    if let encoding = quantized[tensor] {
      if observed.contains(tensor) { return (result, consumed) }
      result.append(.fakeQuantize(encoding))
    }
    while consumed < chain.count {
      let node = graph.nodes[chain[consumed]]
      var next = 1
      if node.isOperator("Sigmoid"), consumed + 1 < chain.count,
        graph.nodes[chain[consumed + 1]].isOperator("Mul"),
        graph.nodes[chain[consumed + 1]].inputs.contains(tensor)
      {
        // x · sigmoid(x), unless the sigmoid itself is to be rounded.
        guard quantized[node.outputs[0]] == nil else { break }
        result.append(.eltwise(Eltwise(dnnl_eltwise_swish, 1)))
        next = 2
      } else {
        guard let some = try operations(of: node, on: tensor, shape: shape) else { break }
        result += some
      }
      tensor = graph.nodes[chain[consumed + next - 1]].outputs[0]
      consumed += next
      if let encoding = quantized[tensor] {
        if observed.contains(tensor) { break }
        result.append(.fakeQuantize(encoding))
      }
    }
    return (result, consumed)
  }

  private func operations(
    of node: Node, on tensor: String, shape: Shape
  ) throws(HalfstepError) -> [PostOperation]? {
    switch node.opType {
    case "Identity":
      return []
    case "BatchNormalization":
      guard let affine = try BatchNormalization(node, lowering, channels: shape) else { return nil }
      return [
        .perChannel(dnnl_binary_mul, affine.scale), .perChannel(dnnl_binary_add, affine.shift),
      ]
    case "Add", "Min", "Mul":
      guard node.inputs.count == 2 else { return nil }
      let other = node.inputs[0] == tensor ? node.inputs[1] : node.inputs[0]
      guard other != tensor, let value = lowering.value(named: other), value.isFloat else {
        return nil
      }
      if node.opType == "Add", value.shape == shape { return [.sum(value)] }
      guard let tensor = value.constant, shape.rank >= 2 else { return nil }
      let dimensions = tensor.shape.dimensions
      let aligned = [Int](repeating: 1, count: max(0, shape.rank - dimensions.count)) + dimensions
      guard aligned.count == shape.rank else { return nil }
      for (axis, extent) in aligned.enumerated() where extent != (axis == 1 ? shape[1] : 1) {
        return nil
      }
      let constant = Value(
        constant: try tensor.reshaped(Shape(aligned)), staticName: value.staticName)
      let algorithm =
        switch node.opType {
        case "Add": dnnl_binary_add
        case "Min": dnnl_binary_min
        default: dnnl_binary_mul
        }
      return [.perChannel(algorithm, constant)]
    default:
      return try Activation.functions(of: node, lowering)?.map { .eltwise($0) }
    }
  }
}
