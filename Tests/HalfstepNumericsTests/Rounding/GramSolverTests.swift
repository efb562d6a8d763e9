// SPDX-License-Identifier: Apache-2.0
// The Gram solver against exhaustive search, its monotony, its statistics, its linear algebra.

import HalfstepNumerics
import TestSupport
import Testing

@Suite(.serialized) struct GramSolverTests {
  /// Correlated rows x and differences d, column by column.
  private func panels(
    _ columns: Int, _ rows: Int, seed: UInt64, groups: Int = 1
  ) -> (x: [Float], d: [Float]) {
    var random = SeededGenerator(seed: seed)
    var x: [Float] = []
    for _ in 0..<groups {
      let common = random.floats(rows)
      for _ in 0..<columns {
        let own = random.floats(rows)
        x += zip(common, own).map { 0.7 * $0 + 0.5 * $1 + 0.2 }
      }
    }
    return (x, random.floats(x.count, in: -0.1...0.1))
  }

  private func statistics(
    _ columns: Int, _ rows: Int, seed: UInt64, groups: Int = 1
  ) throws -> GramStatistics {
    var result = try GramStatistics(groups: groups, columns: columns)
    let (x, d) = panels(columns, rows, seed: seed, groups: groups)
    try result.add(rows: x, differences: d, count: rows)
    return result
  }

  /// `w·D`: what the output shall be besides w·x if the float network's input is x + d.
  private func surplus(_ weight: [Float], _ moments: GramStatistics) -> [Double] {
    let n = moments.columns
    let cross = moments.cross(group: 0, isCentered: true)
    return weight.indices.map { index in
      (0..<n).reduce(0) { $0 + Double(weight[index / n * n + $1]) * cross[$1 * n + index % n] }
    }
  }

  private func grid(_ rows: Int, _ columns: Int, scale: Float, bits: Int) -> RoundingGrid {
    RoundingGrid(
      blockColumns: columns, blocks: 1, scales: [Float](repeating: scale, count: rows),
      low: [Float](repeating: -Float(1 << (bits - 1)), count: rows),
      high: [Float](repeating: Float(1 << (bits - 1)) - 1, count: rows))
  }

  /// `(t − q)·H·(t − q)` in double, from the rows themselves.
  private func cost(_ target: [Double], _ q: [Double], _ h: [Double]) -> Double {
    let n = target.count
    var sum = 0.0
    for i in 0..<n {
      for j in 0..<n { sum += (target[i] - q[i]) * h[i * n + j] * (target[j] - q[j]) }
    }
    return sum
  }

  @Test(arguments: [(3, 2, false), (4, 3, false), (9, 2, false), (12, 2, true)])
  func searchIsExhaustive(_ columns: Int, _ bits: Int, _ isFloorOrCeil: Bool) throws {
    let moments = try statistics(columns, 64, seed: UInt64(columns))
    let gram = moments.gram(group: 0, isCentered: false)
    var random = SeededGenerator(seed: 5)
    let weight = random.floats(columns)
    let scale: Float = bits == 2 ? 0.6 : 0.25
    let solver = try GramSolver(
      weight: weight, gram: gram, surplus: nil, columns: columns, shrinkage: 0.01,
      correctionShrinkage: 1, isFloorOrCeil: isFloorOrCeil)
    let grid = grid(1, columns, scale: scale, bits: bits)
    try solver.begin(solver.feedback(grid).codes, grid)
    try solver.search(nodes: 1 << 22)
    var h = gram
    let mean = (0..<columns).reduce(0) { $0 + gram[$1 * columns + $1] } / Double(columns)
    for i in 0..<columns { h[i * columns + i] += 0.01 * mean }
    let target = weight.map(Double.init)
    let found = cost(target, solver.result().map(Double.init), h)

    // Every combination of codes.
    let choices: [[Int]] = weight.map {
      let (low, high) = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
      if !isFloorOrCeil { return Array(low...high) }
      let scaled = $0 / scale
      return Set([Int(scaled.rounded(.down)), Int(scaled.rounded(.up))])
        .map { min(max($0, low), high) }
    }
    var least = Double.infinity
    var codes = [Int](repeating: 0, count: columns)
    while true {
      let q = (0..<columns).map { Double(scale) * Double(choices[$0][codes[$0]]) }
      least = min(least, cost(target, q, h))
      var digit = 0
      while digit < columns, codes[digit] == choices[digit].count - 1 {
        codes[digit] = 0
        digit += 1
      }
      if digit == columns { break }
      codes[digit] += 1
    }
    // The factor is rounded to float: n² entries of relative error 2⁻²⁴ each, and a margin of 1e-6
    // below which the search does not move.
    #expect(found <= least * (1 + 1e-6 + Double(columns * columns) * 0x1p-23))
    #expect(found >= least * (1 - 1e-12))
    if isFloorOrCeil {
      for (value, w) in zip(solver.result(), weight) where abs(w) < 2 * scale {
        #expect(abs(value - w) < scale)
      }
    }
  }

  @Test(arguments: [1, 4]) func everyStepLowersTheCost(_ blocks: Int) throws {
    let (n, rows) = (48, 20)
    let moments = try statistics(n, 200, seed: 9)
    var random = SeededGenerator(seed: 2)
    let weight = random.floats(rows * n)
    let solver = try GramSolver(
      weight: weight, gram: moments.gram(group: 0, isCentered: true),
      surplus: surplus(weight, moments), columns: n, shrinkage: 0.01, correctionShrinkage: 0.05)
    let count = rows * blocks
    let grid = RoundingGrid(
      blockColumns: n / blocks, blocks: blocks, scales: [Float](repeating: 0.16, count: count),
      low: [Float](repeating: -8, count: count), high: [Float](repeating: 7, count: count))
    let (codes, costs) = solver.feedback(grid)
    try solver.begin(codes, grid)
    var last = solver.costs()
    // Feedback adds its costs up through the factor, 48² products in float.
    for (a, b) in zip(costs, last) { #expect(abs(a - b) <= 48 * 48 * 0x1p-23 * b) }
    let start = last.reduce(0, +)
    for _ in 0..<3 {
      try solver.descend(sweeps: 1)
      let swept = solver.costs()
      for (a, b) in zip(swept, last) { #expect(a <= b * (1 + 1e-5)) }
      if blocks == 1 {
        let sums = try solver.refitSums()
        let scales = zip(solver.currentGrid!.scales, sums).map {
          Float(Double($0) + $1.numerator / $1.denominator)
        }
        try solver.rescale(scales)
      } else {
        try solver.refitBlocks()
      }
      last = solver.costs()
      for (a, b) in zip(last, swept) { #expect(a <= b * (1 + 1e-5)) }
    }
    // Not only never worse: seeds aside, codes and scales of 20 rows cannot all be optimal at once.
    #expect(last.reduce(0, +) < start)
    // Codes stay on the grid.
    let scales = try #require(solver.currentGrid).scales
    let result = solver.result()
    for (index, value) in result.enumerated() {
      let code = value / scales[index / n * blocks + index % n / (n / blocks)]
      #expect(abs(code - code.rounded()) < 1e-4 && (-8.001...7.001).contains(code))
    }
  }

  @Test(arguments: [(5, 1), (33, 1), (200, 1), (9, 7)])
  func momentsAreTheDirectObjective(_ columns: Int, _ groups: Int) throws {
    let rows = 70
    let (x, d) = panels(columns, rows, seed: 4, groups: groups)
    var moments = try GramStatistics(groups: groups, columns: columns)
    try moments.add(rows: x, differences: d, count: rows)
    #expect(moments.count == rows && moments.isFinite)
    var random = SeededGenerator(seed: 8)
    for group in [0, groups - 1] {
      let w = random.floats(columns).map(Double.init)
      let q = random.floats(columns).map(Double.init)
      let base = group * columns * rows
      var direct = 0.0
      var known = 0.0
      for row in 0..<rows {
        var (error, float) = (0.0, 0.0)
        for j in 0..<columns {
          let (a, b) = (Double(x[base + j * rows + row]), Double(d[base + j * rows + row]))
          error += w[j] * (a + b) - q[j] * a
          float += w[j] * b
        }
        direct += error * error / Double(rows)
        known += float * float / Double(rows)
      }
      let g = moments.gram(group: group, isCentered: false)
      let c = moments.cross(group: group, isCentered: false)
      var fromMoments = known
      var magnitude = known
      for i in 0..<columns {
        for j in 0..<columns {
          let terms =
            (w[i] - q[i]) * g[i * columns + j] * (w[j] - q[j])
            + 2 * w[i] * c[i * columns + j] * (w[j] - q[j])
          fromMoments += terms
          magnitude += abs(terms)
        }
      }
      // Panels are summed in float: 70 products of relative error 2⁻²⁴ in every entry.
      #expect(abs(fromMoments - direct) <= 70 * 0x1p-24 * magnitude)
      // Centered moments leave the means out.
      let mean = moments.mean(group: group)
      let centered = moments.gram(group: group, isCentered: true)
      for i in 0..<columns {
        let difference = g[i * columns + i] - centered[i * columns + i]
        #expect(abs(difference - mean[i] * mean[i]) <= 1e-12 * g[i * columns + i])
      }
    }
  }

  @Test func momentsMergeAndComeBackFromBytes() throws {
    var first = try statistics(40, 30, seed: 1)
    let second = try statistics(40, 50, seed: 2)
    let copy = try GramStatistics(serialized: first.serialized())
    #expect(copy.serialized() == first.serialized())
    try first.merge(second)
    var other = second
    try other.merge(copy)
    #expect(first.serialized() == other.serialized())
    #expect(first.count == 80)
    #expect(throws: HalfstepError.self) { try first.merge(GramStatistics(groups: 1, columns: 3)) }
    let bytes = first.serialized()
    for broken in [[], Array(bytes.dropLast()), Array(bytes.dropLast(8)), bytes.map { $0 ^ 1 }] {
      #expect(throws: HalfstepError.self) { try GramStatistics(serialized: broken) }
    }
  }

  // One tile, its end, several with a rest.
  @Test(arguments: [1, 5, 191, 192, 193, 450]) func choleskySolves(_ n: Int) throws {
    var random = SeededGenerator(seed: UInt64(n))
    let b = random.floats(n * n).map(Double.init)
    var a = [Double](repeating: 0, count: n * n)
    for i in 0..<n {
      for j in 0..<n {
        for k in 0..<n { a[i * n + j] += b[i * n + k] * b[j * n + k] }
      }
      a[i * n + i] += 1
    }
    let factor = try CholeskyFactor(a, size: n)
    for i in 0..<n {
      for j in 0...i {
        var sum = 0.0
        for k in 0...j { sum += factor.elements[i * n + k] * factor.elements[j * n + k] }
        // Backward error of Cholesky: n + 1 roundings of products below the diagonal's size.
        #expect(abs(sum - a[i * n + j]) <= Double(n + 1) * 0x1p-52 * (a[i * n + i] + a[j * n + j]))
      }
    }
    let x = random.floats(3 * n).map(Double.init)
    var rows = [Double](repeating: 0, count: 3 * n)
    for row in 0..<3 {
      for i in 0..<n { for j in 0..<n { rows[row * n + i] += x[row * n + j] * a[j * n + i] } }
    }
    factor.solve(rows: &rows)
    // Eigenvalues lie between 1 and the trace: the condition is at most that.
    let condition = (0..<n).reduce(0) { $0 + a[$1 * n + $1] }
    for (got, want) in zip(rows, x) {
      #expect(abs(got - want) <= 4 * Double(n) * 0x1p-52 * condition * Double(n).squareRoot())
    }
    // The upper triangle holds what it held.
    for i in 0..<n {
      for j in i + 1..<max(n, i + 1) { #expect(factor.elements[i * n + j] == a[i * n + j]) }
    }
    for bad in [-1, .nan, .infinity] {
      var broken = a
      broken[n * n - 1] = bad
      let error = #expect(throws: HalfstepError.self) { try CholeskyFactor(broken, size: n) }
      #expect(error?.message.contains("at row \(n - 1)") == true)
    }
  }

  @Test func deadInputsFewRowsAndBadSums() throws {
    // All inputs zero: weights stay at their nearest codes.
    let zeros = [Double](repeating: 0, count: 36)
    let weight: [Float] = [0.1, -0.2, 0.3, 0.74, -0.55, 0]
    let dead = try GramSolver(
      weight: weight, gram: zeros, surplus: weight.map { _ in 0 }, columns: 6, shrinkage: 0.01,
      correctionShrinkage: 0.1)
    let grid = grid(1, 6, scale: 0.1, bits: 4)
    try dead.begin(dead.feedback(grid).codes, grid)
    try dead.descend(sweeps: 2)
    for (value, w) in zip(dead.result(), weight) {
      #expect(abs(value - min(w, 0.7)) <= 0.05 + 1e-6)
    }
    // Fewer rows than columns: singular, held up by shrinkage.
    let few = try statistics(40, 10, seed: 3)
    let same = [Float](repeating: 0.3, count: 40)
    let singular = try GramSolver(
      weight: same, gram: few.gram(group: 0, isCentered: true), surplus: surplus(same, few),
      columns: 40, shrinkage: 0.01, correctionShrinkage: 0.1)
    let wide = self.grid(1, 40, scale: 0.1, bits: 4)
    try singular.begin(singular.feedback(wide).codes, wide)
    let codes = singular.result()
    #expect(codes.allSatisfy { $0.isFinite })
    var nan = zeros
    nan[7] = .nan
    #expect(throws: HalfstepError.self) {
      try GramSolver(
        weight: weight, gram: nan, surplus: nil, columns: 6, shrinkage: 0.1, correctionShrinkage: 1)
    }
  }

  @Test func threadsDoNotMatter() throws {
    func run() throws -> [Float] {
      let n = 450
      let moments = try statistics(n, 600, seed: 6)
      var random = SeededGenerator(seed: 1)
      let weight = random.floats(70 * n)
      let solver = try GramSolver(
        weight: weight, gram: moments.gram(group: 0, isCentered: true),
        surplus: surplus(weight, moments), columns: n, shrinkage: 0.02, correctionShrinkage: 0.05)
      let grid = grid(70, n, scale: 0.14, bits: 4)
      try solver.begin(solver.feedback(grid).codes, grid)
      try solver.descend(sweeps: 2)
      return solver.result() + solver.costs().map { Float($0) }
    }
    let before = Parallel.maximumThreads
    defer { Parallel.setMaximumThreads(before) }
    Parallel.setMaximumThreads(1)
    let one = try run()
    Parallel.setMaximumThreads(2)
    #expect(try run() == one)
    Parallel.setMaximumThreads(3)
    #expect(try run() == one)
  }
}
