// SPDX-License-Identifier: Apache-2.0
// Decides which tensors get quantizers.

import HalfstepNumerics
import OrderedCollections

extension Placement {
  /// Decides which tensors of a graph get quantizers.
  ///
  /// Follows AIMET 2.42's order: defaults, params, op_type, supergroups, model_input, model_output,
  /// then granularity, the rules of single operators, and shared quantizers. Only tensors that surely
  /// hold floats get one. A tensor that a node's subgraph reads is treated like any other.
  ///
  /// - Parameters:
  ///   - graph: A valid graph in topological order.
  ///   - configuration: What the target quantizes.
  ///   - parameterBits: Width of constants, 2...16.
  ///   - activationBits: Width of computed tensors, 2...16.
  ///   - parameterBlockSize: Input channels that share a scale in the weights of layers that are
  ///     quantized per channel, 1 or more; nil for one scale a channel.
  ///   - excluding: Names (or labels) of nodes whose outputs and parameters stay unquantized, and so
  ///     do graph inputs and constants that only they read.
  /// - Throws: `HalfstepError.invalidArgument` for a width or block size out of range, `.unknownName` for an
  ///   excluded node that does not exist or a pattern that `supergroup_pass_list` may not hold,
  ///   `.invalidConfiguration` if two operators ask opposite things of one tensor.
  /// - Complexity: O(nodes · supergroups).
  package static func make(
    for graph: Graph, configuration: RuntimeConfiguration, parameterBits: Int,
    activationBits: Int, parameterBlockSize: Int? = nil, excluding: Set<String> = []
  ) throws(HalfstepError) -> Placement {
    for (what, bits) in [("parameter", parameterBits), ("activation", activationBits)]
    where !QuantizerSpec.bitRange.contains(bits) {
      throw HalfstepError(.invalidArgument, "\(what) bits: expected 2...16, got \(bits)")
    }
    if let parameterBlockSize, parameterBlockSize < 1 {
      throw HalfstepError(
        .invalidArgument, "parameter block size: expected 1 or more, got \(parameterBlockSize)")
    }
    for pass in configuration.supergroupPasses where !_PatternMatcher.passNames.contains(pass) {
      throw HalfstepError(
        .unknownName, "configuration, supergroup_pass_list: unknown pattern '\(pass)'")
    }
    let operations = _Operations(graph, passes: Set(configuration.supergroupPasses))
    var board = _QuantizerBoard(
      graph, operations: operations, parameterBits: parameterBits, activationBits: activationBits)
    try board.apply(configuration)
    if let parameterBlockSize { board.cutWeights(intoBlocksOf: parameterBlockSize) }
    try board.exclude(excluding)
    board.applyWeightSymmetryToData(configuration)
    board.applyOperatorRules(hardware: configuration.hardwareVersion)
    board.tieQuantizers()

    var placement = Placement()
    for (tensor, index) in board.assignment {
      let quantizer = board.quantizers[index]
      guard quantizer.isEnabled else { continue }
      var site = QuantizerSite(tensor: tensor, role: quantizer.role, spec: quantizer.spec)
      site.fixedMinimum = quantizer.minimum
      site.fixedMaximum = quantizer.maximum
      site.tieLeader = quantizer.tensor
      placement.sites[tensor] = site
    }
    placement.propagated = board.propagatedGrids()
    return placement
  }
}

extension _QuantizerBoard {
  /// Turns off what belongs to excluded nodes.
  fileprivate mutating func exclude(_ names: Set<String>) throws(HalfstepError) {
    if names.isEmpty { return }
    var unknown = names
    for node in graph.nodes where names.contains(node.name) || names.contains(node.label) {
      unknown.remove(node.name)
      unknown.remove(node.label)
    }
    if let name = unknown.min() {
      throw HalfstepError(.unknownName, "excluded layers: the graph has no node '\(name)'")
    }
    let excluded = Set(
      operations.list.indices.filter {
        operations.list[$0].nodes.contains {
          names.contains(graph.nodes[$0].name) || names.contains(graph.nodes[$0].label)
        }
      })
    for position in excluded {
      let operation = operations.list[position]
      for name in operation.outputs + operation.parameters.values {
        update(name) { $0.isEnabled = false }
      }
    }
    for name in graphInputs + constantData
    where Set(operations.consumers[name] ?? []).isSubset(of: excluded) {
      update(name) { $0.isEnabled = false }
    }
  }

  /// Tensors without a quantizer whose values still lie on the grid of another tensor.
  ///
  /// Forward through operators that only move values; backward into an operator's input that nothing
  /// else reads. Each pass may feed the next, so both directions run once, as encodings files expect.
  fileprivate func propagatedGrids() -> OrderedDictionary<String, String> {
    var grids: [String: String] = [:]
    for (tensor, index) in assignment
    where quantizers[index].isEnabled && quantizers[index].role == .activation {
      grids[tensor] = tensor
    }
    var derived: [String: String] = [:]
    func grid(_ tensor: String) -> Int? { grids[tensor].flatMap { assignment[$0] } }
    // What a pattern holds inside has no grid of its own.
    let fused = Set(operations.list.filter { $0.nodes.count > 1 }.flatMap(\.nodes))
    let moving = graph.nodes.enumerated().filter { position, node in
      !fused.contains(position)
        && (OperatorTraits.preservesGrid(node)
          || node.domain.isEmpty && OperatorTraits.joining.contains(node.opType))
    }.map(\.element)
    func derive(_ node: Node) {
      let inputs = node.inputs.filter { types.isQuantizable($0) }
      let outputs = node.outputs.filter { types.isQuantizable($0) }
      guard let firstIn = inputs.first, let firstOut = outputs.first else { return }
      if let source = grids[firstOut], outputs.allSatisfy({ grid($0) == grid(firstOut) }) {
        for input in inputs
        where grids[input] == nil && operations.constants[input] == nil
          && operations.consumers[input, default: []].count <= 1
        {
          grids[input] = source
          derived[input] = source
        }
      }
      let isForward =
        node.opType == "Pad" || inputs.allSatisfy { grid($0) != nil && grid($0) == grid(firstIn) }
      if isForward, let source = grids[firstIn] {
        for output in outputs where grids[output] == nil {
          grids[output] = source
          derived[output] = source
        }
      }
    }
    for node in moving { derive(node) }
    for node in moving.reversed() { derive(node) }
    var result: OrderedDictionary<String, String> = [:]
    for name in graph.inputs.map(\.name) + graph.nodes.flatMap(\.outputs) {
      if let source = derived[name] { result[name] = source }
    }
    return result
  }
}
