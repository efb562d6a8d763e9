// SPDX-License-Identifier: Apache-2.0
// Element types of a graph's tensors: declared, or derived from the operators.

import HalfstepNumerics

/// Element types of a graph's tensors: those that the file declares, the others derived from the
/// operators where that is certain.
package struct ElementTypes: Sendable {
  private var types: [String: DataType] = [:]

  /// The type of a tensor, or nil if it is neither declared nor certain.
  package subscript(tensor: String) -> DataType? { types[tensor] }

  /// Whether a tensor surely holds floats that quantizers apply to.
  package func isQuantizable(_ tensor: String) -> Bool {
    switch types[tensor] {
    case .float32, .float16, .bfloat16: true
    default: false
    }
  }

  /// Collects and derives the types.
  ///
  /// - Complexity: O(nodes).
  package init(_ graph: Graph) {
    for info in graph.valueInfos.values { types[info.name] = info.dataType }
    for info in graph.outputs + graph.inputs where info.dataType != nil {
      types[info.name] = info.dataType
    }
    for (name, tensor) in graph.initializers { types[name] = tensor.dataType }
    for node in graph.nodes {
      for (index, output) in node.outputs.enumerated() where !output.isEmpty {
        if types[output] == nil { types[output] = derive(node, output: index) }
      }
    }
  }

  private func derive(_ node: Node, output: Int) -> DataType? {
    guard node.domain.isEmpty else { return nil }
    func input(_ index: Int) -> DataType? { node.input(index).flatMap { types[$0] } }
    func attribute(_ key: String) -> DataType? {
      node.intAttribute(key).flatMap { Int32(exactly: $0) }.flatMap(DataType.init(rawValue:))
    }
    switch node.opType {
    case "Shape", "Size", "NonZero", "ArgMax", "ArgMin", "NonMaxSuppression": return .int64
    case "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Not",
      "IsNaN", "IsInf":
      return .bool
    case "TopK", "MaxPool": return output == 0 ? input(0) : .int64
    case "Dropout": return output == 0 ? input(0) : .bool
    case "Unique": return output == 0 ? input(0) : .int64
    case "DynamicQuantizeLinear": return [.uint8, .float32, .uint8][min(output, 2)]
    case "Cast": return attribute("to")
    case "CastLike": return input(1)
    case "Where": return input(1)
    case "OneHot": return input(2)
    case "Constant":
      if case .tensor(let tensor)? = node.attributes["value"] { return tensor.dataType }
      if node.attributes["value_float"] != nil || node.attributes["value_floats"] != nil {
        return .float32
      }
      if node.attributes["value_int"] != nil || node.attributes["value_ints"] != nil {
        return .int64
      }
      return nil
    case "ConstantOfShape":
      guard let value = node.attributes["value"] else { return .float32 }
      if case .tensor(let tensor) = value { return tensor.dataType }
      return nil
    case "RandomNormal", "RandomUniform": return attribute("dtype") ?? .float32
    case "RandomNormalLike", "RandomUniformLike", "EyeLike", "Bernoulli", "Multinomial":
      return attribute("dtype") ?? (node.opType == "Multinomial" ? .int32 : input(0))
    case "QuantizeLinear": return node.input(2) == nil ? .uint8 : input(2)
    case "DequantizeLinear": return input(1)
    case "QLinearConv", "QLinearMatMul": return input(7)
    case "ConvInteger", "MatMulInteger": return .int32
    case "If", "Loop", "Scan", "SequenceConstruct", "SplitToSequence", "SequenceAt",
      "SequenceEmpty", "Optional", "OptionalGetElement", "StringNormalizer", "TfIdfVectorizer":
      return nil
    default: return input(0)
    }
  }
}
