// SPDX-License-Identifier: Apache-2.0
// Takes channels out of a graph.

import HalfstepGraph
import HalfstepNumerics

/// Takes channels out of a graph: out of weights, of constants that go with channels, and of shapes.
package struct ChannelRemoval {
  package let dependencies: ChannelDependencies
  /// Whether each channel, by its representative, goes.
  package let isRemoved: [Bool]

  /// Indices of the channels that stay.
  package func kept(_ ids: [Int]) -> [Int] { ids.indices.filter { !isRemoved[ids[$0]] } }

  private func losesAny(_ ids: [Int]) -> Bool { ids.contains { isRemoved[$0] } }

  /// Changes a graph that has the nodes that were followed; weights may be others.
  ///
  /// - Returns: The constants that lost channels, in the order of the nodes that read them.
  /// - Throws: `HalfstepError.outOfMemory`; `.internalError` for another graph.
  func apply(to graph: inout Graph) throws(HalfstepError) -> [PrunedConstant] {
    let index = GraphIndex(graph)
    var names = NameAllocator(graph)
    var changes: [Change] = []
    for layer in dependencies.layers { changes += try shrink(layer, in: &graph, index, &names) }
    for edit in dependencies.edits {
      try make(edit, in: &graph, index, &names)
      guard case .constant(let node, let input, let axis, let ids) = edit, losesAny(ids) else {
        continue
      }
      changes.append(Change(node: node, input: input, axis: axis, kept: kept(ids)))
    }
    let constants = changes.sorted {
      ($0.node, $0.input, $0.axis) < ($1.node, $1.input, $1.axis)
    }.compactMap { change -> PrunedConstant? in
      // What was not there before, such as a bias that came with the fit, has lost nothing.
      guard let name = dependencies.graph.nodes[change.node].input(change.input) else { return nil }
      return PrunedConstant(
        name: name, result: graph.nodes[change.node].inputs[change.input], axis: change.axis,
        kept: change.kept)
    }
    for (name, channels) in dependencies.tensors where losesAny(channels.ids) {
      forget(name, channels, in: &graph)
    }
    graph.removeUnusedConstants()
    graph.checkInvariants()
    return constants
  }

  /// An operand that lost channels.
  private struct Change {
    let node: Int
    let input: Int
    let axis: Int
    let kept: [Int]
  }

  // MARK: Layers

  private func shrink(
    _ item: ChannelDependencies.Layer, in graph: inout Graph, _ index: GraphIndex,
    _ names: inout NameAllocator
  ) throws(HalfstepError) -> [Change] {
    let layer = item.layer
    let layout = layer.layout
    guard losesAny(item.outputs) || losesAny(item.inputs ?? []) else { return [] }
    let outputs = kept(item.outputs)
    let inputs = item.inputs.map(kept) ?? Array(0..<layout.inputChannels)
    let ownInputs: [Int]
    let ownOutputs: [Int]
    if item.losesGroups {
      // What a group has stays as it is.
      ownInputs = Array(0..<layout.inputsPerGroup)
      ownOutputs = Array(0..<layout.outputsPerGroup)
      let groups = inputs.count / layout.inputsPerGroup
      graph.update(at: layer.node) { $0.attributes["group"] = .int(Int64(groups)) }
    } else {
      ownInputs = inputs.filter { $0 < layout.inputsPerGroup }
      ownOutputs = outputs.filter { $0 < layout.outputsPerGroup }
    }
    let axes: ([Int], [Int])
    switch layer.kind {
    case .conv: axes = (outputs, ownInputs)
    case .convTranspose: axes = (inputs, ownOutputs)
    case .gemm, .matMul: axes = layout.outputIsOuter ? (outputs, inputs) : (inputs, outputs)
    }
    let weight = try layer.weight(in: graph, index)
    let smaller = try weight.keeping(axes.0, axis: 0).keeping(axes.1, axis: 1)
    let name = graph.nodes[layer.node].inputs[1]
    graph.weightEncodings[name] = nil
    graph.replaceConstant(
      at: layer.node, input: 1, with: smaller, index, stem: name, names: &names)
    var changes: [Change] = []
    for (axis, places) in [axes.0, axes.1].enumerated() where places.count < weight.shape[axis] {
      changes.append(Change(node: layer.node, input: 1, axis: axis, kept: places))
    }
    guard let bias = graph.nodes[layer.node].input(2) else { return changes }
    guard let value = graph.constant(bias, GraphIndex(graph)) else {
      throw HalfstepError(.internalError, "node '\(item.name)': the bias is gone", node: item.name)
    }
    if value.count == 1 && layout.outputChannels > 1 { return changes }
    let axis = value.shape.rank - 1
    graph.replaceConstant(
      at: layer.node, input: 2, with: try value.keeping(outputs, axis: axis), index, stem: bias,
      names: &names)
    if losesAny(item.outputs) {
      changes.append(Change(node: layer.node, input: 2, axis: axis, kept: outputs))
    }
    return changes
  }

  // MARK: Other nodes

  private func make(
    _ edit: ChannelDependencies.Edit, in graph: inout Graph, _ index: GraphIndex,
    _ names: inout NameAllocator
  ) throws(HalfstepError) {
    switch edit {
    case .constant(let node, let input, let axis, let ids):
      guard losesAny(ids) else { return }
      let value = try constant(node, input, graph, index)
      graph.weightEncodings[graph.nodes[node].inputs[input]] = nil
      try replace(node, input, try value.keeping(kept(ids), axis: axis), in: &graph, index, &names)
    case .extent(let node, let input, let entry, let ids):
      guard losesAny(ids) else { return }
      try replaceEntry(node, input, entry, kept(ids).count, in: &graph, index, &names)
    case .split(let node, let parts):
      guard parts.contains(where: losesAny) else { return }
      let sizes = parts.map { Int64(kept($0).count) }
      graph.update(at: node) { $0.attributes["num_outputs"] = nil }
      if graph.opset >= 13 {
        let stem = "\(graph.nodes[node].label).split"
        graph.replaceConstant(
          at: node, input: 1, with: try Tensor(sizes), index, stem: stem, names: &names)
      } else {
        graph.update(at: node) { $0.attributes["split"] = .ints(sizes) }
      }
    case .slice(let node, let entry, let ids, let range):
      guard losesAny(ids) else { return }
      let low = kept(Array(ids[..<range.lowerBound])).count
      let high = low + kept(Array(ids[range])).count
      try replaceEntry(node, 1, entry, low, in: &graph, index, &names)
      try replaceEntry(node, 2, entry, high, in: &graph, index, &names)
    case .gather(let node, let ids, let indices):
      guard losesAny(ids) else { return }
      var places = [Int: Int64]()
      for (place, old) in kept(ids).enumerated() { places[old] = Int64(place) }
      let moved = indices.compactMap { places[$0] }
      try replace(node, 1, try Tensor(moved), in: &graph, index, &names)
    }
  }

  private func constant(
    _ node: Int, _ input: Int, _ graph: Graph, _ index: GraphIndex
  ) throws(HalfstepError) -> Tensor {
    guard let name = graph.nodes[node].input(input), let value = graph.constant(name, index) else {
      let label = graph.nodes[node].label
      throw HalfstepError(.internalError, "node '\(label)': a constant is gone", node: label)
    }
    return value
  }

  private func replace(
    _ node: Int, _ input: Int, _ value: Tensor, in graph: inout Graph, _ index: GraphIndex,
    _ names: inout NameAllocator
  ) throws(HalfstepError) {
    let name = graph.nodes[node].inputs[input]
    graph.replaceConstant(at: node, input: input, with: value, index, stem: name, names: &names)
  }

  private func replaceEntry(
    _ node: Int, _ input: Int, _ entry: Int, _ extent: Int, in graph: inout Graph,
    _ index: GraphIndex, _ names: inout NameAllocator
  ) throws(HalfstepError) {
    // An earlier edit of the same operand may have put in a fresh constant.
    let name = graph.nodes[node].inputs[input]
    var value = graph.initializers[name]
    if value == nil { value = try constant(node, input, graph, index) }
    guard let value else { return }
    var entries = try value.integers().map { Int64($0) }
    guard entries.indices.contains(entry) else {
      throw HalfstepError(.internalError, "constant '\(name)' has no entry \(entry)")
    }
    entries[entry] = Int64(extent)
    let tensor: Tensor
    if value.dataType == .int32 {
      let short = entries.map { Int32(truncatingIfNeeded: $0) }
      tensor = try Tensor(elements: short, .int32, shape: value.shape.dimensions)
    } else {
      tensor = try Tensor(entries).reshaped(value.shape)
    }
    try replace(node, input, tensor, in: &graph, index, &names)
  }

  /// Corrects what the graph says about a tensor besides its nodes.
  private func forget(
    _ name: String, _ channels: ChannelDependencies.Channels, in graph: inout Graph
  ) {
    let places = kept(channels.ids)
    if var info = graph.valueInfos[name], let dimensions = info.dimensions {
      if dimensions.indices.contains(channels.axis) {
        info.dimensions?[channels.axis] = .fixed(places.count)
      }
      graph.valueInfos[name] = info
    }
    if let norm = graph.foldedBatchNorms[name], norm.gamma.count == channels.ids.count,
      norm.beta.count == channels.ids.count
    {
      graph.foldedBatchNorms[name] = FoldedBatchNorm(
        gamma: places.map { norm.gamma[$0] }, beta: places.map { norm.beta[$0] })
    }
  }
}

extension Tensor {
  /// The elements at some indices along an axis.
  ///
  /// - Parameters:
  ///   - indices: Each below the axis's extent.
  ///   - axis: Below the rank.
  /// - Throws: `HalfstepError.internalError` for others; `.typeMismatch` for elements that share bytes.
  func keeping(_ indices: [Int], axis: Int) throws(HalfstepError) -> Tensor {
    guard shape.dimensions.indices.contains(axis),
      indices.allSatisfy({ $0 >= 0 && $0 < shape[axis] })
    else {
      throw HalfstepError(.internalError, "tensor \(shape): indices along axis \(axis)")
    }
    guard let bits = dataType.bitWidth, bits >= 8 else {
      throw HalfstepError(.typeMismatch, "tensor of \(dataType): elements share bytes")
    }
    if indices.count == shape[axis] { return self }
    var extents = shape.dimensions
    extents[axis] = indices.count
    let result = try Tensor(uninitialized: dataType, shape: try Shape(extents))
    let run = shape.dimensions[(axis + 1)...].reduce(1, *) * bits / 8
    let outer = shape.dimensions[..<axis].reduce(1, *)
    var target = result.storage.baseAddress
    for place in 0..<outer {
      for index in indices {
        target.copyMemory(
          from: storage.baseAddress + (place * shape[axis] + index) * run, byteCount: run)
        target += run
      }
    }
    withExtendedLifetime(self) {}
    return result
  }
}
