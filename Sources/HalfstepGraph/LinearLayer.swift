// SPDX-License-Identifier: Apache-2.0
// A convolution or matrix product with constant weights, whatever its operator.

import HalfstepNumerics

/// A convolution or matrix product with constant float weights, seen alike whatever its operator.
///
/// A snapshot: positions and names are those of the graph it was read from.
package struct LinearLayer: Sendable {
  package enum Kind: Hashable, Sendable {
    case conv
    case convTranspose
    case gemm
    case matMul
  }

  package let kind: Kind
  /// Position of the node that holds the weight.
  package let node: Int
  /// Position of an `Add` behind a MatMul that adds the bias, and which of its inputs that is.
  package let biasNode: (position: Int, input: Int)?
  /// The tensor that the layer reads.
  package let input: String
  /// The tensor that the layer writes, bias included.
  package let output: String
  package let layout: WeightLayout
  /// Whether a constant bias is present.
  package let hasBias: Bool

  /// Output channels.
  package var outputChannels: Int { layout.outputChannels }
  /// Input channels.
  package var inputChannels: Int { layout.inputChannels }
  /// Whether each output channel reads one input channel of its own, with multiplier 1.
  package var isDepthwise: Bool {
    layout.groups > 1 && layout.outputsPerGroup == 1 && layout.inputsPerGroup == 1
  }

  /// Reads the layer at a position, or nil if the node is none: another operator, weights that are
  /// computed or not float32, a bias that is computed or differs between rows, inconsistent shapes.
  package init?(_ graph: Graph, at position: Int, _ index: GraphIndex) {
    let node = graph.nodes[position]
    guard node.domain.isEmpty, let input = node.input(0), let weightName = node.input(1),
      let output = node.outputs.first, !output.isEmpty
    else { return nil }
    let kind: Kind
    switch node.opType {
    case "Conv": kind = .conv
    case "ConvTranspose": kind = .convTranspose
    case "Gemm": kind = .gemm
    case "MatMul": kind = .matMul
    default: return nil
    }
    guard let weight = graph.constant(weightName, index), weight.dataType == .float32,
      let layout = WeightLayout(kind, weight.shape, node)
    else { return nil }

    self.kind = kind
    self.node = position
    self.input = input
    self.layout = layout
    var biasNode: (position: Int, input: Int)?
    var end = output
    if kind == .matMul, let use = index.soleUse(of: output), let slot = use.input,
      graph.nodes[use.node].isOperator("Add"), graph.nodes[use.node].inputs.count == 2,
      let other = graph.nodes[use.node].input(1 - slot), let bias = graph.constant(other, index),
      bias.dataType == .float32, bias.count == layout.outputChannels,
      bias.shape.dimensions.last == layout.outputChannels
    {
      biasNode = (use.node, 1 - slot)
      end = graph.nodes[use.node].outputs.first ?? output
    }
    self.biasNode = biasNode
    self.output = end
    if let name = node.input(2) {
      guard let bias = graph.constant(name, index), bias.dataType == .float32 else { return nil }
      switch kind {
      case .conv, .convTranspose:
        guard bias.shape.dimensions == [layout.outputChannels] else { return nil }
      case .gemm:
        // Gemm broadcasts its bias; one that differs between rows belongs to no channel.
        let perChannel =
          bias.count == layout.outputChannels
          && bias.shape.dimensions.last == layout.outputChannels
        guard perChannel || bias.count == 1 else { return nil }
      case .matMul: return nil
      }
      self.hasBias = true
    } else {
      self.hasBias = biasNode != nil
    }
  }
}

/// How a weight's elements lie in memory: `[groups, outer, inner, spatial]`, where either the output
/// or the input channels of a group are the outer ones.
package struct WeightLayout: Hashable, Sendable {
  package let groups: Int
  package let outputsPerGroup: Int
  package let inputsPerGroup: Int
  /// Product of the kernel's extents.
  package let spatial: Int
  /// Whether output channels vary more slowly than input channels.
  package let outputIsOuter: Bool

  package var outputChannels: Int { groups * outputsPerGroup }
  package var inputChannels: Int { groups * inputsPerGroup }
  package var outer: Int { outputIsOuter ? outputsPerGroup : inputsPerGroup }
  package var inner: Int { outputIsOuter ? inputsPerGroup : outputsPerGroup }

  init?(_ kind: LinearLayer.Kind, _ shape: Shape, _ node: Node) {
    let dimensions = shape.dimensions
    guard shape.elementCount > 0 else { return nil }
    switch kind {
    case .conv:
      let groups = node.intAttribute("group") ?? 1
      guard dimensions.count >= 3, groups > 0, dimensions[0] % groups == 0 else { return nil }
      self.groups = groups
      outputsPerGroup = dimensions[0] / groups
      inputsPerGroup = dimensions[1]
      outputIsOuter = true
    case .convTranspose:
      let groups = node.intAttribute("group") ?? 1
      guard dimensions.count >= 3, groups > 0, dimensions[0] % groups == 0 else { return nil }
      self.groups = groups
      inputsPerGroup = dimensions[0] / groups
      outputsPerGroup = dimensions[1]
      outputIsOuter = false
    case .gemm:
      guard dimensions.count == 2 else { return nil }
      groups = 1
      outputIsOuter = (node.intAttribute("transB") ?? 0) != 0
      outputsPerGroup = outputIsOuter ? dimensions[0] : dimensions[1]
      inputsPerGroup = outputIsOuter ? dimensions[1] : dimensions[0]
    case .matMul:
      guard dimensions.count == 2 else { return nil }
      groups = 1
      outputIsOuter = false
      inputsPerGroup = dimensions[0]
      outputsPerGroup = dimensions[1]
    }
    spatial = dimensions.dropFirst(2).reduce(1, *)
  }
}
