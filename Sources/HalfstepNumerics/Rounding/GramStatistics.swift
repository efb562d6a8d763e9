// SPDX-License-Identifier: Apache-2.0
// Second moments of a layer's input rows, in the quantized and in the float network.

import CDNNL

/// Second moments of a layer's input rows: of rows x with a quantized prefix, and of what the float
/// network's rows differ from them, d.
///
/// The squared error of a row of weights depends on the data through these sums alone:
/// `Σ(w·(x+d) − q·x)² = e·G·e + 2·w·D·e + w·E·w` for e = w − q, G = Σx·xᵀ and D = Σd·xᵀ. Keeping D
/// instead of the cross-Gram G + D avoids cancellation. A commutative monoid: merging adds. Panels are
/// multiplied in float in tiles of fixed size and added up in `Double`, so that the sums depend on how
/// rows are cut into panels, but not on the number of threads.
package struct GramStatistics: Sendable {
  /// Groups of the layer, each with its own matrices.
  package let groups: Int
  /// Length of a row.
  package let columns: Int
  /// Rows seen.
  package private(set) var count = 0
  /// Σ x·xᵀ on and below the diagonal, row by row: `[groups, columns·(columns + 1)/2]`.
  private var gram: [Double]
  /// Σ d·xᵀ, `[groups, columns, columns]`; empty if it is not kept.
  private var cross: [Double]
  private var sums: [Double]
  private var differenceSums: [Double]

  /// Groups up to this width are summed without GEMM.
  private static let directLimit = 32
  private static let tile = 128

  /// Creates empty sums.
  ///
  /// - Parameter keepsCross: Whether Σ d·xᵀ is wanted; without it, differences must be zeros.
  /// - Throws: `HalfstepError.outOfMemory` if the matrices would take 2⁴⁰ bytes or more.
  package init(groups: Int, columns: Int, keepsCross: Bool = true) throws(HalfstepError) {
    let (square, a) = columns.multipliedReportingOverflow(by: columns)
    let (total, b) = square.multipliedReportingOverflow(by: groups)
    guard groups > 0, columns > 0, !a, !b, total < 1 << 37 else {
      throw HalfstepError(
        .outOfMemory, "Gram matrices of \(groups) groups of \(columns) columns are too large")
    }
    self.groups = groups
    self.columns = columns
    gram = [Double](repeating: 0, count: groups * Self.triangle(columns))
    cross = [Double](repeating: 0, count: keepsCross ? total : 0)
    sums = [Double](repeating: 0, count: groups * columns)
    differenceSums = sums
  }

  /// Elements of the rows of a lower triangle that lie above one.
  @inline(__always)
  private static func triangle(_ row: Int) -> Int { row &* (row &+ 1) / 2 }

  /// Adds rows whose differences are not summed.
  ///
  /// - Parameters:
  ///   - rows: x, `[groups, columns, count]`: each column contiguous.
  ///   - count: Rows, 0 or more.
  /// - Throws: `HalfstepError.internalError` if oneDNN refuses a product.
  package mutating func add(rows: [Float], count: Int) throws(HalfstepError) {
    try rows.withUnsafeBufferPointer { (rows) throws(HalfstepError) in
      guard let x = rows.baseAddress else { return }
      try add(rows: x, differences: nil, count: count)
    }
  }

  /// Adds rows.
  ///
  /// - Parameters:
  ///   - rows: x, `[groups, columns, count]`: each column contiguous.
  ///   - differences: d, alike; nil for zeros.
  ///   - count: Rows, 0 or more.
  /// - Throws: `HalfstepError.internalError` if oneDNN refuses a product.
  /// - Complexity: O(count · groups · columns²), on all threads.
  package mutating func add(
    rows: UnsafePointer<Float>, differences: UnsafePointer<Float>?, count: Int
  ) throws(HalfstepError) {
    guard count > 0 else { return }
    let (groups, columns) = (groups, columns)
    nonisolated(unsafe) let x = rows
    nonisolated(unsafe) let d = differences ?? rows
    let isDirect = columns <= Self.directLimit
    let across = isDirect ? 1 : (columns + Self.tile - 1) / Self.tile
    let jobs = isDirect ? groups : groups * across * across
    var isRefused = false
    let keepsCross = !cross.isEmpty && differences != nil
    gram.withUnsafeMutableBufferPointer { gram in
      cross.withUnsafeMutableBufferPointer { cross in
        guard let g = gram.baseAddress else { return }
        nonisolated(unsafe) let g0 = g
        nonisolated(unsafe) let c0 = keepsCross ? cross.baseAddress : nil
        withUnsafeTemporaryAllocation(of: Bool.self, capacity: jobs) { refused in
          nonisolated(unsafe) let refused = refused
          MatrixProduct.onOneThreadEach(jobs) { job in
            let group = isDirect ? job : job / (across * across)
            let panel = group * columns * count
            let lower = g0 + group * Self.triangle(columns)
            let full = c0.map { $0 + group * columns * columns }
            if isDirect {
              Self.addDirect(x + panel, d + panel, columns, count, lower, full)
              refused[job] = false
            } else {
              refused[job] = !Self.addTile(
                x + panel, d + panel, columns, count, job % (across * across) / across,
                job % across, lower, full)
            }
          }
          isRefused = refused.contains(true)
        }
      }
    }
    if isRefused { throw HalfstepError(.internalError, "oneDNN refused a product of matrices") }
    for column in 0..<groups * columns {
      sums[column] += Self.sum(rows + column * count, count)
      if let differences { differenceSums[column] += Self.sum(differences + column * count, count) }
    }
    self.count += count
  }

  /// Adds other sums.
  ///
  /// - Throws: `HalfstepError.shapeMismatch` for other groups or columns.
  package mutating func merge(_ other: GramStatistics) throws(HalfstepError) {
    guard groups == other.groups, columns == other.columns, cross.count == other.cross.count
    else {
      throw HalfstepError(
        .shapeMismatch,
        "Gram matrices of \(groups)×\(columns) and \(other.groups)×\(other.columns)")
    }
    for index in gram.indices { gram[index] += other.gram[index] }
    for index in cross.indices { cross[index] += other.cross[index] }
    for index in sums.indices { sums[index] += other.sums[index] }
    for index in sums.indices { differenceSums[index] += other.differenceSums[index] }
    count += other.count
  }

  // MARK: Results

  /// Whether every sum is finite.
  package var isFinite: Bool {
    sums.allSatisfy(\.isFinite) && differenceSums.allSatisfy(\.isFinite)
      && (0..<groups * columns).allSatisfy {
        gram[$0 / columns * Self.triangle(columns) + Self.triangle($0 % columns + 1) - 1].isFinite
      }
  }

  /// Mean of x, `[columns]`.
  package func mean(group: Int) -> [Double] {
    sums[group * columns..<(group + 1) * columns].map { $0 / Double(max(count, 1)) }
  }

  /// Mean of d, `[columns]`.
  package func differenceMean(group: Int) -> [Double] {
    differenceSums[group * columns..<(group + 1) * columns].map { $0 / Double(max(count, 1)) }
  }

  /// The mean of x·xᵀ, `[columns, columns]`, around the means if they are left to the bias.
  package func gram(group: Int, isCentered: Bool) -> [Double] {
    let n = columns
    let scale = 1 / Double(max(count, 1))
    let mean = isCentered ? mean(group: group) : [Double](repeating: 0, count: n)
    var result = [Double](repeating: 0, count: n * n)
    var index = group * Self.triangle(n)
    for row in 0..<n {
      for column in 0...row {
        let value = gram[index] * scale - mean[row] * mean[column]
        result[row * n + column] = value
        result[column * n + row] = value
        index += 1
      }
    }
    return result
  }

  /// The mean of d·xᵀ, `[columns, columns]`, around the means if they are left to the bias.
  package func cross(group: Int, isCentered: Bool) -> [Double] {
    let n = columns
    let start = group * n * n
    let scale = 1 / Double(max(count, 1))
    if cross.isEmpty { return [Double](repeating: 0, count: n * n) }
    var result = cross[start..<start + n * n].map { $0 * scale }
    guard isCentered else { return result }
    let mean = mean(group: group)
    let difference = differenceMean(group: group)
    for row in 0..<n {
      for column in 0..<n { result[row * n + column] -= difference[row] * mean[column] }
    }
    return result
  }

  /// A part of the mean of x·xᵀ: rows of one phase and columns of another.
  ///
  /// - Parameters:
  ///   - group: Which group.
  ///   - step: Distance of the elements of a phase; divides `columns`.
  ///   - p: Phase of the rows: p, p + step, …
  ///   - q: Phase of the columns.
  ///   - isCentered: Whether means are taken out.
  /// - Returns: `[columns / step, columns / step]`.
  package func gramPart(group: Int, step: Int, _ p: Int, _ q: Int, isCentered: Bool) -> Matrix {
    let (n, start) = (columns, group * Self.triangle(columns))
    let mean = isCentered ? mean(group: group) : [Double](repeating: 0, count: n)
    let scale = 1 / Double(max(count, 1))
    let extent = n / step
    var result = Matrix(rows: extent, columns: extent)
    gram.withUnsafeBufferPointer { gram in
      for c in 0..<extent {
        let column = c * step + q
        for r in 0..<extent {
          let row = r * step + p
          let at = start + Self.triangle(max(row, column)) + min(row, column)
          result.values[c * extent + r] = gram[at] * scale - mean[row] * mean[column]
        }
      }
    }
    return result
  }

  /// A part of the mean of d·xᵀ, alike; nil if it is not kept.
  package func crossPart(
    group: Int, step: Int, _ p: Int, _ q: Int, isCentered: Bool
  ) -> Matrix? {
    if cross.isEmpty { return nil }
    let (n, start) = (columns, group * columns * columns)
    let zeros = [Double](repeating: 0, count: n)
    let mean = isCentered ? mean(group: group) : zeros
    let difference = isCentered ? differenceMean(group: group) : zeros
    let scale = 1 / Double(max(count, 1))
    let extent = n / step
    var result = Matrix(rows: extent, columns: extent)
    for c in 0..<extent {
      let column = c * step + q
      for r in 0..<extent {
        let row = r * step + p
        result.values[c * extent + r] =
          cross[start + row * n + column] * scale - difference[row] * mean[column]
      }
    }
    return result
  }

  // MARK: Serialization

  private static let signature: UInt64 = 0x324D_4152_4753_48

  /// Everything as bytes, little-endian.
  package func serialized() -> [UInt8] {
    var bytes: [UInt8] = []
    let crossOrZeros =
      cross.isEmpty ? [Double](repeating: 0, count: groups * columns * columns) : cross
    bytes.reserveCapacity((gram.count + crossOrZeros.count + sums.count * 2 + 4) * 8)
    func append(_ word: UInt64) {
      withUnsafeBytes(of: word.littleEndian) { bytes.append(contentsOf: $0) }
    }
    append(Self.signature)
    append(UInt64(groups))
    append(UInt64(columns))
    append(UInt64(count))
    for list in [gram, crossOrZeros, sums, differenceSums] {
      for value in list { append(value.bitPattern) }
    }
    return bytes
  }

  /// Reads what `serialized()` gave.
  ///
  /// - Throws: `HalfstepError.malformedFile` for anything else.
  package init(serialized bytes: [UInt8]) throws(HalfstepError) {
    func fail() -> HalfstepError {
      HalfstepError(.malformedFile, "Gram matrices: the bytes are not what was written")
    }
    func word(_ index: Int) -> UInt64 {
      bytes.withUnsafeBytes {
        UInt64(littleEndian: $0.loadUnaligned(fromByteOffset: index * 8, as: UInt64.self))
      }
    }
    guard bytes.count >= 32, bytes.count % 8 == 0, word(0) == Self.signature,
      let groups = Int(exactly: word(1)), let columns = Int(exactly: word(2)),
      let count = Int(exactly: word(3)), groups > 0, columns > 0,
      groups < 1 << 37, columns < 1 << 19, columns * columns < 1 << 37
    else { throw fail() }
    let (square, overflow) = (columns * columns).multipliedReportingOverflow(by: groups)
    let lower = groups.multipliedReportingOverflow(by: Self.triangle(columns)).partialValue
    guard !overflow, square < 1 << 37,
      bytes.count / 8 == 4 + lower + square + 2 * groups * columns
    else { throw fail() }
    self.groups = groups
    self.columns = columns
    self.count = count
    var next = 4
    func take(_ count: Int) -> [Double] {
      defer { next += count }
      return (next..<next + count).map { Double(bitPattern: word($0)) }
    }
    gram = take(lower)
    cross = take(square)
    sums = take(groups * columns)
    differenceSums = take(groups * columns)
  }

  // MARK: Kernels

  private static func addTile(
    _ x: UnsafePointer<Float>, _ d: UnsafePointer<Float>, _ columns: Int, _ count: Int,
    _ tileRow: Int, _ tileColumn: Int, _ gram: UnsafeMutablePointer<Double>,
    _ cross: UnsafeMutablePointer<Double>?
  ) -> Bool {
    let (row, column) = (tileRow * tile, tileColumn * tile)
    let (height, width) = (min(tile, columns - row), min(tile, columns - column))
    return withUnsafeTemporaryAllocation(of: Float.self, capacity: height * width) { buffer in
      guard let product = buffer.baseAddress else { return false }
      for (left, sum) in [(d, cross), (x, gram)] {
        guard let sum, sum != gram || tileColumn <= tileRow else { continue }
        let status = MatrixProduct.single(
          rows: height, columns: width, inner: count, .init(left + row * count, stride: count),
          .init(x + column * count, stride: count, isTransposed: true), into: product,
          cStride: width)
        if status != dnnl_success { return false }
        for r in 0..<height {
          let isLower = sum == gram
          let target = sum + (isLower ? triangle(row + r) : (row + r) * columns) + column
          for c in 0..<(isLower ? min(width, row + r - column + 1) : width) {
            target[c] += Double(product[r * width + c])
          }
        }
      }
      return true
    }
  }

  private static func addDirect(
    _ x: UnsafePointer<Float>, _ d: UnsafePointer<Float>, _ columns: Int, _ count: Int,
    _ gram: UnsafeMutablePointer<Double>, _ cross: UnsafeMutablePointer<Double>?
  ) {
    for row in 0..<columns {
      for column in 0..<columns {
        if column <= row {
          gram[triangle(row) + column] += Double(dot(x + row * count, x + column * count, count))
        }
        guard let cross else { continue }
        cross[row * columns + column] += Double(dot(d + row * count, x + column * count, count))
      }
    }
  }

  private static func dot(
    _ a: UnsafePointer<Float>, _ b: UnsafePointer<Float>, _ count: Int
  ) -> Float {
    var sum = Lanes()
    var index = 0
    while index &+ Lanes.width <= count {
      sum += Lanes(loading: a + index) * Lanes(loading: b + index)
      index &+= Lanes.width
    }
    var total = sum.sum()
    while index < count {
      total += a[index] * b[index]
      index &+= 1
    }
    return total
  }

  private static func sum(_ values: UnsafePointer<Float>, _ count: Int) -> Double {
    var sum = 0.0
    for index in 0..<count { sum += Double(values[index]) }
    return sum
  }
}
