// SPDX-License-Identifier: Apache-2.0
// Rows of a layer's inputs as matrices.

import HalfstepGraph
import HalfstepNumerics

extension LayerProblem {
  /// Some rows of a piece, each group as a matrix whose rows are the columns of the weights.
  package struct Panel: Sendable {
    /// Which rows, as `unfolding` numbers them.
    package let rows: [Int]
    package let unfolding: LayerUnfolding
    package let columns: Int
    /// Inputs with the quantized prefix, `[groups, columns, count]`.
    package let quantized: [Float]
    /// Inputs in the float network, likewise.
    package let reference: [Float]

    /// Number of rows.
    package var count: Int { rows.count }
  }

  /// Floats of one of a panel's matrices at most, but for layers whose rows are longer.
  private static let panelCapacity = 1 << 22

  /// Gathers rows of a piece, some at a time, so that no more than a few dozen megabytes are held.
  ///
  /// - Parameters:
  ///   - chunk: Which piece, below `chunkCount`.
  ///   - limit: Rows of all pieces together that are wanted at most, 1 or more.
  ///   - choice: Rows to learn from (false), to validate on (true), or both (nil).
  ///   - height: Rows of a panel at most, where sums over them in float have to be short.
  ///   - body: Gets the rows in their order.
  /// - Throws: What `inputs`, `unfolding` and the body throw.
  package func forEachPanel(
    _ chunk: Int, limit: Int, isHeldOut choice: Bool?, height: Int = .max,
    _ body: (Panel) throws(HalfstepError) -> Void
  ) throws(HalfstepError) {
    let inputs = try inputs(chunk)
    let unfolding = try unfolding(inputs.quantized.shape)
    var chosen: [Int] = []
    if choice != true {
      chosen += rows(chunk, of: unfolding.rowCount, isHeldOut: false, limit: limit)
    }
    if choice != false {
      chosen += rows(chunk, of: unfolding.rowCount, isHeldOut: true, limit: limit)
    }
    let (groups, columns) = (unfolding.groups, unfolding.columns)
    let height = min(max(32, Self.panelCapacity / max(groups * columns, 1)), height)
    for start in stride(from: 0, to: chosen.count, by: height) {
      let rows = Array(chosen[start..<min(start + height, chosen.count)])
      let table = unfolding.table(rows)
      try body(
        Panel(
          rows: rows, unfolding: unfolding, columns: columns,
          quantized: try Self.gather(inputs.quantized, unfolding, table),
          reference: try Self.gather(inputs.reference, unfolding, table)))
    }
  }

  /// The rows of a tensor, `[groups, columns, count]`.
  private static func gather(
    _ tensor: Tensor, _ unfolding: LayerUnfolding, _ table: LayerUnfolding.RowTable
  ) throws(HalfstepError) -> [Float] {
    let (groups, columns) = (unfolding.groups, unfolding.columns)
    return try tensor.withFloats { (values) throws(HalfstepError) in
      [Float](unsafeUninitializedCapacity: groups * columns * table.count) { panel, filled in
        filled = groups * columns * table.count
        guard let from = values.baseAddress, let to = panel.baseAddress else { return }
        nonisolated(unsafe) let (source, target) = (from, to)
        Parallel.forEachRange(groups, grain: 1) { _, range in
          for group in range {
            unfolding.gather(
              table, group: group, from: source, into: target + group * columns * table.count,
              stride: table.count)
          }
        }
      }
    }
  }
}

extension WeightLayout {
  /// What weights make of rows.
  ///
  /// - Parameters:
  ///   - weights: `[groups, outputs, columns]`.
  ///   - rows: `[groups, columns, count]`, as in a panel.
  ///   - count: Number of rows.
  ///   - sums: What is added to the products, like the result; nil for nothing.
  /// - Returns: `[groups, outputs, count]`.
  /// - Throws: `HalfstepError.shapeMismatch` if a list is too short; what oneDNN refuses.
  func products(
    _ weights: [Float], _ rows: [Float], count: Int, adding sums: [Float]? = nil
  ) throws(HalfstepError) -> [Float] {
    let outputs = outputsPerGroup
    var result = sums ?? [Float](repeating: 0, count: groups * outputs * count)
    guard weights.count >= groups * outputs * columns, rows.count >= groups * columns * count,
      result.count >= groups * outputs * count
    else { throw HalfstepError(.shapeMismatch, "products of a layer: fewer than \(count) rows") }
    try weights.withUnsafeBufferPointer { (weights) throws(HalfstepError) in
      try rows.withUnsafeBufferPointer { (rows) throws(HalfstepError) in
        try result.withUnsafeMutableBufferPointer { (result) throws(HalfstepError) in
          guard let w = weights.baseAddress, let x = rows.baseAddress, let y = result.baseAddress
          else { return }
          try MatrixProduct.multiply(
            groups: groups, rows: outputs, columns: count, inner: columns,
            .init(w, stride: columns), aStep: outputs * columns, .init(x, stride: count),
            bStep: columns * count, keep: sums == nil ? 0 : 1, into: y, cStride: count,
            cStep: outputs * count)
        }
      }
    }
    return result
  }
}
