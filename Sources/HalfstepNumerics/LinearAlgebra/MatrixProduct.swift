// SPDX-License-Identifier: Apache-2.0
// Products of float matrices whose result does not depend on the number of threads.

import CDNNL

/// Products of row-major float matrices on oneDNN, tile by tile.
///
/// Tiles have sizes that follow from the shape and each is computed by one thread, so that the result does not depend on
/// the number of threads.
package enum MatrixProduct {
  /// A row-major matrix in memory.
  package struct Operand {
    let start: UnsafePointer<Float>
    let stride: Int
    let isTransposed: Bool

    /// - Parameters:
    ///   - start: First element.
    ///   - stride: Elements between rows as stored.
    ///   - isTransposed: Whether the product takes the transpose of what is stored.
    package init(_ start: UnsafePointer<Float>, stride: Int, isTransposed: Bool = false) {
      self.start = start
      self.stride = stride
      self.isTransposed = isTransposed
    }

    func moved(by offset: Int) -> Operand {
      Operand(start + offset, stride: stride, isTransposed: isTransposed)
    }

    fileprivate func part(row: Int, column: Int) -> UnsafePointer<Float> {
      isTransposed ? start + column * stride + row : start + row * stride + column
    }
  }

  /// Edge of the tiles of a result: smaller ones where there would be too few to share.
  private static func tile(_ rows: Int, _ columns: Int) -> Int {
    rows * columns >= 1 << 18 ? 256 : 128
  }

  /// Computes `c = scale · a · b + keep · c`.
  ///
  /// - Parameters:
  ///   - rows: Rows of a and c.
  ///   - columns: Columns of b and c.
  ///   - inner: Columns of a and rows of b.
  ///   - c: Receives `[rows, columns]`.
  ///   - cStride: Elements between rows of c.
  /// - Throws: `HalfstepError.outOfMemory`, `.internalError` if oneDNN refuses.
  /// - Complexity: O(rows · columns · inner), on all threads.
  package static func multiply(
    rows: Int, columns: Int, inner: Int, _ a: Operand, _ b: Operand, scale: Float = 1,
    keep: Float = 0, into c: UnsafeMutablePointer<Float>, cStride: Int
  ) throws(HalfstepError) {
    guard rows > 0, columns > 0, inner > 0 else { return }
    let tile = tile(rows, columns)
    let across = (columns + tile - 1) / tile
    let tiles = (rows + tile - 1) / tile * across
    let status = withUnsafeTemporaryAllocation(of: dnnl_status_t.self, capacity: tiles) { status in
      onOneThreadEach(tiles) { index in
        let row = index / across * tile
        let column = index % across * tile
        status[index] = single(
          rows: min(tile, rows - row), columns: min(tile, columns - column), inner: inner,
          Operand(a.part(row: row, column: 0), stride: a.stride, isTransposed: a.isTransposed),
          Operand(b.part(row: 0, column: column), stride: b.stride, isTransposed: b.isTransposed),
          scale: scale, keep: keep, into: c + row * cStride + column, cStride: cStride)
      }
      return status.first { $0 != dnnl_success } ?? dnnl_success
    }
    if status == dnnl_out_of_memory {
      throw HalfstepError(.outOfMemory, "oneDNN: out of memory for a product of matrices")
    }
    guard status == dnnl_success else {
      throw HalfstepError(.internalError, "oneDNN: status \(status.rawValue) for a product")
    }
  }

  /// Runs jobs on all threads, such that products inside of each use one.
  static func onOneThreadEach(_ count: Int, _ body: (Int) -> Void) {
    if Parallel.threadCount(for: count, grain: 1) == 1 {
      let threads = Parallel.maximumThreads
      Parallel.setMaximumThreads(1)
      for index in 0..<count { body(index) }
      Parallel.setMaximumThreads(threads)
      return
    }
    Parallel.forEachRange(count, grain: 1) { _, range in
      for index in range { body(index) }
    }
  }

  /// One tile on the calling thread, which must be one of several or limited to one.
  static func single(
    rows: Int, columns: Int, inner: Int, _ a: Operand, _ b: Operand, scale: Float = 1,
    keep: Float = 0, into c: UnsafeMutablePointer<Float>, cStride: Int
  ) -> dnnl_status_t {
    dnnl_sgemm(
      a.isTransposed ? 0x54 : 0x4E, b.isTransposed ? 0x54 : 0x4E, dnnl_dim_t(rows),
      dnnl_dim_t(columns), dnnl_dim_t(inner), scale, a.start, dnnl_dim_t(a.stride), b.start,
      dnnl_dim_t(b.stride), keep, c, dnnl_dim_t(cStride))
  }
}
