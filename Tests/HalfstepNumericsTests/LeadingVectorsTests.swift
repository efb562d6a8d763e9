// SPDX-License-Identifier: Apache-2.0
// Tests of eigenvectors of larger matrices, and of singular vectors in single precision.

import HalfstepNumerics
import TestSupport
import Testing

@Suite struct LeadingVectorsTests {
  static let shapes: [(rows: Int, columns: Int)] = [(40, 70), (70, 40), (150, 150)]

  private func random(_ rows: Int, _ columns: Int) -> [Float] {
    var generator = SeededGenerator(seed: UInt64(rows + columns))
    return generator.floats(rows * columns)
  }

  private func doubles(_ values: [Float], _ shape: (rows: Int, columns: Int)) -> Matrix {
    Matrix(rows: shape.rows, columns: shape.columns, values: values.map(Double.init))
  }

  private func largestDifference(_ a: Matrix, _ b: Matrix) -> Double {
    zip(a.values, b.values).reduce(0) { max($0, abs($1.0 - $1.1)) }
  }

  // 150 is beyond the size from which divide and conquer divides; a matrix with two eigenvalues only
  // is all clusters.
  @Test(arguments: [false, true])
  func eigenvectorsAreOrthonormalAndMakeTheMatrix(_ isClustered: Bool) throws {
    let size = 150
    var matrix = doubles(random(size, size), (size, size)).gram()
    if isClustered {
      // The reflection 2 I − 2 v vᵀ has the eigenvalue 0 once and 2 else.
      matrix = Matrix(rows: size, columns: size)
      for row in 0..<size {
        for column in 0..<size {
          matrix[row, column] = (row == column ? 2 : 0) - 2 / Double(size)
        }
      }
    }
    let found = try matrix.largestEigenpairs(size)
    let vectors = found.vectors
    var identity = Matrix(rows: size, columns: size)
    for index in 0..<size { identity[index, index] = 1 }
    // LAPACK promises a small multiple of size · 2⁻⁵³ of the largest eigenvalue.
    let bound = 10 * Double(size) * 0x1p-53
    #expect(largestDifference(vectors.gram(transposed: true), identity) <= bound)
    var scaled = vectors
    for column in 0..<size {
      for row in 0..<size { scaled[row, column] *= found.values[column] }
    }
    let again = Matrix.product(scaled, transposed: false, vectors, transposed: true)
    #expect(largestDifference(again, matrix) <= bound * found.values[0])
    #expect(zip(found.values, found.values.dropFirst()).allSatisfy { $0 >= $1 })
    let few = try matrix.largestEigenpairs(7)
    #expect(few.values == Array(found.values[..<7]) && few.vectors.columns == 7)
  }

  @Test(arguments: shapes)
  func floatsTellWhatDoublesTell(_ shape: (rows: Int, columns: Int)) throws {
    let values = random(shape.rows, shape.columns)
    let count = 10
    let found = try #require(
      Matrix.leadingVectors(values, rows: shape.rows, columns: shape.columns, count))
    let isLeft = shape.rows <= shape.columns
    let matrix = doubles(values, shape)
    let exact = try matrix.gram(transposed: !isLeft).largestEigenpairs(count)
    let image = Matrix.product(matrix, transposed: isLeft, exact.vectors)
    let actual = Matrix.product(found.basis, transposed: false, found.image, transposed: true)
    let expected = Matrix.product(exact.vectors, transposed: false, image, transposed: true)
    // A vector turns by some 2⁻²³ λ over its distance to the next eigenvalue, here above λ / 100.
    #expect(largestDifference(actual, expected) <= 100 * 0x1p-23 * exact.values[0].squareRoot())
    // What is lost is least to second order: (100 · 2⁻²³)² of what is kept, some ten times as much.
    func loss(_ kept: Matrix) -> Double {
      var sum = 0.0
      for row in 0..<shape.rows {
        for column in 0..<shape.columns {
          let rest = matrix[row, column] - (isLeft ? kept[row, column] : kept[column, row])
          sum += rest * rest
        }
      }
      return sum
    }
    #expect(loss(actual) <= loss(expected) * (1 + 1e-8))
  }

  // Singular values 1 and s, five of each; the square of s is at the border of a hundredth.
  @Test(arguments: [(0.12, true), (0.09, false)])
  func smallSingularValuesAreLeftToDoubles(_ second: Double, _ isFound: Bool) {
    var values = [Float](repeating: 0, count: 400)
    for index in 0..<10 { values[index * 21] = index < 5 ? 1 : Float(second) }
    let found = Matrix.leadingVectors(values, rows: 20, columns: 20, 8)
    #expect((found != nil) == isFound)
    #expect(Matrix.leadingVectors(values, rows: 20, columns: 20, 5) != nil)
  }

  @Test func whatFloatsDoNotHoldIsLeftToDoubles() {
    let values = random(12, 20)
    func found(_ scale: Float, _ count: Int = 2) -> Bool {
      Matrix.leadingVectors(values.map { $0 * scale }, rows: 12, columns: 20, count) != nil
    }
    #expect(found(1) && found(1e12) && found(1e-9))
    #expect(!found(1e25) && !found(1e-25) && !found(0))
    // All of them, or more than there are.
    #expect(found(1, 3) && !found(1, 12) && !found(1, 13) && !found(1, 0))
  }

  @Test(arguments: [1, 2])
  func everyIndexIsVisitedOnce(_ threads: Int) {
    let before = Parallel.maximumThreads
    defer { Parallel.setMaximumThreads(before) }
    Parallel.setMaximumThreads(threads)
    var visits = [Int](repeating: 0, count: 100)
    visits.withUnsafeMutableBufferPointer { visits in
      nonisolated(unsafe) let visits = visits
      Parallel.forEach(visits.count) { thread, index in
        visits[index] += (0..<threads).contains(thread) ? 1 : 1000
      }
    }
    #expect(visits.allSatisfy { $0 == 1 })
    Parallel.forEach(0) { _, _ in Issue.record("there is nothing to visit") }
  }
}
