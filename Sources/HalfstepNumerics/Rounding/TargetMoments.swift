// SPDX-License-Identifier: Apache-2.0
// Moments of a wanted output with a layer's input rows.

/// Sums over rows of a wanted output e, alone and with the input row x: all that least squares with
/// another target than a product of x needs besides the Gram matrix of x.
///
/// Panels are multiplied in float and added up in `Double`; the sums do not depend on the number of
/// threads.
package struct TargetMoments: Sendable {
  private let groups: Int
  /// Outputs of a group.
  private let outputs: Int
  private let columns: Int
  /// Rows seen.
  package private(set) var count = 0
  /// Σ e·xᵀ, `[groups, outputs, columns]`.
  private var products: [Double]
  /// Σ e, `[groups, outputs]`.
  private var sums: [Double]

  /// Creates empty sums.
  package init(groups: Int, outputs: Int, columns: Int) {
    self.groups = groups
    self.outputs = outputs
    self.columns = columns
    products = [Double](repeating: 0, count: groups * outputs * columns)
    sums = [Double](repeating: 0, count: groups * outputs)
  }

  /// Adds rows.
  ///
  /// - Parameters:
  ///   - rows: x, `[groups, columns, count]` at least: each column contiguous.
  ///   - targets: e, `[groups, outputs, count]`.
  ///   - count: Rows.
  /// - Throws: `HalfstepError.shapeMismatch` if a list is too short; what oneDNN refuses.
  /// - Complexity: O(count · groups · outputs · columns), on all threads.
  package mutating func add(
    rows: [Float], targets: [Float], count: Int
  ) throws(HalfstepError) {
    guard count > 0 else { return }
    guard rows.count >= groups * columns * count, targets.count >= groups * outputs * count else {
      throw HalfstepError(.shapeMismatch, "moments of a target: fewer than \(count) rows")
    }
    var panel = [Float](repeating: 0, count: groups * outputs * columns)
    try rows.withUnsafeBufferPointer { (x) throws(HalfstepError) in
      try targets.withUnsafeBufferPointer { (e) throws(HalfstepError) in
        try panel.withUnsafeMutableBufferPointer { (panel) throws(HalfstepError) in
          guard let x = x.baseAddress, let e = e.baseAddress, let panel = panel.baseAddress else {
            return
          }
          try MatrixProduct.multiply(
            groups: groups, rows: outputs, columns: columns, inner: count,
            .init(e, stride: count), aStep: outputs * count,
            .init(x, stride: count, isTransposed: true), bStep: columns * count, into: panel,
            cStride: columns, cStep: outputs * columns)
        }
      }
    }
    for index in panel.indices { products[index] += Double(panel[index]) }
    for output in 0..<groups * outputs {
      var sum = 0.0
      for row in output * count..<(output + 1) * count { sum += Double(targets[row]) }
      sums[output] += sum
    }
    self.count += count
  }

  /// Whether every sum is finite.
  package var isFinite: Bool { sums.allSatisfy(\.isFinite) && products.allSatisfy(\.isFinite) }

  /// Mean of e, `[outputs]`.
  package func mean(group: Int) -> [Double] {
    sums[group * outputs..<(group + 1) * outputs].map { $0 / Double(max(count, 1)) }
  }

  /// Mean of e·xᵀ, `[outputs, columns]`.
  ///
  /// - Parameter mean: Mean of x, `[columns]`, if the means are left to the bias; otherwise nil.
  package func moments(group: Int, centeredOn mean: [Double]?) -> [Double] {
    let scale = 1 / Double(max(count, 1))
    let own = self.mean(group: group)
    let start = group * outputs * columns
    return (0..<outputs * columns).map { index in
      products[start + index] * scale - own[index / columns] * (mean?[index % columns] ?? 0)
    }
  }
}
