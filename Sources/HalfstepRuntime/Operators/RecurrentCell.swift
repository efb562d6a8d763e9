// SPDX-License-Identifier: Apache-2.0
// One direction of a recurrent operator while it runs.

import HalfstepNumerics

/// One direction of a recurrent operator while it runs; everything it points to outlives it.
struct RecurrentCell: @unchecked Sendable {
  // Unchecked: pointers into buffers of the plan, read and written by one step at a time; threads get
  // rows of their own.

  private let layer: RecurrentLayer
  private let direction: Int
  /// Products of inputs and weights, `[steps · batch, gates · hidden]` in the order of the input's rows.
  private let products: UnsafePointer<Float>
  private let recurrent: UnsafePointer<Float>
  /// Sums of both biases, `[gates · hidden]`; of a GRU that resets after the product, the hidden gate's
  /// recurrent bias stays apart.
  private let bias: [Float]
  private let resetBias: [Float]
  private let peepholes: [Float]
  /// Hidden states and cells, `[batch, hidden]` each.
  private let state: UnsafeMutablePointer<Float>
  private let cells: UnsafeMutablePointer<Float>
  /// Products of states and recurrent weights, `[batch, gates · hidden]`.
  private let sums: UnsafeMutablePointer<Float>
  /// Reset states of a GRU, `[batch, hidden]`.
  private let reset: UnsafeMutablePointer<Float>
  private let stops: [Int]
  private let functions: [RecurrentFunction]

  private var hidden: Int { layer.hidden }
  private var width: Int { layer.kind.gates * layer.hidden }

  /// - Parameters:
  ///   - bias: `[directions, 2 · gates · hidden]`, nil for zeros.
  ///   - peepholes: `[directions, 3 · hidden]`, nil for zeros.
  ///   - scratch: `[3, batch, max(gates · hidden, 2 · hidden)]`.
  ///   - stops: Steps of each sequence.
  init(
    layer: RecurrentLayer, direction: Int, products: UnsafePointer<Float>,
    recurrent: UnsafePointer<Float>, bias: UnsafePointer<Float>?,
    peepholes: UnsafePointer<Float>?, scratch: UnsafeMutablePointer<Float>, stops: [Int]
  ) {
    self.layer = layer
    self.direction = direction
    self.products = products
    self.recurrent = recurrent
    self.stops = stops
    functions = layer.functions[direction]
    let (hidden, width) = (layer.hidden, layer.kind.gates * layer.hidden)
    let part = layer.batch * max(width, 2 * hidden)
    state = scratch
    cells = scratch + layer.batch * hidden
    sums = scratch + part
    reset = scratch + 2 * part
    var sum = [Float](repeating: 0, count: width)
    var apart = [Float](repeating: 0, count: hidden)
    if let bias {
      let start = bias + direction * 2 * width
      for index in 0..<width { sum[index] = start[index] + start[width + index] }
      if layer.kind == .gru, layer.resetsAfterProduct {
        for index in 0..<hidden {
          sum[2 * hidden + index] = start[2 * hidden + index]
          apart[index] = start[width + 2 * hidden + index]
        }
      }
    }
    self.bias = sum
    resetBias = apart
    var holes = [Float](repeating: 0, count: layer.kind == .lstm ? 3 * hidden : 0)
    if let peepholes {
      for index in holes.indices { holes[index] = peepholes[direction * 3 * hidden + index] }
    }
    self.peepholes = holes
  }

  /// Runs all steps.
  func run(
    hidden initialHidden: UnsafePointer<Float>?, cell initialCell: UnsafePointer<Float>?,
    y: UnsafeMutablePointer<Float>, lastHidden: UnsafeMutablePointer<Float>,
    lastCell: UnsafeMutablePointer<Float>
  ) throws(HalfstepError) {
    for row in 0..<layer.batch {
      for index in 0..<hidden {
        let place = stateRow(row) + index
        state[row * hidden + index] = initialHidden?[place] ?? 0
        cells[row * hidden + index] = initialCell?[place] ?? 0
      }
    }
    nonisolated(unsafe) let y = y
    for step in 0..<layer.steps {
      let resetsFirst = layer.kind == .gru && !layer.resetsAfterProduct
      try multiply(state, rows: 0..<(resetsFirst ? 2 * hidden : width))
      if resetsFirst {
        // The hidden gate multiplies the reset state, which the other gates make.
        forEachActiveRow(step) { row, time in resetState(row, time) }
        try multiply(reset, rows: 2 * hidden..<width)
      }
      forEachActiveRow(step) { row, time in
        switch layer.kind {
        case .rnn: advanceSimple(row, time)
        case .lstm: advanceLSTM(row, time)
        case .gru: advanceGRU(row, time)
        }
        (y + outputRow(row, time)).update(from: state + row * hidden, count: hidden)
      }
      // Behind its end a sequence has zeros.
      for row in 0..<layer.batch where step >= stops[row] {
        (y + outputRow(row, step)).update(repeating: 0, count: hidden)
      }
    }
    for row in 0..<layer.batch {
      (lastHidden + stateRow(row)).update(from: state + row * hidden, count: hidden)
      (lastCell + stateRow(row)).update(from: cells + row * hidden, count: hidden)
    }
  }

  /// Multiplies states by rows of the recurrent weights.
  private func multiply(
    _ states: UnsafePointer<Float>, rows: Range<Int>
  ) throws(HalfstepError) {
    try MatrixProduct.multiply(
      rows: layer.batch, columns: rows.count, inner: hidden, .init(states, stride: hidden),
      .init(recurrent + rows.lowerBound * hidden, stride: hidden, isTransposed: true),
      into: sums + rows.lowerBound, cStride: width)
  }

  /// Calls `body` with each sequence that goes on, and its time at this step.
  private func forEachActiveRow(_ step: Int, _ body: @Sendable (_ row: Int, _ time: Int) -> Void) {
    Parallel.forEachRange(layer.batch, grain: max(1, (1 << 12) / width)) { _, rows in
      for row in rows where step < stops[row] {
        body(row, layer.isReversed[direction] ? stops[row] - 1 - step : step)
      }
    }
  }

  // MARK: Places

  private func stateRow(_ row: Int) -> Int {
    (layer.isBatchFirst ? row * layer.directions + direction : direction * layer.batch + row)
      * hidden
  }

  private func outputRow(_ row: Int, _ time: Int) -> Int {
    let place =
      layer.isBatchFirst
      ? (row * layer.steps + time) * layer.directions + direction
      : (time * layer.directions + direction) * layer.batch + row
    return place * hidden
  }

  private func productRow(_ row: Int, _ time: Int) -> UnsafePointer<Float> {
    let place = layer.isBatchFirst ? row * layer.steps + time : time * layer.batch + row
    return products + place * width
  }

  // MARK: Arithmetic

  @inline(__always) private func clipped(_ x: Float) -> Float {
    guard let clip = layer.clip else { return x }
    return min(max(x, -clip), clip)
  }

  private func advanceSimple(_ row: Int, _ time: Int) {
    let (given, sum) = (productRow(row, time), sums + row * width)
    let target = state + row * hidden
    for unit in 0..<hidden {
      target[unit] = functions[0](clipped(given[unit] + sum[unit] + bias[unit]))
    }
  }

  /// Gates in ONNX's order: input, output, forget, cell.
  private func advanceLSTM(_ row: Int, _ time: Int) {
    let (given, sum) = (productRow(row, time), sums + row * width)
    let (target, cell) = (state + row * hidden, cells + row * hidden)
    @inline(__always) func total(_ gate: Int, _ unit: Int) -> Float {
      let index = gate * hidden + unit
      return given[index] + sum[index] + bias[index]
    }
    for unit in 0..<hidden {
      let before = cell[unit]
      let input = functions[0](clipped(total(0, unit) + peepholes[unit] * before))
      let forget =
        layer.couplesForget
        ? 1 - input
        : functions[0](clipped(total(2, unit) + peepholes[2 * hidden + unit] * before))
      let candidate = functions[1](clipped(total(3, unit)))
      let after = forget * before + input * candidate
      let output = functions[0](clipped(total(1, unit) + peepholes[hidden + unit] * after))
      cell[unit] = after
      target[unit] = output * functions[2](clipped(after))
    }
  }

  /// Gates in ONNX's order: update, reset, hidden.
  private func resetState(_ row: Int, _ time: Int) {
    let (given, sum) = (productRow(row, time), sums + row * width)
    for unit in 0..<hidden {
      let index = hidden + unit
      let gate = functions[0](clipped(given[index] + sum[index] + bias[index]))
      reset[row * hidden + unit] = gate * state[row * hidden + unit]
    }
  }

  private func advanceGRU(_ row: Int, _ time: Int) {
    let (given, sum) = (productRow(row, time), sums + row * width)
    let target = state + row * hidden
    for unit in 0..<hidden {
      let update = functions[0](clipped(given[unit] + sum[unit] + bias[unit]))
      let index = 2 * hidden + unit
      var recurrent = sum[index]
      if layer.resetsAfterProduct {
        let gate = functions[0](
          clipped(given[hidden + unit] + sum[hidden + unit] + bias[hidden + unit]))
        recurrent = gate * (recurrent + resetBias[unit])
      }
      let candidate = functions[1](clipped(given[index] + recurrent + bias[index]))
      target[unit] = (1 - update) * candidate + update * target[unit]
    }
  }
}
