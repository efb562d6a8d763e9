// SPDX-License-Identifier: Apache-2.0
// The one table from operators to the functions that compile them.

import HalfstepGraph
import HalfstepNumerics

/// Compiles one node: reads its inputs from the lowering, emits steps, returns its outputs.
struct OperatorBuilder: Sendable {
  let build: @Sendable (Lowering, Node) throws(HalfstepError) -> [Value]

  init(_ build: @escaping @Sendable (Lowering, Node) throws(HalfstepError) -> [Value]) {
    self.build = build
  }
}

/// The one table from operators to the functions that compile them.
enum OperatorTable {
  /// The builder of a node's operator, or nil if the runtime cannot execute it.
  static func builder(for node: Node) -> OperatorBuilder? {
    guard node.domain.isEmpty else { return nil }
    return builders[node.opType]
  }

  /// Says why a node cannot run; nil if it can, as far as its operator and outputs tell.
  static func objection(to node: Node) -> String? {
    guard builder(for: node) != nil else {
      return node.domain.isEmpty ? node.opType : "\(node.domain).\(node.opType)"
    }
    let limit = outputLimits[node.opType] ?? 1
    let used = node.outputs.indices.filter { !node.outputs[$0].isEmpty }
    if let last = used.last, last >= limit { return "\(node.opType) with \(last + 1) outputs" }
    return nil
  }

  private static let builders: [String: OperatorBuilder] = {
    var table: [String: OperatorBuilder] = [:]
    for group in [
      convolutionOperators, poolingOperators, matrixOperators, normalizationOperators,
      activationOperators, arithmeticOperators, reductionOperators, viewOperators,
      movementOperators, constantOperators, quantizationOperators, recurrentOperators,
    ] {
      table.merge(group) { first, _ in first }
    }
    return table
  }()

  /// How many outputs a builder provides, where that is not 1.
  private static let outputLimits: [String: Int] = [
    "Split": .max, "RNN": 2, "GRU": 2, "LSTM": 3,
  ]
}
