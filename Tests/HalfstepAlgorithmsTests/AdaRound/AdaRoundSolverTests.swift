// SPDX-License-Identifier: Apache-2.0
// AdaRound's solver on random layers: gradients, exhaustive search, threads, spilled rows, errors.

import HalfstepAlgorithms
import HalfstepNumerics
import TestSupport
import Testing

@Suite struct AdaRoundSolverTests {
  /// A random layer with rows of correlated inputs; weights lie between steps of 0.25.
  struct Case {
    let layout: RowLayout
    let rows: ReconstructionRows
    let loss: ReconstructionLoss
    let choices: RoundingChoices
    /// Weights in the solver's order, and inputs and wanted products by row in plain order.
    let weights: [Float]
    let inputs: [[Float]]
    let wanted: [[Float]]
    let bias: [Float]

    init(
      _ layout: RowLayout, rows count: Int, activation: FollowingActivation = .identity,
      noise: Float = 0, maximumBytes: Int = 1 << 30, seed: UInt64 = 1
    ) throws {
      var random = SeededGenerator(seed: seed)
      self.layout = layout
      bias = random.floats(layout.outputs, in: -0.2...0.2)
      loss = try ReconstructionLoss(bias: bias, activation: activation)
      rows = try ReconstructionRows(
        layout, capacity: count, maximumBytes: maximumBytes, seed: seed)
      var plain = [Float](repeating: 0, count: layout.outputs * layout.columns)
      var start = [Float](repeating: 0, count: layout.weightCount)
      var (step, height, weights) = (start, start, start)
      for index in plain.indices {
        plain[index] = Float.random(in: -1...1, using: &random)
        let place = layout.weightIndex(
          output: index / layout.columns, column: index % layout.columns)
        let quotient = plain[index] / 0.25
        start[place] = quotient.rounded(.down) * 0.25
        step[place] = 0.25
        height[place] = quotient - quotient.rounded(.down)
        weights[place] = plain[index]
      }
      choices = RoundingChoices(start: start, step: step, height: height)
      self.weights = weights
      var (inputs, wanted): ([[Float]], [[Float]]) = ([], [])
      for _ in 0..<count {
        let common = Float.random(in: -1...1, using: &random)
        var row = [Float](repeating: 0, count: rows.stride)
        var values: [Float] = []
        var products = [Float](repeating: 0, count: layout.outputs)
        for group in 0..<layout.groups {
          for column in 0..<layout.columns {
            let value = common + Float.random(in: -0.5...0.5, using: &random)
            values.append(value)
            row[layout.inputIndex(group: group, column: column)] =
              value + noise * Float.random(in: -1...1, using: &random)
            for output in 0..<layout.outputsPerGroup {
              let channel = group * layout.outputsPerGroup + output
              products[channel] += value * plain[channel * layout.columns + column]
            }
          }
        }
        for channel in 0..<layout.outputs {
          products[channel] += bias[channel]
          row[layout.inputStride + channel] = products[channel]
        }
        let (loss, start) = (loss, layout.inputStride)
        row.withUnsafeMutableBufferPointer { loss.activate($0.baseAddress! + start) }
        try rows.append(row)
        inputs.append(values)
        wanted.append(products)
      }
      try rows.finish()
      self.inputs = inputs
      self.wanted = wanted
    }

    func solver(_ options: AdaRoundOptions = AdaRoundOptions()) throws -> AdaRoundSolver {
      try AdaRoundSolver(options, layout: layout, loss: loss)
    }

    /// Weights for a choice of directions.
    func snapped(_ isUp: [Bool]) -> [Float] {
      isUp.indices.map { choices.start[$0] + (isUp[$0] ? choices.step[$0] : 0) }
    }
    var nearest: [Float] { snapped(choices.height.map { $0 > 0.5 }) }
  }

  static let layouts = [
    RowLayout(groups: 1, outputsPerGroup: 5, columns: 12),
    RowLayout(groups: 1, outputsPerGroup: 33, columns: 40),
    RowLayout(groups: 3, outputsPerGroup: 4, columns: 9),
    RowLayout(groups: 19, outputsPerGroup: 1, columns: 9),
  ]

  @Test(arguments: layouts)
  func gradientFollowsFiniteDifferencesInDouble(layout: RowLayout) throws {
    for activation in [FollowingActivation.identity, .relu, .hardSwish] {
      let layer = try Case(layout, rows: 30, activation: activation, noise: 0.2)
      let solver = try layer.solver()
      let weights = layer.nearest
      let gradient = try solver.gradient(at: weights, rows: layer.rows)
      // The rows lie in a random order; sums over all of them do not depend on it.
      var stored: [[Float]] = []
      for row in 0..<layer.rows.count {
        layer.rows.copy(row, into: &stored)
      }
      func objective(_ weights: [Double], output: Int) -> Double {
        var sum = 0.0
        for row in stored {
          var product = Double(layer.bias[output])
          for column in 0..<layout.columns {
            let group = output / layout.outputsPerGroup
            product +=
              weights[layout.weightIndex(output: output, column: column)]
              * Double(row[layout.inputIndex(group: group, column: column)])
          }
          let value: Double =
            switch activation {
            case .relu: max(product, 0)
            case .hardSwish: product * min(max(product / 6 + 0.5, 0), 1)
            default: product
            }
          let difference = value - Double(row[layout.inputStride + output])
          sum += difference * difference
        }
        return sum / Double(stored.count)
      }
      for output in 0..<layout.outputs {
        for column in stride(from: 0, to: layout.columns, by: 5) {
          let place = layout.weightIndex(output: output, column: column)
          var moved = weights.map(Double.init)
          moved[place] += 1e-7
          let above = objective(moved, output: output)
          moved[place] -= 2e-7
          let slope = (above - objective(moved, output: output)) / 2e-7
          // Floats: 30 rows of products of up to 40 terms, 2⁻²⁴ each; differences: 10⁻⁹ / 10⁻⁷·2⁻⁵².
          expectClose(gradient[place], Float(slope), absolute: 2e-5, relative: 1e-4)
        }
      }
    }
  }

  @Test func smallLayersComeCloseToTheBestOfAllRoundings() throws {
    // 2 outputs of 9 weights: each output has 512 roundings of its own.
    var ratios: [Double] = []
    var plain: [Double] = []
    for seed in 1...5 {
      let layout = RowLayout(groups: 1, outputsPerGroup: 2, columns: 9)
      let layer = try Case(layout, rows: 300, seed: UInt64(seed))
      var options = AdaRoundOptions()
      options.batchRows = 64
      options.rate = 1e-2
      let solver = try layer.solver(options)
      let result = try solver.solve(layer.choices, rows: layer.rows, iterations: 2000) { _ in }
      let learned = try solver.error(of: layer.snapped(result.isUp), rows: layer.rows)
      let nearest = try solver.error(of: layer.nearest, rows: layer.rows)
      // The best rounding minimizes eᵀGe for each output.
      var best = 0.0
      for output in 0..<2 {
        best += (0..<512).reduce(Double.infinity) { least, bits in
          var sum = 0.0
          for row in layer.inputs {
            var error = 0.0
            for column in 0..<9 {
              let place = layout.weightIndex(output: output, column: column)
              let value =
                layer.choices.start[place] + (bits >> column & 1 == 1 ? 0.25 : 0)
              error += Double(row[column]) * Double(value - layer.weights[place])
            }
            sum += error * error
          }
          return min(least, sum / Double(layer.inputs.count))
        }
      }
      #expect(learned <= nearest)
      ratios.append(learned / best)
      plain.append(nearest / best)
    }
    // Gradient descent need not find the best; on these layers it comes within half of it, and
    // nearer than rounding to nearest on the whole.
    let (learned, nearest) = (ratios.reduce(0, +) / 5, plain.reduce(0, +) / 5)
    #expect(learned < 1.5, "\(ratios)")
    #expect(learned < 0.8 * nearest, "\(ratios) \(plain)")
  }

  @Test(arguments: layouts)
  func errorFallsAndThreadsAndFilesDoNotMatter(layout: RowLayout) throws {
    let saved = Parallel.maximumThreads
    defer { Parallel.setMaximumThreads(saved) }
    var options = AdaRoundOptions()
    options.batchRows = 96
    options.rate = 1e-2
    var outcomes: [[Bool]] = []
    for (threads, bytes) in [(1, 1 << 30), (2, 1 << 30), (2, 0)] {
      Parallel.setMaximumThreads(threads)
      let layer = try Case(
        layout, rows: 700, activation: .relu, noise: 0.1, maximumBytes: bytes)
      #expect(layer.rows.isSpilled == (bytes == 0))
      let solver = try layer.solver(options)
      let result = try solver.solve(layer.choices, rows: layer.rows, iterations: 600) { _ in }
      let learned = try solver.error(of: layer.snapped(result.isUp), rows: layer.rows)
      #expect(learned < 0.8 * (try solver.error(of: layer.nearest, rows: layer.rows)))
      outcomes.append(result.isUp)
    }
    #expect(outcomes[0] == outcomes[1] && outcomes[0] == outcomes[2])
  }

  @Test func rowsThatNeverCameLeaveNoGaps() throws {
    let layout = RowLayout(groups: 1, outputsPerGroup: 1, columns: 1)
    for bytes in [0, 1 << 20] {
      let rows = try ReconstructionRows(layout, capacity: 50, maximumBytes: bytes, seed: 4)
      for number in 0..<20 {
        var row = [Float](repeating: 0, count: rows.stride)
        row[0] = Float(number)
        try rows.append(row)
      }
      try rows.finish()
      var seen: [[Float]] = []
      for row in 0..<rows.count { rows.copy(row, into: &seen) }
      let numbers: [Float] = seen.map { $0[0] }
      let expected: [Float] = (0..<20).map { Float($0) }
      #expect(numbers.sorted() == expected)
      #expect(numbers != expected, "rows are shuffled")
    }
  }

  @Test func weightsAtTheEndOfTheGridStay() throws {
    let layer = try Case(
      RowLayout(groups: 1, outputsPerGroup: 4, columns: 8), rows: 100)
    var choices = layer.choices
    choices.step = choices.step.map { _ in 0 }
    let result = try layer.solver().solve(choices, rows: layer.rows, iterations: 50) { _ in }
    #expect(result.firstLoss == result.lastLoss || result.firstLoss > 0)
    let solver = try layer.solver()
    let fixed = layer.choices.start
    #expect(try solver.error(of: fixed, rows: layer.rows) > 0)
  }

  /// Without an activation function, moments of all rows and all rows as one batch are the same
  /// objective: an identity that is written as a clip without ends takes the rows.
  @Test(arguments: layouts.filter { !$0.isDepthwise })
  func momentsOfAllRowsLearnWhatAllRowsTeach(layout: RowLayout) throws {
    let saved = Parallel.maximumThreads
    defer { Parallel.setMaximumThreads(saved) }
    var options = AdaRoundOptions()
    options.batchRows = 2000
    options.rate = 1e-2
    var learned: [AdaRoundSolver.Result] = []
    for (activation, threads) in [
      (FollowingActivation.identity, 2), (.identity, 1),
      (.clip(low: -.infinity, high: .infinity), 2),
    ] {
      Parallel.setMaximumThreads(threads)
      let layer = try Case(layout, rows: 1500, activation: activation, noise: 0.1)
      learned.append(
        try layer.solver(options).solve(layer.choices, rows: layer.rows, iterations: 400) { _ in })
    }
    #expect(learned[0].isUp == learned[1].isUp)
    #expect(learned[0].lastLoss == learned[1].lastLoss)
    // Sums in another order part ways for a weight that ends on the fence.
    let differences = zip(learned[0].isUp, learned[2].isUp).count { $0 != $1 }
    #expect(differences * 50 <= layout.weightCount, "\(differences) of \(layout.weightCount)")
    // Sampled ten times in a tenth instead of always, of a loss that hardly moves at the end.
    expectClose(
      Float(learned[0].lastLoss), Float(learned[2].lastLoss), absolute: 1e-4, relative: 0.02)
    #expect(learned[0].lastLoss < learned[0].firstLoss * 10)
  }

  @Test func cancellingMomentsStops() throws {
    let layer = try Case(RowLayout(groups: 1, outputsPerGroup: 4, columns: 8), rows: 100)
    #expect(try layer.solver().usesMoments)
    var wide = AdaRoundOptions()
    wide.batchRows = 3
    #expect(try !layer.solver(wide).usesMoments)
    #expect(throws: HalfstepError(.cancelled, "enough")) {
      try layer.solver().solve(layer.choices, rows: layer.rows, iterations: 100_000) {
        (share) throws(HalfstepError) in
        if share > 0 { throw HalfstepError(.cancelled, "enough") }
      }
    }
  }

  /// By hand: y = relu(x + b) with weights 1 over x = 1, 2 and −9, wanted relu(x + 0.5): Newton's first
  /// step moves the bias by 0.5, from the two rows that are open.
  @Test func biasGoesWhereTheLossBehindTheActivationIsLeast() throws {
    let layout = RowLayout(groups: 1, outputsPerGroup: 1, columns: 1)
    let rows = try ReconstructionRows(layout, capacity: 3, maximumBytes: 1 << 20, seed: 0)
    for (x, wanted) in [(Float(1), Float(1.5)), (2, 2.5), (-9, 0)] {
      var row = [Float](repeating: 0, count: rows.stride)
      row[0] = x
      row[layout.inputStride] = wanted
      try rows.append(row)
    }
    try rows.finish()
    var solver = try AdaRoundSolver(
      AdaRoundOptions(), layout: layout,
      loss: try ReconstructionLoss(bias: [0], activation: .relu))
    #expect(try solver.error(of: [1], rows: rows) == (0.25 + 0.25) / 3)
    #expect(try solver.refitBias([1], rows: rows) == [0.5])
    #expect(try solver.error(of: [1], rows: rows) == 0)
  }

  @Test func cancellingStops() throws {
    let layer = try Case(
      RowLayout(groups: 1, outputsPerGroup: 4, columns: 8), rows: 100, activation: .relu)
    var calls = 0
    #expect(throws: HalfstepError(.cancelled, "enough")) {
      try layer.solver().solve(layer.choices, rows: layer.rows, iterations: 100_000) {
        (share) throws(HalfstepError) in
        calls += 1
        if share > 0 { throw HalfstepError(.cancelled, "enough") }
      }
    }
    #expect(calls == 2)
  }

  @Test func optionsOutOfRangeThrow() throws {
    func refused(_ change: (inout AdaRoundOptions) -> Void) {
      var options = AdaRoundOptions()
      change(&options)
      #expect(throws: HalfstepError.self) { try options.validate() }
    }
    refused { $0.iterations = 0 }
    refused { $0.regularization = -1 }
    refused { $0.regularization = .nan }
    refused { $0.beta = .init(start: 20, end: 0.5) }
    refused { $0.beta = .init(start: .infinity, end: 2) }
    refused { $0.warmStart = 1 }
    refused { $0.rate = 0 }
    refused { $0.batchRows = 0 }
    #expect(AdaRoundOptions().iterations(bits: 4) == 15_000)
    #expect(AdaRoundOptions().iterations(bits: 8) == 10_000)
    let layer = try Case(RowLayout(groups: 1, outputsPerGroup: 4, columns: 8), rows: 10)
    let empty = try ReconstructionRows(layer.layout, capacity: 5, maximumBytes: 0, seed: 0)
    try empty.finish()
    #expect(throws: HalfstepError.self) {
      try layer.solver().solve(layer.choices, rows: empty, iterations: 1) { _ in }
    }
    #expect(throws: HalfstepError.self) {
      try AdaRoundSolver(
        AdaRoundOptions(), layout: layer.layout,
        loss: ReconstructionLoss(bias: [0], activation: .identity))
    }
  }
}

extension ReconstructionRows {
  /// Appends a copy of one row.
  fileprivate func copy(_ row: Int, into list: inout [[Float]]) {
    let values = try? rows(row, 1) { Array(UnsafeBufferPointer(start: $0, count: stride)) }
    if let values { list.append(values) }
  }
}
