// SPDX-License-Identifier: Apache-2.0
// RNN, LSTM and GRU, step by step over matrix products.

import HalfstepGraph
import HalfstepNumerics

let recurrentOperators: [String: OperatorBuilder] = {
  var table: [String: OperatorBuilder] = [:]
  for kind in [RecurrentLayer.Kind.rnn, .lstm, .gru] {
    table[kind.rawValue] = OperatorBuilder { (lowering, node) throws(HalfstepError) in
      try RecurrentLayer(kind, node, lowering).build()
    }
  }
  return table
}()

/// A recurrent node: shapes and operands that were checked.
///
/// Products with the inputs of all time steps come first, for each direction at once; then each step
/// multiplies the state. Sums are in float32; results do not depend on the number of threads.
struct RecurrentLayer {
  enum Kind: String, Sendable {
    case rnn = "RNN"
    case lstm = "LSTM"
    case gru = "GRU"

    /// Matrices of a direction, one behind the other.
    var gates: Int {
      switch self {
      case .rnn: 1
      case .lstm: 4
      case .gru: 3
      }
    }
    /// Functions of a direction, as ONNX defaults them.
    var functions: [String] {
      switch self {
      case .rnn: ["Tanh"]
      case .lstm: ["Sigmoid", "Tanh", "Tanh"]
      case .gru: ["Sigmoid", "Tanh"]
      }
    }
  }

  let kind: Kind
  let steps: Int
  let batch: Int
  let inputs: Int
  let hidden: Int
  /// Whether each direction runs from the end to the beginning.
  let isReversed: [Bool]
  /// Whether the batch comes before time and directions.
  let isBatchFirst: Bool
  /// Functions of each direction.
  let functions: [[RecurrentFunction]]
  let clip: Float?
  let couplesForget: Bool
  let resetsAfterProduct: Bool
  private let lowering: Lowering
  private let x: Value
  private let w: Value
  private let r: Value
  private let bias: Value?
  private let lengths: Value?
  private let initialHidden: Value?
  private let initialCell: Value?
  private let peepholes: Value?

  var directions: Int { isReversed.count }

  init(_ kind: Kind, _ node: Node, _ lowering: Lowering) throws(HalfstepError) {
    self.kind = kind
    self.lowering = lowering
    x = try lowering.plain(lowering.floatInput(node, 0))
    w = try lowering.plain(lowering.floatInput(node, 1))
    r = try lowering.plain(lowering.floatInput(node, 2))
    isBatchFirst = (node.intAttribute("layout") ?? 0) != 0
    switch node.stringAttribute("direction") ?? "forward" {
    case "forward": isReversed = [false]
    case "reverse": isReversed = [true]
    case "bidirectional": isReversed = [false, true]
    case let other: throw HalfstepError(.invalidGraph, "direction '\(other)'")
    }
    let count = isReversed.count
    guard x.rank == 3, r.rank == 3, x.count > 0, r.count > 0 else {
      throw HalfstepError(
        .shapeMismatch, "inputs \(x.shape) and \(r.shape): expected rank 3 and no empty tensor")
    }
    (steps, batch) = isBatchFirst ? (x.shape[1], x.shape[0]) : (x.shape[0], x.shape[1])
    inputs = x.shape[2]
    hidden = r.shape[2]
    let (gates, hidden, batch) = (kind.gates, hidden, batch)
    if let stated = node.intAttribute("hidden_size"), stated != hidden {
      throw HalfstepError(
        .shapeMismatch, "input 2 \(r.shape): expected hidden size \(stated), got \(hidden)")
    }
    func check(_ value: Value?, _ input: Int, _ expected: [Int]) throws(HalfstepError) {
      guard let value, value.dimensions != expected else { return }
      throw HalfstepError(
        .shapeMismatch, "input \(input) \(value.shape): expected \(try Shape(expected))")
    }
    try check(w, 1, [count, gates * hidden, inputs])
    try check(r, 2, [count, gates * hidden, hidden])
    func optional(_ input: Int, _ expected: [Int]) throws(HalfstepError) -> Value? {
      let value = try lowering.optionalFloatInput(node, input)
      try check(value, input, expected)
      return try value.map { (one) throws(HalfstepError) in try lowering.plain(one) }
    }
    bias = try optional(3, [count, 2 * gates * hidden])
    lengths = try lowering.optionalInput(node, 4)
    try check(lengths, 4, [batch])
    if let lengths, lengths.dataType != .int32 {
      throw HalfstepError(.typeMismatch, "input 4: expected int32, got \(lengths.dataType)")
    }
    let state = isBatchFirst ? [batch, count, hidden] : [count, batch, hidden]
    initialHidden = try optional(5, state)
    initialCell = kind == .lstm ? try optional(6, state) : nil
    peepholes = kind == .lstm ? try optional(7, [count, 3 * hidden]) : nil
    functions = try RecurrentFunction.list(of: node, kind.functions, directions: count)
    clip = node.floatAttribute("clip").flatMap { $0 > 0 ? $0 : nil }
    couplesForget = (node.intAttribute("input_forget") ?? 0) != 0
    resetsAfterProduct = (node.intAttribute("linear_before_reset") ?? 0) != 0
  }

  /// Emits the steps.
  ///
  /// - Returns: All hidden states, the last ones and, of an LSTM, the last cells.
  func build() throws(HalfstepError) -> [Value] {
    let (gateCount, directions) = (kind.gates * hidden, directions)
    let y = try lowering.makeValue(
      Shape(
        isBatchFirst ? [batch, steps, directions, hidden] : [steps, directions, batch, hidden]))
    let lastShape = try Shape(
      isBatchFirst ? [batch, directions, hidden] : [directions, batch, hidden])
    let lastHidden = try lowering.makeValue(lastShape)
    let lastCell = try lowering.makeValue(lastShape)
    // Products with the inputs, [steps · batch, gates · hidden]; and what a step needs.
    let products = try lowering.makeValue(Shape([steps, batch, gateCount]))
    let scratch = try lowering.makeValue(Shape([3, batch, max(gateCount, 2 * hidden)]))
    let reads = [x, w, r, bias, lengths, initialHidden, initialCell, peepholes].compactMap { $0 }
    let buffers = (x.buffer, w.buffer, r.buffer)
    let outputs = (y.buffer, lastHidden.buffer, lastCell.buffer)
    let layer = self
    lowering.emit(
      kind.rawValue, reads: reads, writes: [y, lastHidden, lastCell, products, scratch]
    ) { () throws(HalfstepError) in
      let stops = try layer.stops()
      for direction in 0..<directions {
        try MatrixProduct.multiply(
          rows: layer.steps * layer.batch, columns: gateCount, inner: layer.inputs,
          .init(buffers.0.floats, stride: layer.inputs),
          .init(
            buffers.1.floats + direction * gateCount * layer.inputs, stride: layer.inputs,
            isTransposed: true),
          into: products.buffer.floats, cStride: gateCount)
        let cell = RecurrentCell(
          layer: layer, direction: direction, products: try products.buffer.floats,
          recurrent: try buffers.2.floats + direction * gateCount * layer.hidden,
          bias: try layer.bias?.buffer.floats, peepholes: try layer.peepholes?.buffer.floats,
          scratch: try scratch.buffer.floats, stops: stops)
        try cell.run(
          hidden: layer.initialHidden?.buffer.floats, cell: layer.initialCell?.buffer.floats,
          y: outputs.0.floats, lastHidden: outputs.1.floats, lastCell: outputs.2.floats)
      }
    }
    return kind == .lstm ? [y, lastHidden, lastCell] : [y, lastHidden]
  }

  /// How many steps each sequence has.
  private func stops() throws(HalfstepError) -> [Int] {
    guard let lengths else { return [Int](repeating: steps, count: batch) }
    let values = try lengths.buffer.bytes.assumingMemoryBound(to: Int32.self)
    var result: [Int] = []
    for index in 0..<batch {
      guard (0...steps).contains(Int(values[index])) else {
        throw HalfstepError(
          .invalidArgument, "input 4: sequence \(index) has \(values[index]) of \(steps) steps")
      }
      result.append(Int(values[index]))
    }
    return result
  }
}
