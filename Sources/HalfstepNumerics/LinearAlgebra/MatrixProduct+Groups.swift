// SPDX-License-Identifier: Apache-2.0
// The same product for each group of a grouped layer.

import CDNNL

extension MatrixProduct {
  /// Computes `c = scale · a · b + keep · c` for groups whose matrices lie at equal distances.
  ///
  /// A single group is cut into tiles; several groups run side by side, one thread each. The result
  /// does not depend on the number of threads.
  ///
  /// - Parameters:
  ///   - groups: Number of products; their shapes are those of `multiply`.
  ///   - aStep: Elements from one group's a to the next; likewise `bStep` and `cStep`.
  /// - Throws: `HalfstepError.outOfMemory`, `.internalError` if oneDNN refuses.
  package static func multiply(
    groups: Int, rows: Int, columns: Int, inner: Int, _ a: Operand, aStep: Int, _ b: Operand,
    bStep: Int, scale: Float = 1, keep: Float = 0, into c: UnsafeMutablePointer<Float>,
    cStride: Int, cStep: Int
  ) throws(HalfstepError) {
    if groups == 1 {
      return try multiply(
        rows: rows, columns: columns, inner: inner, a, b, scale: scale, keep: keep, into: c,
        cStride: cStride)
    }
    guard groups > 0, rows > 0, columns > 0, inner > 0 else { return }
    let status = withUnsafeTemporaryAllocation(
      of: dnnl_status_t.self, capacity: groups
    ) { status in
      onOneThreadEach(groups) { group in
        status[group] = single(
          rows: rows, columns: columns, inner: inner, a.moved(by: group * aStep),
          b.moved(by: group * bStep), scale: scale, keep: keep, into: c + group * cStep,
          cStride: cStride)
      }
      return status.first { $0 != dnnl_success } ?? dnnl_success
    }
    guard status == dnnl_success else {
      throw HalfstepError(
        status == dnnl_out_of_memory ? .outOfMemory : .internalError,
        "oneDNN: status \(status.rawValue) for a grouped product")
    }
  }
}
