// SPDX-License-Identifier: Apache-2.0
// Rounds a layer with linear algebra on the second moments of its input.

import HalfstepGraph
import HalfstepNumerics

/// Rounds a layer with linear algebra on the second moments of its input; no gradients, no labels.
///
/// Moments of sampled rows, a target corrected for the quantized prefix, scales searched and refit in
/// the metric of the Gram matrix, error feedback and descent (`GramSolver`), and a bias that takes the
/// means. Strengths of shrinkage are chosen on held-out rows; with them, the layer is rounded again by
/// the moments of all rows.
package struct GramRounding: LayerRounder, Sendable {
  /// Strengths of shrinkage, in units of the Gram matrix's mean diagonal.
  package struct Shrinkage: Hashable, Sendable {
    /// Of the Gram matrix.
    package var gram: Double
    /// Of the correction of the target.
    package var correction: Double

    package init(_ gram: Double, _ correction: Double) {
      self.gram = gram
      self.correction = correction
    }
  }

  package struct Options: Sendable {
    /// Shrinkages to choose from, ascending: of the Gram matrix, and of the correction of the target.
    package var shrinkages: [Shrinkage] = [
      Shrinkage(0.003, 0.01), Shrinkage(0.01, 0.05), Shrinkage(0.05, 0.3), Shrinkage(0.2, 1.5),
      Shrinkage(0.8, 6),
    ]
    /// The shrinkage that is tried first; its neighbors follow as long as they do better.
    package var firstShrinkage = 1
    /// Whether, with the shrinkages chosen, the layer is rounded anew with the held-out rows among those
    /// that it learns from: of small data, a fifth more.
    package var refitsOnAllRows = true
    /// Rows that a layer learns from at least, if there are as many; 16 for each column if that is more.
    package var rows = 24_000
    /// Layers whose weight has more columns than this take that shrinkage without a choice.
    package var widestChoice = 2500
    /// Times that scales are refit, each followed by descent.
    package var passes = 3
    /// Sweeps of descent in a pass.
    package var sweeps = 2
    /// Codes that the search of a short row tries at most.
    package var nodes = 4000
    /// Whether a weight may only go to one of its two neighbors on the grid, as in AdaRound.
    package var isFloorOrCeil = false
    /// Whether the bias takes what rounding does to the means.
    package var correctsBias = true
    /// Whether the target is the float layer on the float network's input.
    package var correctsTarget = true

    package init() {}
  }

  package var options: Options
  package init(options: Options = Options()) { self.options = options }

  package var identity: String? { "Gram rounding \(options)" }

  package func round(_ problem: LayerProblem) throws(HalfstepError) -> LayerRounding {
    var moments = try LayerMoments(problem, withTarget: options.correctsTarget)
    try moments.add(problem, isHeldOut: false, rows: options.rows)
    guard let choice = try choose(problem, moments) else {
      return LayerRounding(
        weight: try problem.nearest.fakeQuantize(problem.weight), encoding: problem.nearest,
        note: "nearest")
    }
    // A single piece has no rows of its own to validate on that more could be learned from.
    guard options.refitsOnAllRows, problem.chunkCount > 1 else { return choice.rounding }
    // Nor does a wide layer that has seen many rows gain by what it costs.
    let columns = problem.layer.layout.columns
    if columns > options.widestChoice, moments.count >= 6 * columns { return choice.rounding }
    try moments.add(problem, isHeldOut: true, rows: options.rows)
    var rounding = try solve(
      problem.weights, moments, shrinkage: choice.shrinkage, note: choice.rounding.note)
    rounding.heldOutNoise = choice.noise
    return rounding
  }

  /// Finds the shrinkages with the least noise on held-out rows.
  private func choose(
    _ problem: LayerProblem, _ moments: LayerMoments
  ) throws(HalfstepError) -> (rounding: LayerRounding, noise: Double, shrinkage: Shrinkage)? {
    let weights = problem.weights
    let isWide = problem.layer.layout.columns > options.widestChoice
    var best: (rounding: LayerRounding, noise: Double, shrinkage: Shrinkage)?
    var attempts = 0
    func attempt(_ shrinkage: Shrinkage) throws(HalfstepError) -> Bool {
      let rounding: LayerRounding
      do throws(HalfstepError) {
        rounding = try solve(weights, moments, shrinkage: shrinkage, note: Self.note(shrinkage))
      } catch {
        // Moments whose means dwarf what is around them may need more on the diagonal.
        if error.code == .numericFailure { return best == nil }
        throw error
      }
      let noise = try problem.noise(of: rounding)
      let isBetter = best.map { noise < $0.noise } ?? true
      if isBetter { best = (rounding, noise, shrinkage) }
      attempts += 1
      try problem.progress(min(0.3 + 0.1 * Double(attempts), 0.9))
      return isBetter
    }
    // Held-out noise has one minimum along the list, near enough.
    var isRising = true
    for shrinkage in options.shrinkages.dropFirst(options.firstShrinkage)
    where isRising && (best == nil || !isWide) {
      isRising = try attempt(shrinkage)
    }
    if isWide { return best }
    if let first = options.shrinkages.dropFirst(options.firstShrinkage).first,
      best?.rounding.note == Self.note(first)
    {
      for shrinkage in options.shrinkages.prefix(options.firstShrinkage).reversed() {
        if !(try attempt(shrinkage)) { break }
      }
    }
    return best
  }

  private static func note(_ shrinkage: Shrinkage) -> String {
    "gram, shrinkage \(shrinkage.gram)"
  }

  // MARK: Solving

  /// Rounds with given moments and shrinkages.
  func solve(
    _ layer: LayerWeights, _ moments: some RowMoments, shrinkage: Shrinkage, note: String
  ) throws(HalfstepError) -> LayerRounding {
    let layout = layer.layout
    let scales = try LayerScales(layer)
    let isCentered = layer.canChangeBias && options.correctsBias
    let matrices = try layer.weight.withFloats { (values) throws(HalfstepError) in
      (0..<layout.groups).map { layout.matrix(of: values, group: $0) }
    }
    let solvers = try Self.map(layout.groups) { (group) throws(HalfstepError) in
      try GramSolver(
        weight: matrices[group], gram: moments.gram(group: group, isCentered: isCentered),
        surplus: moments.surplus(group: group, isCentered: isCentered), columns: layout.columns,
        shrinkage: shrinkage.gram, correctionShrinkage: shrinkage.correction,
        isFloorOrCeil: options.isFloorOrCeil)
    }
    let searched = try search(solvers, scales, bits: layer.spec.bits)
    try Self.each(solvers) { (group, solver) throws(HalfstepError) in
      let grid = searched.grid(group)
      try solver.begin(solver.feedback(grid).codes, grid)
    }
    try refine(solvers, scales)
    return try assemble(layer, moments, scales, solvers, matrices, note)
  }

  /// Alternates scale refits and descent, then searches short rows.
  private func refine(
    _ solvers: [GramSolver], _ scales: LayerScales
  ) throws(HalfstepError) {
    for pass in 0..<max(options.passes, 1) {
      if pass > 0 && !options.isFloorOrCeil { try refit(solvers, scales) }
      try Self.each(solvers) { (_, solver) throws(HalfstepError) in
        if solver.columns <= GramSolver.searchLimit {
          try solver.search(nodes: options.nodes)
        }
        try solver.descend(sweeps: options.sweeps)
      }
    }
  }

  private func refit(
    _ solvers: [GramSolver], _ scales: LayerScales
  ) throws(HalfstepError) {
    guard scales.blocks == 1 else {
      for solver in solvers { try solver.refitBlocks() }
      return
    }
    var numerators = [Double](repeating: 0, count: scales.scaleCount)
    var denominators = numerators
    for (group, solver) in solvers.enumerated() {
      for (row, sums) in try solver.refitSums().enumerated() {
        let index = scales.index(group, row, 0)
        numerators[index] += sums.numerator
        denominators[index] += sums.denominator
      }
    }
    for (group, solver) in solvers.enumerated() {
      guard var grid = solver.currentGrid else { continue }
      for row in 0..<solver.rowCount {
        let index = scales.index(group, row, 0)
        guard denominators[index] > 0 else { continue }
        let old = grid.scales[row]
        let next = Float(Double(old) + numerators[index] / denominators[index])
        // Steps of this size mean that the row is numerically dead.
        if next > 0.5 * old && next < 2 * old { grid.scales[row] = next }
      }
      try solver.rescale(grid.scales)
    }
  }

  /// Chooses scales by what feedback makes of them.
  private func search(
    _ solvers: [GramSolver], _ scales: LayerScales, bits: Int
  ) throws(HalfstepError) -> LayerScales {
    var chosen = [Float](repeating: 1, count: scales.scaleCount)
    var least = [Double](repeating: .infinity, count: scales.scaleCount)
    // Fewer bits clip more.
    let lowest: Float = [2: 0.25, 3: 0.35, 4: 0.42, 5: 0.5, 6: 0.6][bits] ?? 0.75
    let steps = 10
    func attempt(_ factor: (Int) -> Float) throws(HalfstepError) {
      let candidate = scales.scaled(factor)
      var costs = [Double](repeating: 0, count: scales.scaleCount)
      let found = try Self.map(solvers.count) { (group) throws(HalfstepError) in
        let grid = candidate.grid(group)
        return grid.blocks == 1
          ? solvers[group].feedback(grid).costs : solvers[group].diagonalCosts(grid)
      }
      for (group, own) in found.enumerated() {
        for (index, cost) in own.enumerated() {
          costs[scales.index(group, index / scales.blocks, index % scales.blocks)] += cost
        }
      }
      for index in costs.indices where costs[index] < least[index] {
        least[index] = costs[index]
        chosen[index] = factor(index)
      }
    }
    for step in 0...steps {
      let factor = lowest + (1.05 - lowest) * Float(step) / Float(steps)
      try attempt { _ in factor }
    }
    let half = (1.05 - lowest) / Float(2 * steps)
    let centers = chosen
    for offset in [-half, half] { try attempt { centers[$0] + offset } }
    let factors = chosen
    return scales.scaled { factors[$0] }
  }

  /// Puts codes, scales and means together.
  private func assemble(
    _ layer: LayerWeights, _ moments: some RowMoments, _ scales: LayerScales,
    _ solvers: [GramSolver], _ matrices: [[Float]], _ note: String
  ) throws(HalfstepError) -> LayerRounding {
    let layout = layer.layout
    var weight = try Tensor(uninitialized: .float32, shape: layer.weight.shape)
    var bias = layer.bias
    var final = scales
    for (group, solver) in solvers.enumerated() {
      let rounded = solver.result()
      try weight.withMutableFloats { (values) throws(HalfstepError) in
        layout.store(rounded, group: group, into: values)
      }
      if let grid = solver.currentGrid { final.take(grid, group) }
      let mean = moments.mean(group: group)
      let missing = moments.surplusMean(group: group)
      for row in 0..<solver.rowCount {
        var sum = missing?[row] ?? 0
        for column in 0..<layout.columns {
          let index = row * layout.columns + column
          sum += (Double(matrices[group][index]) - Double(rounded[index])) * mean[column]
        }
        bias[group * layout.outputsPerGroup + row] += layer.alpha * sum
      }
    }
    let encoding = try final.encoding()
    let changesBias = options.correctsBias && layer.canChangeBias
    return LayerRounding(
      // What the encoding makes of the weights, to the last bit.
      weight: try encoding.fakeQuantize(weight), encoding: encoding,
      bias: changesBias ? bias.map { Float($0) } : nil, note: note)
  }

  // MARK: Loops

  /// Maps groups: many on all threads, few one after the other.
  private static func map<Result>(
    _ count: Int, _ body: (Int) throws(HalfstepError) -> Result
  ) throws(HalfstepError) -> [Result] {
    var results = [Swift.Result<Result, HalfstepError>?](repeating: nil, count: count)
    results.withUnsafeMutableBufferPointer { results in
      nonisolated(unsafe) let results = results
      if count < 4 {
        for index in 0..<count {
          results[index] = attempt { () throws(HalfstepError) in try body(index) }
        }
      } else {
        Parallel.forEachRange(count, grain: 1) { _, range in
          for index in range {
            results[index] = attempt { () throws(HalfstepError) in try body(index) }
          }
        }
      }
    }
    var values: [Result] = []
    for case let result? in results { values.append(try result.get()) }
    return values
  }

  private static func each(
    _ solvers: [GramSolver], _ body: (Int, GramSolver) throws(HalfstepError) -> Void
  ) throws(HalfstepError) {
    _ = try map(solvers.count) { (index) throws(HalfstepError) in try body(index, solvers[index]) }
  }

  private static func attempt<Result>(
    _ body: () throws(HalfstepError) -> Result
  ) -> Swift.Result<Result, HalfstepError> {
    do throws(HalfstepError) { return .success(try body()) } catch { return .failure(error) }
  }
}
