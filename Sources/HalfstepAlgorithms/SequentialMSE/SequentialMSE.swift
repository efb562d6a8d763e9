// SPDX-License-Identifier: Apache-2.0
// Sequential MSE: scales searched for the layer's output, layer after layer.

import HalfstepGraph
import HalfstepNumerics

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// Searches the scales of weights that are rounded to nearest for the least error of the layer's
/// output: `num_candidates` fractions of the min-max range, each channel or block on its own.
///
/// Rounds to nearest, keeps biases. With the quantized prefix on both sides and squared errors, the
/// search runs on Gram matrices; otherwise on the rows themselves.
///
/// Follows "Sequential MSE" of AIMET 2.42 where the options say so; there is no paper.
package struct SequentialMSERounder: LayerRounder {
  package struct Options: Hashable, Sendable {
    /// What is minimized.
    package enum Loss: Hashable, Sendable {
      case meanSquare
      case meanAbsolute
      /// Negative signal-to-noise ratio, in decibels.
      case signalToNoise
    }
    /// Inputs of the float and the rounded layer.
    package enum Symmetry: Hashable, Sendable {
      /// Both with the quantized prefix: "symqt".
      case quantized
      /// Both of the float network: "symfp".
      case float
      /// Each its own: "asym".
      case asymmetric
    }
    /// What a scale that several output channels share is chosen for.
    package enum Sharing: Hashable, Sendable {
      /// The sum of their errors.
      case sum
      /// The channel that wants the largest, as AIMET does.
      case largest
    }

    /// Fractions of the min-max range, k/candidates for k from 1; 1...1000.
    package var candidates = 20
    package var loss: Loss = .meanSquare
    package var symmetry: Symmetry = .quantized
    package var sharing: Sharing = .sum
    /// Whether rows that validate are learned from as well, as AIMET does.
    package var usesAllRows = false

    package init() {}

    /// - Throws: `HalfstepError.invalidArgument` for a number of candidates out of range.
    package func validate() throws(HalfstepError) {
      guard (1...1000).contains(candidates) else {
        throw HalfstepError(
          .invalidArgument, "sequential MSE: expected 1...1000 candidates, got \(candidates)")
      }
    }
  }

  package var options: Options
  package init(options: Options = Options()) { self.options = options }

  package var identity: String? { "sequential MSE \(options)" }

  package func round(_ problem: LayerProblem) throws(HalfstepError) -> LayerRounding {
    try options.validate()
    let base = try Encoding.make(for: problem.weight, spec: problem.spec, scheme: .minMax)
    let candidates = try (1...options.candidates).map { (number) throws(HalfstepError) in
      try base.scaled(by: Double(number) / Double(options.candidates))
    }
    let rounded = try candidates.map { (grid) throws(HalfstepError) in
      try grid.fakeQuantize(problem.weight)
    }
    let parts = try OutputParts(problem, base.granularity)
    let losses = try losses(problem, rounded, parts)
    let best = parts.choose(losses, groups: base.scales.count, options.sharing)
    let encoding = try base.scaled { candidates[best[$0]].scales[$0] }
    return LayerRounding(
      weight: try encoding.fakeQuantize(problem.weight), encoding: encoding, note: "seq-mse")
  }

  // MARK: Losses

  /// Loss of each candidate and part.
  private func losses(
    _ problem: LayerProblem, _ candidates: [Tensor], _ parts: OutputParts
  ) throws(HalfstepError) -> [[Double]] {
    let layout = problem.layer.layout
    let float = try WeightPositions.matrices(problem)
    let trials = try candidates.map { (tensor) throws(HalfstepError) in
      try tensor.withFloats { (values) throws(HalfstepError) in
        (0..<layout.groups).flatMap { layout.matrix(of: values, group: $0) }
      }
    }
    let search = CandidateSearch(
      layout: layout, ranges: parts.ranges, float: float, trials: trials, loss: options.loss)
    let usesGram = options.loss == .meanSquare && options.symmetry != .asymmetric
    var sums = LossSums(candidates: trials.count, parts: parts.count)
    var grams = usesGram ? [Float](repeating: 0, count: search.gramCount) : []
    for chunk in 0..<problem.chunkCount {
      try problem.progress(0.8 * Double(chunk) / Double(problem.chunkCount))
      if !options.usesAllRows, problem.chunkCount > 1, problem.isHeldOut(chunk) { continue }
      try problem.forEachPanel(
        chunk, limit: problem.options.maximumRows, isHeldOut: options.usesAllRows ? nil : false
      ) { (panel) throws(HalfstepError) in
        let tested = options.symmetry == .float ? panel.reference : panel.quantized
        if usesGram {
          try search.addGrams(of: tested, rows: panel.count, to: &grams)
        } else {
          let wanted = options.symmetry == .quantized ? panel.quantized : panel.reference
          try search.add(wanted: wanted, tested: tested, rows: panel.count, to: &sums)
        }
      }
    }
    if usesGram { try search.evaluate(grams, &sums) }
    return sums.values(options.loss)
  }
}

extension Encoding {
  /// The grid over a fraction of the range; zero points stay.
  func scaled(by factor: Double) throws(HalfstepError) -> Encoding {
    try scaled { Float(Double(scales[$0]) * factor) }
  }

  /// The grid with other scales.
  func scaled(_ scale: (Int) -> Float) throws(HalfstepError) -> Encoding {
    try Encoding(
      bits: bits, isSigned: isSigned, isSymmetric: isSymmetric, isStrict: isStrict,
      granularity: granularity,
      scales: scales.indices.map { max(scale($0), .leastNormalMagnitude * 16) },
      zeroPoints: zeroPoints)
  }
}

/// The parts of a layer's weights that have an error of their own: an output channel, or an output
/// channel's block of inputs.
struct OutputParts {
  /// Columns of each block; one that covers all unless scales belong to blocks.
  let ranges: [Range<Int>]
  /// Group of scales of each part, `[outputs, ranges]`.
  private let groups: [Int]

  var count: Int { groups.count }

  /// - Throws: `HalfstepError.invalidArgument` if scales change within a part.
  init(_ problem: LayerProblem, _ granularity: Granularity) throws(HalfstepError) {
    let layout = problem.layer.layout
    if case .perBlock(_, _, let size) = granularity {
      let extent = max(min(size, layout.inputsPerGroup), 1)
      ranges = stride(from: 0, to: layout.inputsPerGroup, by: extent).map {
        $0 * layout.spatial..<min($0 + extent, layout.inputsPerGroup) * layout.spatial
      }
    } else {
      ranges = [0..<layout.columns]
    }
    let elements = try WeightPositions.scaleGroups(granularity, problem.weight.shape)
    var groups: [Int] = []
    for group in 0..<layout.groups {
      let matrix = elements.withUnsafeBufferPointer { layout.matrix(of: $0, group: group) }
      for output in 0..<layout.outputsPerGroup {
        for range in ranges {
          let start = output * layout.columns
          let first = matrix[start + range.lowerBound]
          guard range.allSatisfy({ matrix[start + $0] == first }) else {
            throw HalfstepError(
              .invalidArgument,
              "node '\(problem.node.label)': scales do not belong to output channels or blocks of "
                + "input channels", node: problem.node.label)
          }
          groups.append(Int(first))
        }
      }
    }
    self.groups = groups
  }

  /// The candidate for each group of scales; the first of equals.
  func choose(
    _ losses: [[Double]], groups count: Int, _ sharing: SequentialMSERounder.Options.Sharing
  ) -> [Int] {
    func least(_ loss: (Int) -> Double) -> Int {
      var best = 0
      for candidate in losses.indices where loss(candidate) < loss(best) { best = candidate }
      return best
    }
    if sharing == .largest {
      var best = [Int](repeating: 0, count: count)
      for part in groups.indices {
        best[groups[part]] = max(best[groups[part]], least { losses[$0][part] })
      }
      return best
    }
    var sums = [[Double]](repeating: [Double](repeating: 0, count: count), count: losses.count)
    for candidate in losses.indices {
      for part in groups.indices { sums[candidate][groups[part]] += losses[candidate][part] }
    }
    return (0..<count).map { group in least { sums[$0][group] } }
  }
}

/// Sums over rows that losses are made of.
struct LossSums {
  /// Of squared or absolute errors, by candidate and part.
  var errors: [[Double]]
  /// Of squared outputs of the float layer, by part; the same for all candidates.
  var signal: [Double]
  var rows = 0

  init(candidates: Int, parts: Int) {
    signal = [Double](repeating: 0, count: parts)
    errors = [[Double]](repeating: signal, count: candidates)
  }

  func values(_ loss: SequentialMSERounder.Options.Loss) -> [[Double]] {
    guard loss == .signalToNoise else { return errors }
    let count = Double(max(rows, 1))
    return errors.map { errors in
      zip(errors, signal).map { noise, signal in
        let ratio = signal / count / (noise / count + 1e-10)
        return ratio > 0 ? -10 * log10(ratio) : 0
      }
    }
  }
}
