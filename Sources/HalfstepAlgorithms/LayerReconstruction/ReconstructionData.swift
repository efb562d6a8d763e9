// SPDX-License-Identifier: Apache-2.0
// Calibration data, cut anew so that results do not depend on how the caller batched it.

import HalfstepGraph
import HalfstepNumerics

/// Calibration data in pieces of a fixed number of rows, however the caller batched it.
///
/// Rows of consecutive batches of the same shapes are joined and cut anew. Networks whose inputs
/// declare a fixed first extent get pieces of that extent. Pieces within a batch share its memory.
package struct ReconstructionData: Sendable {
  /// Inputs by name; every piece but the last of a run of equal shapes has the same number of rows.
  package let chunks: [[String: Tensor]]

  /// Rows in a piece where the network leaves that open.
  package static let defaultRows = 4

  /// Cuts batches.
  ///
  /// - Parameters:
  ///   - batches: The graph's inputs by name, `[N, …]` each, with equal N within a batch.
  ///   - graph: The network.
  /// - Throws: `HalfstepError.emptyStatistics` without rows; `.unknownName` for a missing or unknown
  ///   input; `.shapeMismatch` for a scalar or differing numbers of rows; `.nonFiniteValue` naming an
  ///   input with a NaN or an infinity.
  package init(_ batches: [[String: Tensor]], for graph: Graph) throws(HalfstepError) {
    let names = graph.inputs.map(\.name).filter { graph.initializers[$0] == nil }.sorted()
    var rows = Self.defaultRows
    for input in graph.inputs where graph.initializers[input.name] == nil {
      if case .fixed(let extent)? = input.dimensions?.first { rows = max(extent, 1) }
    }
    var pieces: [[String: Tensor]] = []
    var pending: [(batch: [String: Tensor], rows: Range<Int>)] = []
    var pendingRows = 0
    func flush(_ count: Int) throws(HalfstepError) {
      var taken: [(batch: [String: Tensor], rows: Range<Int>)] = []
      var open = count
      while open > 0, let (batch, range) = pending.first {
        let part = min(open, range.count)
        taken.append((batch, range.lowerBound..<range.lowerBound + part))
        if part == range.count {
          pending.removeFirst()
        } else {
          pending[0].rows = range.lowerBound + part..<range.upperBound
        }
        open -= part
      }
      pendingRows -= count
      var piece: [String: Tensor] = [:]
      for name in names {
        piece[name] = try Tensor.joining(
          taken.compactMap { part in
            part.batch[name].map { ($0, part.rows) }
          })
      }
      pieces.append(piece)
    }
    for batch in batches {
      let count = try Self.check(batch, names)
      if count == 0 { continue }
      if let previous = pending.first?.batch, !Self.fit(previous, batch, names) {
        while pendingRows > 0 { try flush(min(rows, pendingRows)) }
      }
      pending.append((batch, 0..<count))
      pendingRows += count
      while pendingRows >= rows { try flush(rows) }
    }
    while pendingRows > 0 { try flush(min(rows, pendingRows)) }
    guard !pieces.isEmpty else {
      throw HalfstepError(.emptyStatistics, "calibration data: no rows")
    }
    chunks = pieces
  }

  /// Checks a batch and returns its number of rows.
  private static func check(
    _ batch: [String: Tensor], _ names: [String]
  ) throws(HalfstepError) -> Int {
    for name in batch.keys.sorted() where !names.contains(name) {
      throw HalfstepError(
        .unknownName, "unknown input '\(name)'; the network's inputs are \(names)")
    }
    var rows: Int?
    for name in names {
      guard let tensor = batch[name] else {
        throw HalfstepError(.unknownName, "calibration data: input '\(name)' is missing")
      }
      guard let extent = tensor.shape.dimensions.first else {
        throw HalfstepError(.shapeMismatch, "calibration data '\(name)': a scalar has no rows")
      }
      if let rows, rows != extent {
        throw HalfstepError(
          .shapeMismatch, "calibration data '\(name)': expected \(rows) rows, got \(extent)")
      }
      rows = extent
      guard tensor.dataType == .float32 else { continue }
      let isFinite = try tensor.withFloats { (values) throws(HalfstepError) in
        // A sum of magnitudes would overflow; exponents tell.
        values.allSatisfy { $0.isFinite }
      }
      guard isFinite else {
        throw HalfstepError(
          .nonFiniteValue, "calibration data '\(name)' holds a NaN or an infinity")
      }
    }
    return rows ?? 0
  }

  private static func fit(
    _ a: [String: Tensor], _ b: [String: Tensor], _ names: [String]
  ) -> Bool {
    names.allSatisfy { name in
      guard let left = a[name], let right = b[name] else { return false }
      return left.dataType == right.dataType
        && left.shape.dimensions.dropFirst() == right.shape.dimensions.dropFirst()
    }
  }
}

extension Tensor {
  /// Rows of several tensors of equal trailing shapes, one after the other; those of one share its memory.
  fileprivate static func joining(
    _ parts: [(tensor: Tensor, rows: Range<Int>)]
  ) throws(HalfstepError) -> Tensor {
    guard let first = parts.first?.tensor else {
      throw HalfstepError(.internalError, "joining no tensors")
    }
    if parts.count == 1 { return try first.rows(parts[0].rows) }
    let rest = Array(first.shape.dimensions.dropFirst())
    let shape = try Shape([parts.reduce(0) { $0 + $1.rows.count }] + rest)
    let result = try Tensor(uninitialized: first.dataType, shape: shape)
    guard let bits = first.dataType.bitWidth, bits >= 8 else {
      throw HalfstepError(.typeMismatch, "rows of \(first.dataType): elements share bytes")
    }
    let rowBytes = Tensor.byteCount(of: first.dataType, count: rest.reduce(1, *))
    var offset = 0
    for (tensor, rows) in parts {
      (result.storage.baseAddress + offset).copyMemory(
        from: tensor.storage.baseAddress + rows.lowerBound * rowBytes,
        byteCount: rows.count * rowBytes)
      withExtendedLifetime(tensor) {}
      offset += rows.count * rowBytes
    }
    return result
  }
}
