// SPDX-License-Identifier: Apache-2.0
// Fits layers anew to the channels that are left.

import HalfstepGraph
import HalfstepNumerics

/// Fits the weights of layers to the channels that are left: least squares against what each layer
/// computed before, given what the pruned layers in front make of the data.
///
/// Strengths of regularization, which pulls towards the layer's own weights, are chosen on rows that
/// were held out; weights that do not do better there than the old ones are not kept. With few rows a
/// layer therefore stays as it was.
struct ChannelRefit {
  /// What became of a layer.
  struct Fit: Sendable {
    /// The layer's weight with zeros for inputs that go.
    let weight: Tensor
    /// The layer's bias, `[K]`; nil to keep it.
    let bias: [Float]?
    /// Noise over signal on held-out rows when inputs just go.
    let noiseBefore: Double
    /// The same with what was kept; never larger.
    let noiseAfter: Double
  }

  let dependencies: ChannelDependencies
  let data: ReconstructionData

  /// Strengths to choose from, as shares of the moments' mean diagonal, and the one tried first.
  private static let strengths = [1e-4, 1e-3, 1e-2, 0.1, 1, 10]
  private static let firstStrength = 2
  /// Layers with more columns that stay take that strength without a choice.
  private static let widestChoice = 2500

  /// Fits every layer that loses inputs.
  ///
  /// - Parameters:
  ///   - removal: What goes.
  ///   - progress: Receives the share that is done; throws to stop.
  /// - Returns: By position in `dependencies.layers`.
  /// - Throws: What running the network throws; `.nonFiniteValue`.
  func fits(
    _ removal: ChannelRemoval, _ progress: (Double) throws(HalfstepError) -> Void
  ) throws(HalfstepError) -> [Int: Fit] {
    let readers = dependencies.layers.indices.filter { position in
      let layer = dependencies.layers[position]
      return !layer.losesGroups && (layer.inputs ?? []).contains { removal.isRemoved[$0] }
    }
    var result: [Int: Fit] = [:]
    var names = NameAllocator(dependencies.graph)
    try LayerVisits(graph: dependencies.graph, data: data).forEach(
      readers.map { dependencies.layers[$0].stop(dependencies.graph) }, progress
    ) { (position, problem, walk) throws(HalfstepError) in
      let item = dependencies.layers[readers[position]]
      let fit = try fit(item, problem, removal)
      result[readers[position]] = fit
      try walk.commit { (graph) throws(HalfstepError) in
        problem.layer.setWeight(fit.weight, in: &graph, walk.index, names: &names)
        if let bias = fit.bias {
          try problem.layer.setBias(bias, in: &graph, walk.index, names: &names)
        }
      }
    }
    return result
  }

  private func fit(
    _ item: ChannelDependencies.Layer, _ problem: LayerProblem, _ removal: ChannelRemoval
  ) throws(HalfstepError) -> Fit {
    let layout = problem.layer.layout
    let inputs = (item.inputs ?? []).map { removal.isRemoved[$0] }
    var masked = try Self.matrices(problem.weight, layout)
    for group in masked.indices {
      for index in masked[group].indices {
        let channel = index % layout.columns / layout.spatial
        if inputs[group * layout.inputsPerGroup + channel] { masked[group][index] = 0 }
      }
    }
    let plain = try Self.tensor(masked, problem.weight.shape, layout)
    let heldOut = try problem.heldOut()
    let before = try heldOut.noise(weight: plain, bias: nil)
    var best = Fit(weight: plain, bias: nil, noiseBefore: before, noiseAfter: before)
    if item.isWide || heldOut.count == 0 { return best }
    let statistics = try GramRounding.statistics(of: problem)
    if statistics.count == 0 { return best }
    let full = try Self.matrices(problem.weight, layout)

    /// Takes weights with the bias that goes with them if they do better.
    func attempt(_ matrices: [[Float]]) throws(HalfstepError) -> Bool {
      let weight = try Self.tensor(matrices, problem.weight.shape, layout)
      let bias =
        problem.canChangeBias ? Self.bias(problem, statistics, from: full, to: matrices) : nil
      let noise = try heldOut.noise(weight: weight, bias: bias)
      guard noise < best.noiseAfter else { return false }
      best = Fit(
        weight: weight, bias: bias?.map { Float($0) }, noiseBefore: before, noiseAfter: noise)
      return true
    }
    if problem.canChangeBias { _ = try attempt(masked) }
    let systems = try masked.indices.map { group throws(HalfstepError) in
      try System(
        statistics, group: group, isCentered: problem.canChangeBias, full: full[group],
        columns: (0..<layout.columns).filter {
          !inputs[group * layout.inputsPerGroup + $0 / layout.spatial]
        })
    }
    /// Whether a strength does better than what is known.
    func attempt(strength: Double) throws(HalfstepError) -> Bool {
      var matrices = masked
      for (group, system) in systems.enumerated() {
        guard try system.addChange(to: &matrices[group], strength: strength) else { return false }
      }
      return try attempt(matrices)
    }
    // Held-out noise has one minimum along the list, near enough.
    let isWide = (systems.map(\.columns.count).max() ?? 0) > Self.widestChoice
    var isBetter = try attempt(strength: Self.strengths[Self.firstStrength])
    if isWide { return best }
    for strength in Self.strengths[(Self.firstStrength + 1)...] {
      let isBetterStill = try attempt(strength: strength)
      if !isBetterStill && isBetter { break }
      isBetter = isBetter || isBetterStill
    }
    for strength in Self.strengths[..<Self.firstStrength].reversed() {
      if try !attempt(strength: strength) { break }
    }
    return best
  }

  /// The normal equations of a group.
  private struct System {
    /// Columns that stay.
    let columns: [Int]
    private let width: Int
    /// Moments of the columns that stay.
    private let gram: [Double]
    /// What the old weights of these columns leave unexplained, `[outputs, columns]`.
    private let right: [Double]
    private let mean: Double

    init(
      _ statistics: GramStatistics, group: Int, isCentered: Bool, full: [Float], columns: [Int]
    ) throws(HalfstepError) {
      self.columns = columns
      let n = statistics.columns
      let m = columns.count
      width = n
      let all = statistics.gram(group: group, isCentered: isCentered)
      let cross = statistics.cross(group: group, isCentered: isCentered)
      var isKept = [Bool](repeating: false, count: n)
      for column in columns { isKept[column] = true }
      // The target is w·(x + d); the columns that stay give w·x for themselves.
      var sources = [Double](repeating: 0, count: n * m)
      for row in 0..<n {
        for (place, column) in columns.enumerated() {
          let own = cross[row * n + column] + (isKept[row] ? 0 : all[row * n + column])
          sources[row * m + place] = own
        }
      }
      let outputs = full.count / n
      right = try LAPACK.onOneThread { () throws(HalfstepError) in
        Matrix.product(
          Matrix(rows: m, columns: n, values: sources),
          Matrix(rows: n, columns: outputs, values: full.map { Double($0) })
        ).values
      }
      var small = [Double](repeating: 0, count: m * m)
      for (row, from) in columns.enumerated() {
        for (column, source) in columns.enumerated() {
          small[row * m + column] = all[from * n + source]
        }
      }
      gram = small
      mean = (0..<m).reduce(0) { $0 + small[$1 * m + $1] } / Double(max(m, 1))
    }

    /// Adds to a group's weights what regularized least squares changes; false if there is nothing to
    /// learn from.
    func addChange(to matrix: inout [Float], strength: Double) throws(HalfstepError) -> Bool {
      let m = columns.count
      guard m > 0, mean > 0, mean.isFinite else { return false }
      var system = gram
      for row in 0..<m { system[row * m + row] += strength * mean }
      let factor: CholeskyFactor
      do throws(HalfstepError) {
        factor = try CholeskyFactor(system, size: m)
      } catch {
        if error.code == .numericFailure { return false }
        throw error
      }
      var change = right
      factor.solve(rows: &change)
      guard change.allSatisfy(\.isFinite) else { return false }
      for output in 0..<change.count / m {
        for (place, column) in columns.enumerated() {
          let index = output * width + column
          matrix[index] = Float(Double(matrix[index]) + change[output * m + place])
        }
      }
      return matrix.allSatisfy(\.isFinite)
    }
  }

  // MARK: Parts

  private static func matrices(
    _ weight: Tensor, _ layout: WeightLayout
  ) throws(HalfstepError) -> [[Float]] {
    try weight.withFloats { (values) throws(HalfstepError) in
      (0..<layout.groups).map { layout.matrix(of: values, group: $0) }
    }
  }

  private static func tensor(
    _ matrices: [[Float]], _ shape: Shape, _ layout: WeightLayout
  ) throws(HalfstepError) -> Tensor {
    var result = try Tensor(uninitialized: .float32, shape: shape)
    try result.withMutableFloats { (values) throws(HalfstepError) in
      for (group, matrix) in matrices.enumerated() {
        layout.store(matrix, group: group, into: values)
      }
    }
    return result
  }

  /// The bias that takes what new weights do to the means.
  private static func bias(
    _ problem: LayerProblem, _ statistics: GramStatistics, from full: [[Float]],
    to matrices: [[Float]]
  ) -> [Double] {
    let layout = problem.layer.layout
    var bias = problem.bias
    for group in matrices.indices {
      let mean = statistics.mean(group: group)
      let shift = statistics.differenceMean(group: group)
      for row in 0..<layout.outputsPerGroup {
        var sum = 0.0
        for column in 0..<layout.columns {
          let index = row * layout.columns + column
          sum += Double(full[group][index]) * (mean[column] + shift[column])
          sum -= Double(matrices[group][index]) * mean[column]
        }
        bias[group * layout.outputsPerGroup + row] += problem.alpha * sum
      }
    }
    return bias
  }
}
