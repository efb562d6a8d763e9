// SPDX-License-Identifier: Apache-2.0
// Products of float matrices whose result does not depend on the number of threads.

import CDNNL
import HalfstepNumerics

/// A product of row-major float matrices, `C = A'·B' + beta·C`, once for each group.
///
/// The result is cut into pieces by its shape alone, and each piece is one call of oneDNN on one
/// thread, so that the same numbers come out for any number of threads.
package struct FloatProduct: Sendable {
  /// An operand of a product: its leading dimension, the distance of its groups, and whether it is
  /// read transposed.
  package struct Operand: Sendable {
    package var rowStride: Int
    package var groupStride = 0
    package var isTransposed = false

    package init(rowStride: Int, groupStride: Int = 0, isTransposed: Bool = false) {
      self.rowStride = rowStride
      self.groupStride = groupStride
      self.isTransposed = isTransposed
    }
  }

  package var groups = 1
  package let rows: Int
  package let columns: Int
  package let inner: Int
  package let a: Operand
  package let b: Operand
  package let c: Operand
  /// What the old values of C are multiplied by.
  package var beta: Float = 0

  package init(
    groups: Int = 1, rows: Int, columns: Int, inner: Int, a: Operand, b: Operand, c: Operand,
    beta: Float = 0
  ) {
    self.groups = groups
    self.rows = rows
    self.columns = columns
    self.inner = inner
    self.a = a
    self.b = b
    self.c = c
    self.beta = beta
  }

  /// Multiplications that are worth a piece of their own, and pieces of a group at most.
  private static let pieceWork = 1 << 21
  private static let pieceLimit = 32

  /// Computes the product.
  ///
  /// - Parameters:
  ///   - first: A, `[rows, inner]`, or `[inner, rows]` if transposed.
  ///   - second: B, `[inner, columns]`, or `[columns, inner]` if transposed.
  ///   - result: C, `[rows, columns]`; overlaps neither.
  /// - Throws: `HalfstepError.internalError` or `.outOfMemory` if oneDNN refuses.
  /// - Complexity: O(groups · rows · columns · inner).
  package func run(
    _ first: UnsafePointer<Float>, _ second: UnsafePointer<Float>,
    into result: UnsafeMutablePointer<Float>
  ) throws(HalfstepError) {
    guard groups > 0, rows > 0, columns > 0, inner > 0 else { return }
    // The longer side is cut, at multiples of 16.
    let cutsRows = rows >= columns
    let side = cutsRows ? rows : columns
    let wanted = min(max(rows * columns / Self.pieceWork * inner
      + rows * columns % Self.pieceWork * inner / Self.pieceWork, 1), Self.pieceLimit)
    let length = ((side + wanted - 1) / wanted + 15) / 16 * 16
    let pieces = (side + length - 1) / length
    let failed = FailureFlag()
    Self.forEach(groups * pieces) { task in
      let (group, piece) = task.quotientAndRemainder(dividingBy: pieces)
      let start = piece * length
      let count = min(length, side - start)
      let row = cutsRows ? start : 0
      let column = cutsRows ? 0 : start
      let left = first + group * a.groupStride + (a.isTransposed ? row : row * a.rowStride)
      let right = second + group * b.groupStride + (b.isTransposed ? column * b.rowStride : column)
      let status = dnnl_sgemm(
        CChar(a.isTransposed ? 84 : 78), CChar(b.isTransposed ? 84 : 78),
        dnnl_dim_t(cutsRows ? count : rows), dnnl_dim_t(cutsRows ? columns : count),
        dnnl_dim_t(inner), 1, left, dnnl_dim_t(a.rowStride), right, dnnl_dim_t(b.rowStride), beta,
        result + group * c.groupStride + row * c.rowStride + column, dnnl_dim_t(c.rowStride))
      if status != dnnl_success { failed.status = status }
    }
    try Engine.check(failed.status, "multiplying matrices [\(rows), \(inner), \(columns)]")
  }

  /// Remembers that one of the pieces failed; which of several does not matter.
  private final class FailureFlag: @unchecked Sendable {
    // Unchecked: written only on failure, and read after all threads are done.
    var status = dnnl_success
  }

  /// Runs tasks side by side, each on one thread.
  private static func forEach(_ count: Int, _ body: (Int) -> Void) {
    if Parallel.threadCount(for: count, grain: 1) > 1 {
      // oneDNN sees the parallel region around it and uses one thread.
      Parallel.forEachRange(count, grain: 1) { _, range in for task in range { body(task) } }
      return
    }
    let threads = Parallel.maximumThreads
    Parallel.setMaximumThreads(1)
    for task in 0..<count { body(task) }
    Parallel.setMaximumThreads(threads)
  }
}
