// SPDX-License-Identifier: Apache-2.0
// Rounds rows of weights such that their products with the data change least.

/// The steps and code ranges of a matrix of weights.
///
/// A weight is `scale · code` with codes relative to the zero point. Each row is cut into blocks, all as
/// wide as `blockColumns` but the last.
package struct RoundingGrid: Sendable {
  /// Columns that share a scale.
  package let blockColumns: Int
  /// Blocks in a row.
  package let blocks: Int
  /// Positive steps, `[rows, blocks]`.
  package var scales: [Float]
  /// Lowest codes, `[rows, blocks]`.
  package let low: [Float]
  /// Highest codes, `[rows, blocks]`.
  package let high: [Float]

  /// - Precondition: Equally many scales and codes, and a block: a layer without weights has no grid.
  package init(blockColumns: Int, blocks: Int, scales: [Float], low: [Float], high: [Float]) {
    precondition(scales.count == low.count && low.count == high.count && blocks > 0)
    self.blockColumns = blockColumns
    self.blocks = blocks
    self.scales = scales
    self.low = low
    self.high = high
  }

  /// The same grid with other scales.
  package func scaled(_ factor: Float) -> RoundingGrid {
    var copy = self
    for index in copy.scales.indices { copy.scales[index] *= factor }
    return copy
  }
}

/// Rounds rows of weights w to q on a grid such that `(t − q)·H·(t − q)` becomes small for each.
///
/// H is the Gram matrix G of the layer's input plus shrinkage, λ times its mean diagonal on the
/// diagonal. The target t makes up for a surplus e that the output shall have besides w·x:
/// `t = w + (E e·xᵀ)·(G + λ'I)⁻¹` minimizes `E(w·x + e − t·x)²` with a pull toward w. With e = w·d,
/// where the float network's input is x + d, that corrects for what the quantized prefix did to the
/// input. Columns are rounded from the largest diagonal of H to the smallest, each error fed into the
/// columns not yet rounded through the Cholesky factor of H (GPTQ's feedback, which is Babai's nearest
/// plane); then cyclic descent on single codes and closed-form scales. Rows up to `searchLimit` columns
/// are searched exactly, within a bound of nodes.
///
/// Factors in `Double`, rounds in float; the result does not depend on the number of threads.
///
/// - Reference: Frantar et al., "GPTQ", 2022, arXiv:2210.17323; Li et al., "GPTAQ", 2025,
///   arXiv:2504.02692, for the correction; Nair and Suggala, "CDQuant", 2024, arXiv:2406.17542, for
///   descent; Agrell et al., "Closest Point Search in Lattices", 2002, for the search.
package final class GramSolver {
  package let rowCount: Int
  package let columns: Int
  /// Original column of each position in the order of work.
  let order: [Int]
  /// H in the order of work, `[columns, columns]`.
  let hessian: [Float]
  /// Lower Cholesky factor of H, `[columns, columns]`.
  let factor: [Float]
  /// What rows aim at, in the order of work.
  let target: [Float]
  /// Bounds for codes of the constraint to floor or ceil: the original weights; nil for free codes.
  let anchors: [Float]?
  /// `target · H`.
  private(set) var product: [Float] = []

  // State between steps.
  /// Codes in the order of work, `[rowCount, columns]`.
  var codes: [Float] = []
  var grid: RoundingGrid?
  /// `target − scale · codes`.
  var errors: [Float] = []
  /// `errors · H`.
  var gradients: [Float] = []

  /// Prepares the rows of a group.
  ///
  /// - Parameters:
  ///   - weight: w, `[rowCount, columns]`, finite.
  ///   - gram: G, `[columns, columns]`, symmetric.
  ///   - surplus: Moments of what is wanted besides w·x, `E e·xᵀ`, `[rowCount, columns]`: w·D and more;
  ///     nil to aim at w itself.
  ///   - shrinkage: λ, above 0, in units of G's mean diagonal.
  ///   - correctionShrinkage: λ', above 0.
  ///   - isFloorOrCeil: Whether a weight may only go to a neighboring code.
  /// - Throws: `HalfstepError.numericFailure` if G holds NaN or is far from positive definite.
  package init(
    weight: [Float], gram: consuming [Double], surplus: [Double]?, columns n: Int,
    shrinkage: Double, correctionShrinkage: Double, isFloorOrCeil: Bool = false
  ) throws(HalfstepError) {
    guard n > 0, weight.count % n == 0, gram.count == n * n else {
      throw HalfstepError(
        .numericFailure, "Gram matrix: \(gram.count) elements for \(n) columns")
    }
    columns = n
    rowCount = weight.count / n
    let diagonal = (0..<n).map { gram[$0 * n + $0] }
    var mean = 0.0
    for value in diagonal { mean += max(value, 0) / Double(n) }
    // Dead inputs: any code will do, and the identity keeps weights where they are.
    if !(mean > 0) { mean = mean.isNaN ? mean : 1 }
    guard mean.isFinite else {
      throw HalfstepError(.numericFailure, "Gram matrix: the diagonal is not finite")
    }
    // The last position is rounded first.
    let order = (0..<n).sorted { (diagonal[$0], $0) < (diagonal[$1], $1) }
    self.order = order
    // A wide layer's matrices are most of what there is in memory, so that there is one of doubles: its
    // lower triangle is factored twice, its upper one keeps what it was.
    var matrix = consume gram
    Self.reorder(&matrix, order)
    let ordered = order.map { diagonal[$0] }
    var target = Self.permute(weight, order, n)
    anchors = isFloorOrCeil ? target : nil
    if let surplus {
      Self.restoreLower(&matrix, ordered.map { $0 + correctionShrinkage * mean })
      let factor = try CholeskyFactor(consume matrix, size: n)
      var right = Self.permute(surplus, order, n)
      factor.solve(rows: &right)
      matrix = (consume factor).releasedElements()
      for index in target.indices { target[index] = Float(Double(target[index]) + right[index]) }
    }
    self.target = target
    let ridged = ordered.map { $0 + shrinkage * mean }
    Self.restoreLower(&matrix, ridged)
    let cholesky = try CholeskyFactor(consume matrix, size: n)
    factor = Self.lower(cholesky.elements, n)
    hessian = Self.symmetric(cholesky.elements, ridged)
  }

  /// Puts rows and columns of a square matrix in another order, in place: one exchange after the other.
  private static func reorder(_ matrix: inout [Double], _ order: [Int]) {
    let n = order.count
    matrix.withUnsafeMutableBufferPointer { matrix in
      var exchanges: [(Int, Int)] = []
      for place in 0..<n {
        // Where what belongs here was moved to by the exchanges before.
        var source = order[place]
        while source < place { source = order[source] }
        if source == place { continue }
        exchanges.append((place, source))
        for column in 0..<n { matrix.swapAt(place * n + column, source * n + column) }
      }
      for row in 0..<n {
        for (a, b) in exchanges { matrix.swapAt(row * n + a, row * n + b) }
      }
    }
  }

  /// Makes the lower triangle what the upper one is, with a diagonal.
  private static func restoreLower(_ matrix: inout [Double], _ diagonal: [Double]) {
    let n = diagonal.count
    matrix.withUnsafeMutableBufferPointer { matrix in
      for row in 0..<n {
        for column in 0..<row { matrix[row * n + column] = matrix[column * n + row] }
        matrix[row * n + row] = diagonal[row]
      }
    }
  }

  private static func lower(_ matrix: [Double], _ n: Int) -> [Float] {
    [Float](unsafeUninitializedCapacity: n * n) { result, count in
      for row in 0..<n {
        for column in 0...row { result[row * n + column] = Float(matrix[row * n + column]) }
        for column in row + 1..<max(n, row + 1) { result[row * n + column] = 0 }
      }
      count = n * n
    }
  }

  /// The symmetric matrix with an upper triangle and a diagonal.
  private static func symmetric(_ matrix: [Double], _ diagonal: [Double]) -> [Float] {
    let n = diagonal.count
    return [Float](unsafeUninitializedCapacity: n * n) { result, count in
      for row in 0..<n {
        for column in row + 1..<max(n, row + 1) {
          let value = Float(matrix[row * n + column])
          result[row * n + column] = value
          result[column * n + row] = value
        }
        result[row * n + row] = Float(diagonal[row])
      }
      count = n * n
    }
  }

  private static func permute<Element>(
    _ matrix: [Element], _ order: [Int], _ n: Int
  ) -> [Element] {
    [Element](unsafeUninitializedCapacity: matrix.count) { result, count in
      for row in 0..<matrix.count / n {
        for column in 0..<n {
          (result.baseAddress! + row * n + column).initialize(to: matrix[row * n + order[column]])
        }
      }
      count = matrix.count
    }
  }

  static func multiply(
    _ a: [Float], _ b: [Float], rows: Int, inner: Int, columns: Int, into c: inout [Float]
  ) throws(HalfstepError) {
    var failure: HalfstepError?
    a.withUnsafeBufferPointer { a in
      b.withUnsafeBufferPointer { b in
        c.withUnsafeMutableBufferPointer { c in
          guard let a = a.baseAddress, let b = b.baseAddress, let c = c.baseAddress else { return }
          do throws(HalfstepError) {
            try MatrixProduct.multiply(
              rows: rows, columns: columns, inner: inner, .init(a, stride: inner),
              .init(b, stride: columns), into: c, cStride: columns)
          } catch { failure = error }
        }
      }
    }
    if let failure { throw failure }
  }

  /// Block of a position in the order of work.
  @inline(__always) func block(_ position: Int, _ grid: RoundingGrid) -> Int {
    grid.blocks == 1 ? 0 : order[position] / grid.blockColumns
  }

  /// Codes that an element may take.
  @inline(__always) func bounds(
    _ row: Int, _ position: Int, _ grid: RoundingGrid
  ) -> (low: Float, high: Float) {
    let group = row * grid.blocks + block(position, grid)
    let (low, high) = (grid.low[group], grid.high[group])
    guard let anchors else { return (low, high) }
    let scaled = anchors[row * columns + position] / grid.scales[group]
    return (
      min(max(scaled.rounded(.down), low), high), max(min(scaled.rounded(.up), high), low)
    )
  }

  // MARK: State

  /// Starts from codes; errors and gradients are computed from them.
  ///
  /// - Parameter codes: In the order of work, as `feedback(_:)` gives them.
  package func begin(_ codes: [Float], _ grid: RoundingGrid) throws(HalfstepError) {
    self.codes = codes
    self.grid = grid
    try refresh()
  }

  /// Computes errors and gradients anew.
  func refresh() throws(HalfstepError) {
    guard let grid else { return }
    let n = columns
    if errors.count != codes.count {
      errors = [Float](repeating: 0, count: codes.count)
      gradients = errors
    }
    for row in 0..<rowCount {
      for column in 0..<n {
        let scale = grid.scales[row * grid.blocks + block(column, grid)]
        errors[row * n + column] = target[row * n + column] - scale * codes[row * n + column]
      }
    }
    try Self.multiply(errors, hessian, rows: rowCount, inner: n, columns: n, into: &gradients)
  }

  /// `(t − q)·H·(t − q)` of each row.
  package func costs() -> [Double] {
    (0..<rowCount).map { row in
      var sum = 0.0
      for index in row * columns..<(row + 1) * columns {
        sum += Double(errors[index]) * Double(gradients[index])
      }
      return sum
    }
  }

  /// Rounded weights in the original order, `[rowCount, columns]`.
  package func result() -> [Float] {
    guard let grid else { return [] }
    var result = [Float](repeating: 0, count: codes.count)
    for row in 0..<rowCount {
      for column in 0..<columns {
        let scale = grid.scales[row * grid.blocks + block(column, grid)]
        result[row * columns + order[column]] = scale * codes[row * columns + column]
      }
    }
    return result
  }

  /// The grid as it is now.
  package var currentGrid: RoundingGrid? { grid }

  // MARK: Scales

  /// Numerators and denominators of each row's best scale for the codes as they are.
  ///
  /// For rows with one block: the scale changes by `Σ numerators / Σ denominators` of the rows that share
  /// it.
  package func refitSums() throws(HalfstepError) -> [(numerator: Double, denominator: Double)] {
    guard let grid, grid.blocks == 1 else { return [] }
    if product.isEmpty {
      product = [Float](repeating: 0, count: target.count)
      try Self.multiply(
        target, hessian, rows: rowCount, inner: columns, columns: columns, into: &product)
    }
    return (0..<rowCount).map { row in
      var (numerator, denominator) = (0.0, 0.0)
      for index in row * columns..<(row + 1) * columns {
        numerator += Double(codes[index]) * Double(gradients[index])
        denominator += Double(codes[index]) * (Double(product[index]) - Double(gradients[index]))
      }
      return (numerator, denominator / Double(grid.scales[row]))
    }
  }

  /// Gives rows with one block other scales.
  package func rescale(_ scales: [Float]) throws(HalfstepError) {
    grid?.scales = scales
    try refresh()
  }

  /// Refits the scales of blocks one after the other, each for the codes as they are.
  package func refitBlocks() throws(HalfstepError) {
    guard var grid, grid.blocks > 1, anchors == nil else { return }
    let n = columns
    var members = [[Int]](repeating: [], count: grid.blocks)
    for position in 0..<n { members[block(position, grid)].append(position) }
    var scales = grid.scales
    let (rows, blocks) = (rowCount, grid.blocks)
    hessian.withUnsafeBufferPointer { hessian in
      codes.withUnsafeBufferPointer { codes in
        gradients.withUnsafeMutableBufferPointer { gradients in
          scales.withUnsafeMutableBufferPointer { scales in
            nonisolated(unsafe) let (h, c) = (hessian.baseAddress!, codes.baseAddress!)
            nonisolated(unsafe) let (r, s) = (gradients.baseAddress!, scales.baseAddress!)
            Parallel.forEachRange(rows, grain: 1) { _, range in
              for row in range {
                for block in 0..<blocks {
                  Self.refit(
                    c + row * n, r + row * n, h, n, members[block], s + row * blocks + block)
                }
              }
            }
          }
        }
      }
    }
    grid.scales = scales
    self.grid = grid
    try refresh()
  }

  private static func refit(
    _ codes: UnsafePointer<Float>, _ gradient: UnsafeMutablePointer<Float>,
    _ hessian: UnsafePointer<Float>, _ n: Int, _ members: [Int],
    _ scale: UnsafeMutablePointer<Float>
  ) {
    var (numerator, denominator) = (0.0, 0.0)
    for i in members where codes[i] != 0 {
      numerator += Double(codes[i]) * Double(gradient[i])
      var sum = 0.0
      for j in members { sum += Double(codes[j]) * Double(hessian[i * n + j]) }
      denominator += Double(codes[i]) * sum
    }
    guard denominator > 0 else { return }
    let next = Float(Double(scale.pointee) + numerator / denominator)
    guard next > 0.5 * scale.pointee, next < 2 * scale.pointee else { return }
    let change = next - scale.pointee
    scale.pointee = next
    for i in members where codes[i] != 0 {
      let step = change * codes[i]
      let row = hessian + i * n
      for j in 0..<n { gradient[j] -= step * row[j] }
    }
  }
}

extension GramSolver {
  /// Cost of rounding each block to nearest, with the diagonal of H alone.
  ///
  /// - Returns: `Σ H_jj·(t_j − q_j)²` over each block's columns, `[rowCount, blocks]`.
  package func diagonalCosts(_ grid: RoundingGrid) -> [Double] {
    var costs = [Double](repeating: 0, count: rowCount * grid.blocks)
    for row in 0..<rowCount {
      for position in 0..<columns {
        let group = row * grid.blocks + block(position, grid)
        let (low, high) = bounds(row, position, grid)
        let wanted = target[row * columns + position]
        let code = min(max((wanted / grid.scales[group]).rounded(.toNearestOrEven), low), high)
        let error = Double(wanted - code * grid.scales[group])
        costs[group] += Double(hessian[position * columns + position]) * error * error
      }
    }
    return costs
  }
}
