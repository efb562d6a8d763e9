// SPDX-License-Identifier: Apache-2.0
// Rows of a layer's inputs as matrices.

import HalfstepGraph
import HalfstepNumerics

extension LayerProblem {
  /// Some rows of a piece, each group as a matrix whose rows are the columns of the weights.
  package struct Panel: Sendable {
    /// Rows.
    package let count: Int
    package let columns: Int
    /// Inputs with the quantized prefix, `[groups, columns, count]`.
    package let quantized: [Float]
    /// Inputs in the float network, likewise.
    package let reference: [Float]
  }

  /// Gathers rows of a piece.
  ///
  /// - Parameters:
  ///   - chunk: Which piece, below `chunkCount`.
  ///   - limit: Rows of all pieces together that are wanted at most, 1 or more.
  ///   - choice: Rows to learn from (false), to validate on (true), or both (nil).
  /// - Returns: The rows, or nil if the piece has none.
  /// - Throws: What `inputs` and `unfolding` throw.
  package func panel(
    _ chunk: Int, limit: Int, isHeldOut choice: Bool?
  ) throws(HalfstepError) -> Panel? {
    let inputs = try inputs(chunk)
    let unfolding = try unfolding(inputs.quantized.shape)
    var chosen: [Int] = []
    if choice != true {
      chosen += rows(chunk, of: unfolding.rowCount, isHeldOut: false, limit: limit)
    }
    if choice != false {
      chosen += rows(chunk, of: unfolding.rowCount, isHeldOut: true, limit: limit)
    }
    if chosen.isEmpty { return nil }
    let table = unfolding.table(chosen)
    let (groups, columns) = (unfolding.groups, unfolding.columns)
    func gather(_ tensor: Tensor) throws(HalfstepError) -> [Float] {
      try tensor.withFloats { (values) throws(HalfstepError) in
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
    return Panel(
      count: table.count, columns: columns, quantized: try gather(inputs.quantized),
      reference: try gather(inputs.reference))
  }
}
