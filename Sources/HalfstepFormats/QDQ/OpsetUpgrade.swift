// SPDX-License-Identifier: Apache-2.0
// Raises the version of ONNX's own operators without changing what a graph computes.

import HalfstepGraph
import HalfstepNumerics

/// Raises the version of ONNX's own operators without changing what a graph computes.
///
/// Knows the changes of meaning and signature between versions 7 and 21; every other change between
/// them only adds element types or attributes whose defaults are the old behavior.
struct OpsetUpgrade {
  /// Newest version that the rules cover.
  static let newest: Int = 21

  private var graph: Graph
  private let from: Int
  private let to: Int
  private var names: NamePool
  private var ranks: [String: [ValueInfo.Dimension]] = [:]

  /// The graph with operators of at least version `target`.
  ///
  /// - Throws: `HalfstepError.unsupportedVersion` naming a node that cannot be expressed in the newer
  ///   version.
  static func apply(to graph: Graph, target: Int) throws(HalfstepError) -> Graph {
    guard graph.opset < target else { return graph }
    var upgrade = OpsetUpgrade(graph, target: target)
    for position in graph.nodes.indices where graph.nodes[position].domain.isEmpty {
      var node = graph.nodes[position]
      try upgrade.convert(&node)
      upgrade.graph.update(at: position) { $0 = node }
    }
    upgrade.graph.opsetVersions[""] = target
    return upgrade.graph
  }

  private init(_ graph: Graph, target: Int) {
    self.graph = graph
    from = graph.opset
    to = target
    names = NamePool(graph)
    for info in graph.valueInfos.values { ranks[info.name] = info.dimensions }
    for info in graph.inputs + graph.outputs { ranks[info.name] = info.dimensions }
  }

  /// Whether the change that came with a version lies on the way.
  private func crosses(_ version: Int) -> Bool { from < version && version <= to }

  private mutating func convert(_ node: inout Node) throws(HalfstepError) {
    switch node.opType {
    case "If", "Loop", "Scan", "SequenceMap":
      throw failure(node, "subgraphs are not converted")
    case "Squeeze", "Unsqueeze", "ReduceSum":
      if crosses(13) { try moveInts(["axes"], of: &node) }
    case "ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd", "ReduceL1", "ReduceL2",
      "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare":
      if crosses(18) { try moveInts(["axes"], of: &node) }
    case "Split":
      if crosses(13) { try moveInts(["split"], of: &node) }
      if crosses(18), node.input(1) == nil {
        node.attributes["num_outputs"] = .int(Int64(node.outputs.count))
      }
    case "Slice":
      if crosses(10) { try moveInts(["starts", "ends", "axes"], of: &node) }
    case "Softmax", "LogSoftmax", "Hardmax":
      if crosses(13) { try narrowAxis(&node) }
    case "Clip":
      if crosses(11) { try moveFloats(["min", "max"], of: &node) }
    case "Pad":
      if crosses(11) {
        try moveInts(["pads"], of: &node)
        try moveFloats(["value"], of: &node)
      }
    case "TopK":
      if crosses(10), let count = node.intAttribute("k") {
        node.attributes["k"] = nil
        node.inputs.append(try constant(Tensor([Int64(count)]), node, "k"))
      }
    case "Dropout":
      // The ratio matters in training only.
      if crosses(12) { node.attributes["ratio"] = nil }
    case "BatchNormalization":
      if crosses(9), node.intAttribute("spatial") == 0 {
        throw failure(node, "it has statistics for each position")
      }
      if crosses(9) { node.attributes["spatial"] = nil }
      if crosses(14), node.outputs.dropFirst().contains(where: { !$0.isEmpty }) {
        throw failure(node, "it is in training mode")
      }
    case "Scatter":
      if crosses(11) { node.opType = "ScatterElements" }
    case "RoiAlign":
      if crosses(16), node.attributes["coordinate_transformation_mode"] == nil {
        node.attributes["coordinate_transformation_mode"] = .string(Array("output_half_pixel".utf8))
      }
    case "GridSample":
      let renamed = ["bilinear": "linear", "bicubic": "cubic"]
      if crosses(20), let mode = node.stringAttribute("mode"), let new = renamed[mode] {
        node.attributes["mode"] = .string(Array(new.utf8))
      }
    case "Resize":
      if crosses(11) { throw failure(node, "its coordinates are counted differently") }
    case "Upsample":
      if to >= 10 { throw failure(node, "the operator was removed") }
    case "GroupNormalization":
      if crosses(21) { throw failure(node, "it has scales for groups, not for channels") }
    case "DFT":
      if crosses(20) { throw failure(node, "its axis is given differently") }
    default: break
    }
  }

  /// Softmax once treated everything from its axis on as one axis, which is the same only if all of
  /// these extents but one are 1.
  private func narrowAxis(_ node: inout Node) throws(HalfstepError) {
    let axis = node.intAttribute("axis") ?? 1
    if axis == -1 { return }
    guard let input = node.input(0), let extents = ranks[input] else {
      throw failure(node, "the rank of its input is not declared")
    }
    let first = axis < 0 ? axis + extents.count : axis
    guard extents.indices.contains(first) else { throw failure(node, "its axis is out of range") }
    let wide = extents.indices.filter { $0 >= first && extents[$0] != .fixed(1) }
    guard wide.count <= 1 else { throw failure(node, "its axis spans several dimensions") }
    node.attributes["axis"] = .int(Int64(wide.first ?? first))
  }

  /// Turns integer-list attributes into inputs, in this order after the first.
  private mutating func moveInts(
    _ keys: [String], of node: inout Node
  ) throws(HalfstepError) {
    for key in keys {
      guard case .ints(let values)? = node.attributes[key] else { continue }
      node.attributes[key] = nil
      node.inputs.append(try constant(Tensor(values), node, key))
    }
  }

  /// Turns float attributes into scalar inputs, in this order after the others.
  private mutating func moveFloats(
    _ keys: [String], of node: inout Node
  ) throws(HalfstepError) {
    for key in keys {
      guard let value = node.floatAttribute(key) else {
        node.inputs.append("")
        continue
      }
      node.attributes[key] = nil
      node.inputs.append(try constant(Tensor([value], shape: []), node, key))
    }
    while node.inputs.last?.isEmpty == true { node.inputs.removeLast() }
  }

  private mutating func constant(
    _ tensor: Tensor, _ node: Node, _ role: String
  ) throws(HalfstepError) -> String {
    let name = names.tensor("\(node.outputs.first ?? node.label)_\(role)")
    graph.initializers[name] = tensor
    return name
  }

  private func failure(_ node: Node, _ why: String) -> HalfstepError {
    HalfstepError(
      .unsupportedVersion,
      "node '\(node.label)' (\(node.opType)) cannot move from operator set \(from) to \(to): \(why)",
      node: node.label)
  }
}
