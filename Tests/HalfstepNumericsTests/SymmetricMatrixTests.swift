// SPDX-License-Identifier: Apache-2.0
// Tests of products, eigenvectors and solutions of symmetric matrices.

import HalfstepNumerics
import Testing

@Suite struct SymmetricMatrixTests {
  // [[2, 1], [1, 2]] has eigenvalues 3 and 1 with vectors (1, 1)/√2 and (1, −1)/√2; the first of
  // two components of equal magnitude is the positive one.
  @Test func eigenpairsOfAMatrixByHand() throws {
    let matrix = Matrix(rows: 2, columns: 2, values: [2, 1, 1, 2])
    let all = try matrix.largestEigenpairs(2)
    let half = 0.5.squareRoot()
    // Double arithmetic on two numbers: a few units in the last place.
    #expect(abs(all.values[0] - 3) < 1e-14 && abs(all.values[1] - 1) < 1e-14)
    #expect(abs(all.vectors[0, 0] - half) < 1e-14 && abs(all.vectors[1, 0] - half) < 1e-14)
    #expect(abs(abs(all.vectors[0, 1]) - half) < 1e-14)
    #expect(all.vectors[0, 1] * all.vectors[1, 1] < 0)
    let one = try matrix.largestEigenpairs(1)
    #expect(abs(one.values[0] - 3) < 1e-14 && one.values.count == 1)
    #expect(one.vectors.columns == 1 && one.vectors[0, 0] > 0)
  }

  @Test func productsTransposeEitherFactor() {
    // A = [[1, 2, 3], [4, 5, 6]] column by column.
    let a = Matrix(rows: 2, columns: 3, values: [1, 4, 2, 5, 3, 6])
    #expect(a.gram().values == [14, 32, 32, 77])
    #expect(Matrix.product(a, transposed: false, a, transposed: true).values == [14, 32, 32, 77])
    #expect(a.gram(transposed: true).values == Matrix.product(a, transposed: true, a).values)
  }

  @Test func solvesAndRefusesIndefiniteMatrices() {
    let matrix = Matrix(rows: 2, columns: 2, values: [4, 2, 2, 3])
    let right = Matrix(rows: 2, columns: 1, values: [8, 7])
    let solution = matrix.solvedPositiveDefinite(right)
    // 4·1.25 + 2·1.5 = 8 and 2·1.25 + 3·1.5 = 7; two divisions and square roots of rounding.
    #expect(solution.map { abs($0[0, 0] - 1.25) < 1e-14 && abs($0[1, 0] - 1.5) < 1e-14 } == true)
    let indefinite = Matrix(rows: 2, columns: 2, values: [1, 2, 2, 1])
    #expect(indefinite.solvedPositiveDefinite(right) == nil)
  }

  @Test func nonFiniteMatricesAreNamed() {
    let matrix = Matrix(rows: 1, columns: 1, values: [.nan])
    #expect(throws: HalfstepError.self) { try matrix.largestEigenpairs(1) }
  }
}
