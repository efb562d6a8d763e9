// SPDX-License-Identifier: Apache-2.0
// What quantizer placement knows about operator types.

/// What quantizer placement knows about operator types.
///
/// - Reference: AIMET 2.42's runtime-configuration rules, restated in `docs/aimet-differences.md`.
package enum OperatorTraits {
  /// Whether outputs hold only values of the first input, so that they lie on its grid.
  package static func preservesGrid(_ node: Node) -> Bool {
    preservesGrid(node.opType, domain: node.domain)
  }

  static func preservesGrid(_ type: String, domain: String) -> Bool {
    switch domain {
    case "": gridPreserving.contains(type)
    case "qti_aisw": type == "BatchToSpace" || type == "SpaceToBatch"
    default: false
    }
  }

  private static let gridPreserving: Set<String> = [
    "Col2Im", "Compress", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather",
    "GatherElements", "GatherND", "Identity", "MaxPool", "MaxRoiPool", "NonZero", "Pad",
    "ReduceMax", "ReduceMin", "Reshape", "Slice", "SpaceToDepth", "Split", "SplitToSequence",
    "Squeeze", "Tile", "TopK", "Transpose", "Unsqueeze",
  ]

  /// Types whose outputs never carry a quantizer, whatever the configuration says.
  static let neverQuantizedOutputs: Set<String> = [
    "branch", "Flatten", "Gather", "Reshape", "Shape", "Unsqueeze", "Squeeze", "Split",
    "Compress", "Tile", "Transpose", "Identity",
  ]

  /// Types with several data inputs that hand values through unchanged: the inputs take the output's
  /// grid.
  static let joining: Set<String> = ["Concat", "Scatter", "ScatterElements", "ScatterND"]

  /// Types whose output takes the grid of the first input.
  static let inputGridKeeping: Set<String> = [
    "AveragePool", "Relu", "Resize", "Upsample", "CropAndResize",
  ]

  /// Types that hand a hidden state from step to step.
  static let recurrent: Set<String> = ["RNN", "LSTM", "GRU"]

  static let normalizations: Set<String> = [
    "BatchNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization",
    "InstanceNormalization",
  ]

  /// Whether an operand sets up the operator (bounds, sizes, thresholds) and is not data.
  static func isSetting(_ node: Node, input index: Int) -> Bool {
    guard node.domain.isEmpty else { return false }
    switch node.opType {
    case "Clip", "Resize", "Upsample", "Pad", "Dropout", "QuantizeLinear", "DequantizeLinear",
      "OneHot":
      return index >= 1
    case "Range": return true
    case "NonMaxSuppression": return index >= 2
    default: return false
    }
  }

  /// Names of operands that set up a node and are not data.
  package static func settingInputs(of node: Node) -> [String] {
    node.inputs.indices.filter { isSetting(node, input: $0) }.map { node.inputs[$0] }
      .filter { !$0.isEmpty }
  }

  /// Names of operands that are weights, biases or statistics of a node, constant or not.
  package static func parameterInputs(of node: Node) -> [String] {
    guard node.domain.isEmpty else { return [] }
    return parameterKinds(node.opType).compactMap { node.input($0.input) }
  }

  /// Parameter kinds of a type by input position; names are those of the runtime configuration.
  static func parameterKinds(_ type: String) -> [(kind: String, input: Int)] {
    switch type {
    case "Conv", "ConvTranspose", "Gemm", "InstanceNormalization", "LayerNormalization",
      "GroupNormalization":
      [("weight", 1), ("bias", 2)]
    case "RMSNormalization", "MatMul": [("weight", 1)]
    case "RNN", "LSTM", "GRU": [("weight", 1), ("weight_r", 2), ("bias", 3)]
    case "BatchNormalization":
      [("weight", 1), ("bias", 2), ("running_mean", 3), ("running_var", 4)]
    default: []
    }
  }
}
