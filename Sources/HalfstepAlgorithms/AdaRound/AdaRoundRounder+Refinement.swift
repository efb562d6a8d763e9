// SPDX-License-Identifier: Apache-2.0
// Refines another method's result behind the activation function.

import HalfstepGraph
import HalfstepNumerics

extension AdaRoundRounder {
  /// When and how another method's result is refined.
  package struct Refinement: Hashable, Sendable {
    /// Whether layers without an activation function are refined: for these, the Gram solver has looked
    /// at the same objective.
    package var includesLinear = true
    /// Rows for each column that a layer must have, 0 or more: few rows are learned by heart.
    package var rowsPerColumn = 0
    /// Share by which the error on held-out rows must fall for the result to be kept, 0..<1.
    package var gain = 0.0
    /// Whether a weight may only go to the neighbor on the side of its float weight, which keeps codes that
    /// are its floor or ceiling so.
    package var isTowardFloat = false
    /// Weight of the regularizer as a multiple of the loss per weight at first; nil for the options'.
    package var regularization: Double?

    package init() {}

    /// What pays on calibration data of a few dozen samples, in a small part of what steps by default take.
    package static let brief: Refinement = {
      var refinement = Refinement()
      refinement.includesLinear = false
      refinement.rowsPerColumn = 64
      refinement.gain = 0.02
      refinement.regularization = 1
      return refinement
    }()

    /// Whether a layer may be refined, before its rows are gathered.
    func admits(_ problem: LayerProblem) -> Bool {
      guard includesLinear || problem.following != .identity else { return false }
      return problem.options.maximumRows >= rowsPerColumn * problem.layer.layout.columns
    }

    /// Rows that a layer learns from at most: as many as make its columns admissible, and some
    /// thousands; a brief descent sees each a few times.
    func rowLimit(_ problem: LayerProblem) -> Int {
      let most = problem.options.maximumRows
      if rowsPerColumn == 0 { return most }
      return min(most, max(8192, rowsPerColumn * problem.layer.layout.columns))
    }
  }

  /// The Gram solver everywhere, and where it pays on held-out rows a brief refinement by gradient
  /// descent behind the activation function.
  package static func brief(_ start: GramRounding, seed: UInt64) -> AdaRoundRounder {
    var options = AdaRoundOptions()
    options.iterations = 200
    options.rate = 1e-2
    options.seed = seed
    var rounder = AdaRoundRounder(options: options, start: start)
    rounder.refinement = .brief
    rounder.refinement.isTowardFloat = start.options.isFloorOrCeil
    return rounder
  }

  /// Refines another method's result: the bias, then the codes, then the bias for these.
  func refined(
    _ problem: LayerProblem, _ first: LayerRounding, _ solver: inout AdaRoundSolver,
    _ grid: WeightPositions, training: ReconstructionRows, heldOut: ReconstructionRows,
    startError: Double
  ) throws(HalfstepError) -> LayerRounding {
    if training.count < refinement.rowsPerColumn * solver.layout.columns { return first }
    var best = (rounding: first, error: startError * (1 - refinement.gain))
    var bias = first.bias ?? problem.bias.map { Float($0) }
    var weight = first.weight
    func judge(_ note: String) throws(HalfstepError) {
      let error = try solver.error(of: try grid.ordered(weight), rows: heldOut)
      guard error < best.error else { return }
      let rounding = LayerRounding(
        weight: weight, encoding: first.encoding, bias: problem.canChangeBias ? bias : first.bias,
        note: "\(first.note), \(note)")
      best = (rounding, error)
    }
    func refitBias() throws(HalfstepError) {
      guard problem.canChangeBias else { return }
      let shift = try solver.refitBias(try grid.ordered(weight), rows: training)
      for channel in shift.indices { bias[channel] += shift[channel] }
    }
    try refitBias()
    try judge("bias")
    let codes = try grid.ordered(weight)
    let slopes =
      refinement.isTowardFloat ? nil : try solver.gradient(at: codes, rows: training)
    let choices = try grid.choices(code: weight, slopes: slopes, softness: softness)
    var settings = solver.options
    if let multiple = refinement.regularization {
      let free = choices.canRise.count { $0 }
      let loss = try solver.error(of: codes, rows: training)
      settings.regularization = min(multiple * loss / Double(max(free, 1)), 1e6)
    }
    let learner = try AdaRoundSolver(settings, layout: solver.layout, loss: solver.loss)
    let result = try learner.solve(
      choices.soft, rows: training, iterations: settings.iterations(bits: first.encoding.bits)
    ) { (share) throws(HalfstepError) in try problem.progress(share) }
    weight = try grid.snapped(choices, result.isUp)
    try refitBias()
    try judge("adaround")
    return best.rounding
  }
}
