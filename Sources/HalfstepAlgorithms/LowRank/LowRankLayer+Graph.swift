// SPDX-License-Identifier: Apache-2.0
// Replaces a layer by the pair that its factors make.

import HalfstepGraph
import HalfstepNumerics
import OrderedCollections

extension LowRankLayer {
  /// Replaces the layer in a graph; the node that follows keeps the layer's output and bias.
  ///
  /// The pair is named after the layer with `.0` and `.1` behind, its weights after the weight.
  /// Positions of later nodes move by one.
  ///
  /// - Returns: Names of the pair's constants.
  func replace(
    in graph: inout Graph, with weights: (first: Tensor, second: Tensor),
    names: inout NameAllocator
  ) throws(HalfstepError) -> CompressionReport.Pair {
    let position = layer.node
    let old = graph.nodes[position]
    var stem = weightName
    if stem.hasSuffix(".weight") { stem.removeLast(".weight".count) }
    let middle = names.fresh("\(stem).0.output")
    let firstWeight = names.fresh("\(stem).0.weight")
    let secondWeight = names.fresh("\(stem).1.weight")
    graph.initializers[firstWeight] = weights.first
    graph.initializers[secondWeight] = weights.second
    let title = old.name.isEmpty ? stem : old.name
    let bias =
      if let add = layer.biasNode {
        graph.nodes[add.position].input(add.input)
      } else {
        old.input(2)
      }

    // A product that was given a bias has become a Gemm.
    var first = Node(
      name: "\(title).0", opType: layer.kind == .matMul ? "MatMul" : old.opType,
      inputs: [old.inputs[0], firstWeight], outputs: [middle])
    var firstAttributes: OrderedDictionary<String, Attribute> = [:]
    var secondAttributes = old.attributes
    switch layer.kind {
    case .conv:
      (firstAttributes, secondAttributes) = convolutionAttributes(old)
    case .gemm:
      // Alpha, beta and the bias belong to the second product.
      if let value = old.attributes["transB"] { firstAttributes["transB"] = value }
      if let value = old.attributes["transA"] { firstAttributes["transA"] = value }
      secondAttributes["transA"] = nil
      // Before version 11 Gemm needs its third operand.
      if graph.opset < 11 {
        let zero = names.fresh("\(stem).0.bias")
        graph.initializers[zero] = try Tensor(
          [Float](repeating: 0, count: weights.second.count / layer.outputChannels),
          shape: [weights.second.count / layer.outputChannels])
        first.inputs.append(zero)
      }
    case .matMul, .convTranspose: break
    }
    first.attributes = firstAttributes
    graph.update(at: position) { node in
      node.name = "\(title).1"
      node.inputs[0] = middle
      node.inputs[1] = secondWeight
      node.attributes = secondAttributes
    }
    graph.insert(first, at: position)
    return CompressionReport.Pair(
      firstWeight: firstWeight, secondWeight: secondWeight, bias: bias)
  }

  /// Divides kernel, strides, paddings and dilations between the pair.
  private func convolutionAttributes(
    _ old: Node
  ) -> (OrderedDictionary<String, Attribute>, OrderedDictionary<String, Attribute>) {
    var first: OrderedDictionary<String, Attribute> = [:]
    var second = old.attributes
    let axes = kernel.count
    let ones = [Int64](repeating: 1, count: axes)
    guard form == .spatial else {
      first["kernel_shape"] = .ints(ones)
      return (first, second)
    }
    first["kernel_shape"] = .ints([Int64(kernel[0]), 1])
    second["kernel_shape"] = .ints([1, Int64(kernel[1])])
    for key in ["strides", "dilations"] {
      guard let values = old.intsAttribute(key), values.count == 2 else { continue }
      first[key] = .ints([Int64(values[0]), 1])
      second[key] = .ints([1, Int64(values[1])])
    }
    if let pads = old.intsAttribute("pads"), pads.count == 4 {
      first["pads"] = .ints([Int64(pads[0]), 0, Int64(pads[2]), 0])
      second["pads"] = .ints([0, Int64(pads[1]), 0, Int64(pads[3])])
    }
    // SAME pads each axis by its own kernel and stride, which are 1 along the other one.
    if let mode = old.attributes["auto_pad"] { first["auto_pad"] = mode }
    return (first, second)
  }
}
