// SPDX-License-Identifier: Apache-2.0
// Tests of the order in which channels go.

import HalfstepAlgorithms
import HalfstepNumerics
import TestSupport
import Testing

@Suite struct ChannelEliminationTests {
  @Test func independentChannelsGoByTheirPower() throws {
    // Powers 4, 1 and 9, nothing in common: what goes is lost, 1 then 1 + 4 then all 14.
    let found = try ChannelElimination([4, 0, 0, 0, 1, 0, 0, 0, 9], count: 3)
    #expect(found.order == [2, 0, 1])
    for (error, expected) in zip(found.errors, [14.0, 5, 1, 0]) {
      // The ridge of 1e-7 of the mean power.
      #expect(abs(error - expected) <= 1e-5)
    }
  }

  @Test func aCopyGoesForNothing() throws {
    // z0 = z1 of power 1 each, z2 of power 9: one of the copies takes the place of both, then the
    // pair's 2·z0, of power 4, goes.
    let found = try ChannelElimination([1, 1, 0, 1, 1, 0, 0, 0, 9], count: 3)
    #expect(found.order.first == 2)
    for (error, expected) in zip(found.errors, [13.0, 4, 0, 0]) {
      #expect(abs(error - expected) <= 1e-5)
    }
  }

  @Test func nothingLosesNothing() throws {
    let found = try ChannelElimination([Double](repeating: 0, count: 9), count: 3)
    #expect(found.order == [0, 1, 2])
    #expect(found.errors == [0, 0, 0, 0])
    let one = try ChannelElimination([2], count: 1)
    #expect(one.order == [0] && one.errors == [0, 2].reversed())
  }

  @Test func errorsAreThoseOfLeastSquares() throws {
    let count = 12
    var random = SeededGenerator(seed: 5)
    let rows = (0..<40).map { _ in random.floats(count).map(Double.init) }
    var moments = [Double](repeating: 0, count: count * count)
    for row in rows {
      for i in 0..<count { for j in 0..<count { moments[i * count + j] += row[i] * row[j] } }
    }
    let found = try ChannelElimination(moments, count: count)
    #expect(found.order.sorted() == Array(0..<count))
    #expect(zip(found.errors, found.errors.dropFirst()).allSatisfy { $0 >= $1 })
    for kept in 1..<count {
      // The residual of fitting the sum of all columns with those that are kept.
      let chosen = found.order.prefix(kept)
      var system = Matrix(rows: kept, columns: kept)
      var right = Matrix(rows: kept, columns: 1)
      for (a, i) in chosen.enumerated() {
        for (b, j) in chosen.enumerated() { system[a, b] = moments[i * count + j] }
        right[a, 0] = (0..<count).reduce(0) { $0 + moments[i * count + $1] }
      }
      let solution = try #require(system.solvedPositiveDefinite(right))
      var residual = 0.0
      for row in rows {
        var rest = row.reduce(0, +)
        for (a, i) in chosen.enumerated() { rest -= solution[a, 0] * row[i] }
        residual += rest * rest
      }
      // Rounding of the downdates, and the ridge.
      #expect(abs(found.errors[kept] - residual) <= 1e-5 * found.errors[0])
    }
  }

  @Test func threadsDoNotMatter() throws {
    let count = 300
    var random = SeededGenerator(seed: 9)
    var moments = [Double](repeating: 0, count: count * count)
    for _ in 0..<400 {
      let row = random.floats(count)
      for i in 0..<count {
        for j in 0..<count { moments[i * count + j] += Double(row[i] * row[j]) }
      }
    }
    let threads = Parallel.maximumThreads
    defer { Parallel.setMaximumThreads(threads) }
    Parallel.setMaximumThreads(1)
    let one = try ChannelElimination(moments, count: count)
    Parallel.setMaximumThreads(2)
    let two = try ChannelElimination(moments, count: count)
    #expect(one.order == two.order && one.errors == two.errors)
  }
}
