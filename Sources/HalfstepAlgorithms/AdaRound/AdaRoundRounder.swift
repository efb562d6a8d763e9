// SPDX-License-Identifier: Apache-2.0
// AdaRound as a method of layerwise rounding.

import HalfstepGraph
import HalfstepNumerics

/// AdaRound by gradient descent, from rounding to nearest or from another method's result.
///
/// Grids stay as they are: those of `LayerProblem.nearest`, or what the first method chose. From
/// another method's codes, each weight may stay or move to the neighbor on the side to which the loss
/// falls, and the bias follows. The result is compared with where it began on held-out rows, behind the activation
/// function, and the better is handed on.
package struct AdaRoundRounder: LayerRounder {
  package var options: AdaRoundOptions
  /// The method whose result is refined; nil for the float weights on the nearest grid.
  package var start: (any LayerRounder)?
  /// Refinement is left out where the first method's noise over signal, behind the activation
  /// function, is not above this.
  package var tolerance: Double
  /// How far from its code a weight begins when another method's result is refined, 0...1/2 of a step.
  package var softness: Float = 0.2
  /// When and how another method's result is refined.
  package var refinement = Refinement()

  package init(
    options: AdaRoundOptions = AdaRoundOptions(), start: (any LayerRounder)? = nil,
    tolerance: Double = 0
  ) {
    self.options = options
    self.start = start
    self.tolerance = tolerance
  }

  package var identity: String? {
    let own = "AdaRound \(options) \(tolerance) \(softness) \(refinement)"
    guard let start else { return own }
    return start.identity.map { "\(own) from \($0)" }
  }

  package func round(_ problem: LayerProblem) throws(HalfstepError) -> LayerRounding {
    try options.validate()
    let first: LayerRounding
    if let start {
      first = try start.round(problem)
    } else {
      first = LayerRounding(
        weight: try problem.nearest.fakeQuantize(problem.weight), encoding: problem.nearest,
        note: "nearest")
    }
    if start != nil, !(refinement.admits(problem)) { return first }
    let layout = RowLayout(
      groups: problem.layer.layout.groups, outputsPerGroup: problem.layer.layout.outputsPerGroup,
      columns: problem.layer.layout.columns)
    let grid = try WeightPositions(problem, layout, first.encoding)
    let bias = first.bias ?? problem.bias.map { Float($0) }
    var own = options
    own.batchRows = min(own.batchRows, try batchLimit(problem))
    var solver = try AdaRoundSolver(
      own, layout: layout,
      loss: try ReconstructionLoss(bias: bias, activation: problem.following))
    let heldOut = try rows(problem, solver, isHeldOut: true)
    let startError = try solver.error(of: try grid.ordered(first.weight), rows: heldOut)
    if start != nil, startError <= tolerance * (try signal(heldOut)) { return first }

    let training = try rows(problem, solver, isHeldOut: false)
    guard training.count > 0 else { return first }
    if start != nil {
      return try refined(
        problem, first, &solver, grid, training: training, heldOut: heldOut, startError: startError)
    }
    let choices = try grid.choices(code: nil, slopes: nil, softness: softness)
    let result = try solver.solve(
      choices.soft, rows: training, iterations: options.iterations(bits: first.encoding.bits)
    ) { (share) throws(HalfstepError) in try problem.progress(share) }
    let weight = try grid.snapped(choices, result.isUp)
    let error = try solver.error(of: try grid.ordered(weight), rows: heldOut)
    if error > startError { return first }
    return LayerRounding(
      weight: weight, encoding: first.encoding, bias: first.bias,
      note: "adaround")
  }

  // MARK: Rows

  /// Rows of the samples that a batch may have.
  private func batchLimit(_ problem: LayerProblem) throws(HalfstepError) -> Int {
    let input = try problem.inputs(0).reference
    let rows = try problem.unfolding(input.shape).rowCount
    return AdaRoundOptions.batchSamples * max(rows / max(problem.sampleCount(0), 1), 1)
  }

  /// Rows to learn from or to validate on, with the float layer's outputs.
  private func rows(
    _ problem: LayerProblem, _ solver: AdaRoundSolver, isHeldOut: Bool
  ) throws(HalfstepError) -> ReconstructionRows {
    let layout = solver.layout
    let limit = isHeldOut ? problem.options.heldOutRows : refinement.rowLimit(problem)
    // Pieces round their shares up.
    let rows = try ReconstructionRows(
      layout, capacity: limit + problem.chunkCount,
      maximumBytes: problem.options.maximumBytes / 2, seed: options.seed)
    let weight = try WeightPositions.matrices(problem)
    let alpha = Float(problem.alpha)
    let bias = problem.bias.map { Float($0) }
    for chunk in 0..<problem.chunkCount {
      if problem.chunkCount > 1, problem.isHeldOut(chunk) != isHeldOut { continue }
      try problem.progress(0)
      try problem.forEachPanel(chunk, limit: limit, isHeldOut: isHeldOut) {
        (panel) throws(HalfstepError) in
        let wanted = try problem.layer.layout.products(
          weight, panel.reference, count: panel.count)
        try append(panel, to: rows, solver.loss, wanted: wanted, alpha: alpha, bias: bias)
      }
    }
    try rows.finish()
    return rows
  }

  private func append(
    _ panel: LayerProblem.Panel, to rows: ReconstructionRows, _ loss: ReconstructionLoss,
    wanted: [Float], alpha: Float, bias: [Float]
  ) throws(HalfstepError) {
    let layout = rows.layout
    let (columns, count) = (layout.columns, panel.count)
    // Some rows at a time, so that what is read along columns stays in the cache.
    let block = 32
    var records = [Float](repeating: 0, count: block * rows.stride)
    for begin in stride(from: 0, to: count, by: block) {
      let end = min(begin + block, count)
      for group in 0..<layout.groups {
        for column in 0..<columns {
          let from = (group * columns + column) * count
          let to = layout.inputIndex(group: group, column: column)
          for row in begin..<end {
            records[(row - begin) * rows.stride + to] = panel.quantized[from + row] * alpha
          }
        }
      }
      for channel in 0..<layout.outputs {
        for row in begin..<end {
          records[(row - begin) * rows.stride + layout.inputStride + channel] =
            wanted[channel * count + row] * alpha + bias[channel]
        }
      }
      try records.withUnsafeMutableBufferPointer { (records) throws(HalfstepError) in
        guard let base = records.baseAddress else { return }
        for row in 0..<end - begin {
          let record = base + row * rows.stride
          let target = record + layout.inputStride
          // Lanes beyond the channels hold what the function made of them in the row before.
          for lane in layout.outputs..<layout.outputStride { target[lane] = 0 }
          loss.activate(target)
          try rows.append(record)
        }
      }
    }
  }

  /// Power of the wanted outputs around their means, per row.
  private func signal(_ rows: ReconstructionRows) throws(HalfstepError) -> Double {
    let layout = rows.layout
    var sums = [Double](repeating: 0, count: layout.outputs)
    var squares = sums
    for row in 0..<rows.count {
      try rows.rows(row, 1) { (record) throws(HalfstepError) in
        for channel in 0..<layout.outputs {
          let value = Double(record[layout.inputStride + channel])
          sums[channel] += value
          squares[channel] += value * value
        }
      }
    }
    let count = Double(max(rows.count, 1))
    return zip(sums, squares).reduce(0) { $0 + max($1.1 - $1.0 * $1.0 / count, 0) } / count
  }
}

/// Where the weights of a layer lie in the solver's order, and on which grids.
struct WeightPositions {
  let layout: RowLayout
  let encoding: Encoding
  private let weight: Tensor
  /// For each place of the solver's order the position in the weight tensor; −1 for padding.
  private let positions: [Int32]
  /// Group of scales of each element of the weight tensor.
  private let groups: [Int32]

  /// Choices, and the lower codes less the zero point that belong to them.
  struct Choices {
    var soft: RoundingChoices
    var lower: [Float]
    /// Whether the upper code is on the grid.
    var canRise: [Bool]
  }

  init(
    _ problem: LayerProblem, _ layout: RowLayout, _ encoding: Encoding
  ) throws(HalfstepError) {
    self.layout = layout
    self.encoding = encoding
    weight = problem.weight
    let weightLayout = problem.layer.layout
    let numbers = (0..<Int32(clamping: problem.weight.count)).map { $0 }
    var positions = [Int32](repeating: -1, count: layout.weightCount)
    numbers.withUnsafeBufferPointer { numbers in
      for group in 0..<layout.groups {
        let matrix = weightLayout.matrix(of: numbers, group: group)
        for output in 0..<layout.outputsPerGroup {
          for column in 0..<layout.columns {
            let place = layout.weightIndex(
              output: group * layout.outputsPerGroup + output, column: column)
            positions[place] = matrix[output * layout.columns + column]
          }
        }
      }
    }
    self.positions = positions
    groups = try Self.scaleGroups(encoding.granularity, problem.weight.shape)
  }

  /// Group of scales of each element of a tensor.
  static func scaleGroups(
    _ granularity: Granularity, _ shape: Shape
  ) throws(HalfstepError) -> [Int32] {
    let scales = try GroupLayout(granularity, shape: shape)
    var groups = [Int32](repeating: 0, count: shape.elementCount)
    for index in 0..<scales.runCount {
      let run = scales.run(index)
      for element in run.offset..<run.offset + run.count { groups[element] = Int32(run.group) }
    }
    return groups
  }

  /// The float weights as matrices, `[groups, outputsPerGroup, columns]`.
  static func matrices(_ problem: LayerProblem) throws(HalfstepError) -> [Float] {
    let layout = problem.layer.layout
    return try problem.weight.withFloats { (values) throws(HalfstepError) in
      (0..<layout.groups).flatMap { layout.matrix(of: values, group: $0) }
    }
  }

  /// A tensor like the weight, in the solver's order.
  func ordered(_ tensor: Tensor) throws(HalfstepError) -> [Float] {
    try tensor.withFloats { (values) throws(HalfstepError) in
      positions.map { $0 < 0 ? 0 : values[Int($0)] }
    }
  }

  /// Where weights may go.
  ///
  /// - Parameters:
  ///   - code: Weights on the grid from which each may move one step toward its float weight; nil
  ///     for the two codes around the float weight.
  ///   - slopes: Gradient of the loss at those codes, in the solver's order; weights may move against it.
  ///   - softness: How far weights on the grid begin from their codes, in steps.
  func choices(
    code: Tensor?, slopes: [Float]?, softness: Float
  ) throws(HalfstepError) -> Choices {
    let float = try ordered(weight)
    let codes = try code.map { (tensor) throws(HalfstepError) in try ordered(tensor) }
    var start = [Float](repeating: 0, count: positions.count)
    var (step, height, lower) = (start, start, start)
    var canRise = [Bool](repeating: false, count: positions.count)
    for place in positions.indices where positions[place] >= 0 {
      let group = Int(groups[Int(positions[place])])
      let scale = encoding.scales[group]
      let low = Float(encoding.minimumCode - Int(encoding.zeroPoints[group]))
      let high = Float(encoding.maximumCode - Int(encoding.zeroPoints[group]))
      let quotient = float[place] / scale
      let below: Float
      if let codes {
        let current = (codes[place] / scale).rounded(.toNearestOrEven)
        let rises = slopes.map { $0[place] < 0 } ?? (quotient >= current)
        below = rises ? current : current - 1
        height[place] = rises ? softness : 1 - softness
      } else {
        below = quotient.rounded(.down)
        height[place] = quotient - below
      }
      // Beyond the ends of the grid there is no choice.
      lower[place] = min(max(below, low), high)
      canRise[place] = below >= low && below < high
      start[place] = lower[place] * scale
      step[place] = canRise[place] ? scale : 0
    }
    return Choices(
      soft: RoundingChoices(start: start, step: step, height: height), lower: lower,
      canRise: canRise)
  }

  /// Weights on the grid for learned directions, in the shape of the weight.
  func snapped(_ choices: Choices, _ isUp: [Bool]) throws(HalfstepError) -> Tensor {
    var result = try Tensor(uninitialized: .float32, shape: weight.shape)
    try result.withMutableFloats { (values) throws(HalfstepError) in
      for place in positions.indices where positions[place] >= 0 {
        let element = Int(positions[place])
        let code = choices.lower[place] + (isUp[place] && choices.canRise[place] ? 1 : 0)
        values[element] = code * encoding.scales[Int(groups[element])]
      }
    }
    return result
  }
}
