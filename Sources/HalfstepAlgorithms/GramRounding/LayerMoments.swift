// SPDX-License-Identifier: Apache-2.0
// The sums over a layer's rows that it is rounded by.

import HalfstepGraph
import HalfstepNumerics

/// Second moments of a layer's rows x, seen or expected, and of what its output shall be besides w·x, e.
protocol RowMoments {
  /// Mean of x, `[columns]`.
  func mean(group: Int) -> [Double]
  /// The mean of x·xᵀ, `[columns, columns]`, around the means if they are left to the bias.
  func gram(group: Int, isCentered: Bool) -> [Double]
  /// Mean of e, `[outputs]`; nil for zeros.
  func surplusMean(group: Int) -> [Double]?
  /// The mean of e·xᵀ, `[outputs, columns]`, around the means if they are left to the bias; nil for zeros.
  func surplus(group: Int, isCentered: Bool) -> [Double]?
}

/// Sums over the rows of a layer's data.
///
/// What the output shall be besides w·x is what the float layer makes of how the float network's input
/// differs from the quantized one, w·d, and what the layer has to make up for in a sum. Its moments are as
/// many as weights, where those of d would be as many as columns squared.
struct LayerMoments: RowMoments {
  private var statistics: GramStatistics
  private var target: TargetMoments?
  private let layout: WeightLayout
  /// The float weights, `[groups, outputs, columns]`.
  private let weights: [Float]

  /// Rows seen.
  var count: Int { statistics.count }

  /// Creates empty sums.
  ///
  /// - Parameter withTarget: Whether e is summed, or taken for zero.
  init(_ problem: LayerProblem, withTarget: Bool) throws(HalfstepError) {
    layout = problem.layer.layout
    statistics = try GramStatistics(
      groups: layout.groups, columns: layout.columns, keepsCross: false)
    target =
      withTarget
      ? TargetMoments(
        groups: layout.groups, outputs: layout.outputsPerGroup, columns: layout.columns) : nil
    weights = withTarget ? try WeightPositions.matrices(problem) : []
  }

  /// Adds the rows to learn from, or those to validate on.
  ///
  /// - Parameter rows: Rows that are wanted of many to learn from, or 16 for each column if that is more;
  ///   of each piece to validate on as many as of one to learn from.
  /// - Throws: `HalfstepError.nonFiniteValue` for values that are not finite, or too large to be summed.
  mutating func add(
    _ problem: LayerProblem, isHeldOut: Bool, rows minimum: Int
  ) throws(HalfstepError) {
    var limit = GramRounding.rowLimit(problem, minimum)
    if isHeldOut {
      let pieces = (0..<problem.chunkCount).count { problem.isHeldOut($0) }
      limit = max(limit * pieces / max(problem.chunkCount - pieces, 1), 1)
    }
    var rows = JoinedRows(lines: layout.groups * layout.columns)
    var surpluses = JoinedRows(lines: layout.groups * layout.outputsPerGroup)
    for chunk in 0..<problem.chunkCount {
      if problem.chunkCount > 1, problem.isHeldOut(chunk) != isHeldOut { continue }
      try problem.forEachPanel(
        chunk, limit: limit, isHeldOut: isHeldOut, height: JoinedRows.height
      ) { (panel) throws(HalfstepError) in
        rows.append(panel.quantized, count: panel.count)
        if target != nil {
          let errors = try problem.sumErrors(chunk, panel.rows, panel.unfolding)
          surpluses.append(try surplus(panel, errors), count: panel.count)
        }
        if rows.isLong { try add(&rows, &surpluses) }
      }
      try problem.progress(0.3 * Double(chunk + 1) / Double(problem.chunkCount))
    }
    try add(&rows, &surpluses)
    guard statistics.isFinite, target?.isFinite ?? true else {
      throw GramRounding.nonFiniteInput(problem)
    }
  }

  private mutating func add(
    _ rows: inout JoinedRows, _ surpluses: inout JoinedRows
  ) throws(HalfstepError) {
    let count = rows.count
    let x = rows.take()
    try statistics.add(rows: x, count: count)
    try target?.add(rows: x, targets: surpluses.take(), count: count)
  }

  /// What the output shall be besides w·x, `[groups, outputs, count]`.
  private func surplus(
    _ panel: LayerProblem.Panel, _ sumErrors: [Float]?
  ) throws(HalfstepError) -> [Float] {
    var differences = panel.reference
    for index in differences.indices { differences[index] -= panel.quantized[index] }
    return try layout.products(weights, differences, count: panel.count, adding: sumErrors)
  }

  func mean(group: Int) -> [Double] { statistics.mean(group: group) }

  func gram(group: Int, isCentered: Bool) -> [Double] {
    statistics.gram(group: group, isCentered: isCentered)
  }

  func surplusMean(group: Int) -> [Double]? { target?.mean(group: group) }

  func surplus(group: Int, isCentered: Bool) -> [Double]? {
    target?.moments(group: group, centeredOn: isCentered ? mean(group: group) : nil)
  }
}

/// Rows of several panels, joined to longer ones: sums over many rows at a time cost less memory traffic.
struct JoinedRows {
  /// Rows that sums in float are made of at most: longer ones would be less exact.
  static let height = 1024

  /// Values of a row.
  let lines: Int
  private(set) var count = 0
  private var parts: [(values: [Float], count: Int)] = []

  init(lines: Int) { self.lines = lines }

  /// Whether another panel like the last one might be too much.
  var isLong: Bool { count + (parts.last?.count ?? 0) > Self.height }

  /// Adds a panel, `[lines, count]`.
  mutating func append(_ values: [Float], count: Int) {
    parts.append((values, count))
    self.count += count
  }

  /// Hands over all rows, `[lines, count]`; none are left.
  mutating func take() -> [Float] {
    let (parts, count, lines) = (parts, count, lines)
    self.parts = []
    self.count = 0
    if parts.count == 1 { return parts[0].values }
    return [Float](unsafeUninitializedCapacity: lines * count) { result, filled in
      guard let start = result.baseAddress else { return }
      var first = 0
      for part in parts {
        part.values.withUnsafeBufferPointer { values in
          guard let values = values.baseAddress else { return }
          for line in 0..<lines {
            (start + line * count + first).initialize(
              from: values + line * part.count, count: part.count)
          }
        }
        first += part.count
      }
      filled = lines * count
    }
  }
}

extension GramRounding {
  /// Rows that a layer learns from: many times the unknowns of a row, and enough for narrow layers.
  static func rowLimit(_ problem: LayerProblem, _ minimum: Int) -> Int {
    max(1, min(problem.options.maximumRows, max(minimum, 16 * problem.layer.layout.columns)))
  }

  static func nonFiniteInput(_ problem: LayerProblem) -> HalfstepError {
    HalfstepError(
      .nonFiniteValue,
      "node '\(problem.node.label)': its input holds a NaN, an infinity, or values too large",
      node: problem.node.label)
  }

  /// Sums over the rows that are not held out, as compression needs them.
  ///
  /// - Parameters:
  ///   - keepsCross: Whether the float network's inputs differ from the other network's.
  /// - Throws: `HalfstepError.nonFiniteValue` for values that are not finite, or too large to be summed.
  package static func statistics(
    of problem: LayerProblem, keepsCross: Bool = true
  ) throws(HalfstepError) -> GramStatistics {
    let layout = problem.layer.layout
    var statistics = try GramStatistics(
      groups: layout.groups, columns: layout.columns, keepsCross: keepsCross)
    let limit = rowLimit(problem, 8192)
    var rows = JoinedRows(lines: layout.groups * layout.columns)
    var differences = rows
    func add() throws(HalfstepError) {
      let count = rows.count
      let (x, d) = (rows.take(), differences.take())
      if keepsCross {
        try statistics.add(rows: x, differences: d, count: count)
      } else {
        try statistics.add(rows: x, count: count)
      }
    }
    for chunk in 0..<problem.chunkCount {
      if problem.chunkCount > 1, problem.isHeldOut(chunk) { continue }
      try problem.forEachPanel(chunk, limit: limit, isHeldOut: false, height: JoinedRows.height) {
        (panel) throws(HalfstepError) in
        rows.append(panel.quantized, count: panel.count)
        if keepsCross {
          var own = panel.reference
          for index in own.indices { own[index] -= panel.quantized[index] }
          differences.append(own, count: panel.count)
        }
        if rows.isLong { try add() }
      }
      try problem.progress(0.3 * Double(chunk + 1) / Double(problem.chunkCount))
    }
    try add()
    guard statistics.isFinite else { throw nonFiniteInput(problem) }
    return statistics
  }
}
