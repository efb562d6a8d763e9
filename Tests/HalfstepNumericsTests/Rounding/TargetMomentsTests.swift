// SPDX-License-Identifier: Apache-2.0
// Moments of wanted outputs: against sums in double, panels, threads, errors; and what the solver does.

import HalfstepNumerics
import TestSupport
import Testing

@Suite struct TargetMomentsTests {
  private static let (groups, outputs, columns, count) = (2, 3, 5, 40)

  /// Rows `[groups, columns, count]` and targets `[groups, outputs, count]`.
  private static func data() -> (rows: [Float], targets: [Float]) {
    var random = SeededGenerator(seed: 5)
    return (
      random.floats(groups * columns * count, in: -1...2),
      random.floats(groups * outputs * count, in: 0...1)
    )
  }

  private static func moments(panel: Int) throws -> TargetMoments {
    let (rows, targets) = data()
    var moments = TargetMoments(groups: groups, outputs: outputs, columns: columns)
    func part(_ values: [Float], _ start: Int, _ size: Int) -> [Float] {
      stride(from: 0, to: values.count, by: count).flatMap {
        values[$0 + start..<$0 + start + size]
      }
    }
    for start in stride(from: 0, to: count, by: panel) {
      let size = min(panel, count - start)
      try moments.add(
        rows: part(rows, start, size), targets: part(targets, start, size), count: size)
    }
    return moments
  }

  @Test(arguments: [40, 16])
  func momentsAreMeansOfProducts(panel: Int) throws {
    let (rows, targets) = Self.data()
    let moments = try Self.moments(panel: panel)
    #expect(moments.count == Self.count)
    for group in 0..<Self.groups {
      let means = (0..<Self.columns).map { column in
        (0..<Self.count).reduce(0.0) {
          $0 + Double(rows[(group * Self.columns + column) * Self.count + $1])
        } / Double(Self.count)
      }
      let plain = moments.moments(group: group, centeredOn: nil)
      let centered = moments.moments(group: group, centeredOn: means)
      for output in 0..<Self.outputs {
        let target = (group * Self.outputs + output) * Self.count
        var mean = 0.0
        for row in 0..<Self.count { mean += Double(targets[target + row]) / Double(Self.count) }
        #expect(abs(moments.mean(group: group)[output] - mean) < 1e-12)
        for column in 0..<Self.columns {
          let input = (group * Self.columns + column) * Self.count
          var sum = 0.0
          for row in 0..<Self.count {
            sum += Double(targets[target + row]) * Double(rows[input + row])
          }
          // Sums of 40 products below 2 in float: 40 · 80 · 2⁻²⁴ at most, over 40.
          let place = output * Self.columns + column
          #expect(abs(plain[place] - sum / Double(Self.count)) < 1e-5)
          #expect(
            abs(centered[place] - (sum / Double(Self.count) - mean * means[column])) < 1e-5)
        }
      }
    }
  }

  @Test func threadsDoNotMatterAndShortListsAreRefused() throws {
    let saved = Parallel.maximumThreads
    defer { Parallel.setMaximumThreads(saved) }
    let results = try [1, 2].map { threads in
      Parallel.setMaximumThreads(threads)
      return try Self.moments(panel: 16).moments(group: 1, centeredOn: nil)
    }
    #expect(results[0] == results[1])
    var moments = TargetMoments(groups: 1, outputs: 2, columns: 3)
    #expect(throws: HalfstepError(.shapeMismatch, "moments of a target: fewer than 1 rows")) {
      try moments.add(rows: [1, 2, 3], targets: [1], count: 1)
    }
  }

  /// By hand: one column with E x² = 4, weight 1, and a wanted surplus e with E e·x = 2: least squares
  /// adds 2 / 4, so that the target is 1.5, which a grid of steps of 0.5 holds.
  @Test func solverAimsAtProductAndSurplus() throws {
    let solver = try GramSolver(
      weight: [1], gram: [4], surplus: [2], columns: 1, shrinkage: 1e-9,
      correctionShrinkage: 1e-9)
    let grid = RoundingGrid(blockColumns: 1, blocks: 1, scales: [0.5], low: [-8], high: [7])
    try solver.begin(solver.feedback(grid).codes, grid)
    #expect(solver.result() == [1.5])
  }
}
