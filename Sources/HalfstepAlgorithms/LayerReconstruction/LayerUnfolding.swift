// SPDX-License-Identifier: Apache-2.0
// A layer's input as the rows that its weights multiply.

import HalfstepGraph
import HalfstepNumerics

/// A layer's input seen as rows, one for each output position, that its weights multiply.
///
/// Output channel o of group g at row r is `Σ_j matrix[g][o][j] · row[g][r][j]` plus the bias, times
/// alpha for Gemm, where j runs over input channels of the group (slower) and kernel taps (faster),
/// as in `WeightLayout.matrix(of:group:)`. Positions in the padding are zeros.
package struct LayerUnfolding: Sendable {
  package let groups: Int
  /// Length of a row: input channels of a group times kernel taps.
  package let columns: Int
  /// Number of rows.
  package let rowCount: Int
  /// Output positions of one picture; 1 for matrix products.
  package let rowsPerPicture: Int

  private let inputsPerGroup: Int
  private let taps: [[Int]]
  /// For each spatial axis, tap and output coordinate: the input coordinate, or −1 for padding.
  private let coordinates: [[Int32]]
  private let outputExtents: [Int]
  private let inputStrides: [Int]
  private let pictureStride: Int
  private let channelStride: Int

  /// Lays out the rows of an input.
  ///
  /// - Parameters:
  ///   - layer: The layer.
  ///   - node: Its node.
  ///   - kernel: Spatial extents of the weight.
  ///   - shape: Shape of the input.
  /// - Throws: `HalfstepError.invalidGraph`, `.shapeMismatch` naming the node.
  package init(
    _ layer: LinearLayer, _ node: Node, kernel: [Int], input shape: Shape
  ) throws(HalfstepError) {
    func fail(_ text: String) -> HalfstepError {
      HalfstepError(.shapeMismatch, "node '\(node.label)': \(text)", node: node.label)
    }
    groups = layer.layout.groups
    inputsPerGroup = layer.layout.inputsPerGroup
    columns = layer.layout.inputsPerGroup * layer.layout.spatial
    switch layer.kind {
    case .gemm, .matMul:
      let isTransposed = layer.kind == .gemm && (node.intAttribute("transA") ?? 0) != 0
      guard shape.count(dividedBy: columns) != nil else {
        throw fail("input \(shape): expected rows of \(columns)")
      }
      rowCount = shape.elementCount / columns
      rowsPerPicture = 1
      pictureStride = isTransposed ? 1 : columns
      channelStride = isTransposed ? rowCount : 1
      (taps, coordinates, outputExtents, inputStrides) = ([[]], [], [], [])
    case .conv, .convTranspose:
      guard shape.rank == kernel.count + 2, shape.elementCount > 0,
        shape[1] == layer.inputChannels
      else { throw fail("input \(shape): does not fit the weight") }
      let input = Array(shape.dimensions[2...])
      var taps: [[Int]] = [[]]
      for extent in kernel {
        taps = taps.flatMap { tap in (0..<extent).map { tap + [$0] } }
      }
      self.taps = taps
      (outputExtents, coordinates) =
        layer.kind == .conv
        ? try Self.convolution(node, kernel, input) : try Self.transposed(node, kernel, input)
      inputStrides = Shape.strides(of: input)
      channelStride = input.reduce(1, *)
      pictureStride = channelStride * shape[1]
      rowsPerPicture = outputExtents.reduce(1, *)
      rowCount = rowsPerPicture * shape[0]
    }
  }

  /// Where the values of some rows lie in the input.
  package struct RowTable: Sendable {
    /// Rows in the table.
    package let count: Int
    /// For each tap and row: position of the group's first channel, or −1 for padding.
    let offsets: [Int]
  }

  /// Looks up rows.
  ///
  /// - Parameter rows: Positions, each below `rowCount`.
  package func table(_ rows: some RandomAccessCollection<Int>) -> RowTable {
    var offsets = [Int](repeating: 0, count: rows.count * taps.count)
    var coordinate = [Int](repeating: 0, count: outputExtents.count)
    for (index, row) in rows.enumerated() {
      var rest = row % rowsPerPicture
      let base = row / rowsPerPicture * pictureStride
      for axis in outputExtents.indices.reversed() {
        coordinate[axis] = rest % outputExtents[axis]
        rest /= outputExtents[axis]
      }
      for (number, tap) in taps.enumerated() {
        var offset = base
        for axis in tap.indices {
          let position = coordinates[axis][tap[axis] * outputExtents[axis] + coordinate[axis]]
          if position < 0 {
            offset = -1
            break
          }
          offset += Int(position) * inputStrides[axis]
        }
        offsets[number * rows.count + index] = offset
      }
    }
    return RowTable(count: rows.count, offsets: offsets)
  }

  /// Copies rows of a group, one column after the other.
  ///
  /// - Parameters:
  ///   - table: Which rows.
  ///   - group: Which group, below `groups`.
  ///   - input: The input's elements.
  ///   - panel: Receives `[columns, table.count]` values, columns `stride` apart.
  package func gather(
    _ table: RowTable, group: Int, from input: UnsafePointer<Float>,
    into panel: UnsafeMutablePointer<Float>, stride: Int
  ) {
    table.offsets.withUnsafeBufferPointer { offsets in
      guard let offsets = offsets.baseAddress else { return }
      nonisolated(unsafe) let (places, source, target) = (offsets, input, panel)
      let work = max(taps.count * table.count, 1)
      Parallel.forEachRange(inputsPerGroup, grain: max((1 << 15) / work, 1)) { _, range in
        for channel in range {
          let from = source + (group * inputsPerGroup + channel) * channelStride
          for tap in 0..<taps.count {
            let offsets = places + tap * table.count
            let to = target + (channel * taps.count + tap) * stride
            for index in 0..<table.count {
              let offset = offsets[index]
              to[index] = offset < 0 ? 0 : from[offset]
            }
          }
        }
      }
    }
  }

  // MARK: Geometry

  private static func convolution(
    _ node: Node, _ kernel: [Int], _ input: [Int]
  ) throws(HalfstepError) -> ([Int], [[Int32]]) {
    let window = try WindowGeometry(node, input: input, weightKernel: kernel)
    let tables = kernel.indices.map { axis in
      (0..<kernel[axis]).flatMap { tap in
        (0..<window.output[axis]).map { position -> Int32 in
          let at =
            position * window.strides[axis] + tap * window.dilations[axis] - window.padBegin[axis]
          return at >= 0 && at < input[axis] ? Int32(at) : -1
        }
      }
    }
    return (window.output, tables)
  }

  private static func transposed(
    _ node: Node, _ kernel: [Int], _ input: [Int]
  ) throws(HalfstepError) -> ([Int], [[Int32]]) {
    let rank = kernel.count
    func list(_ key: String, _ count: Int, _ value: Int) throws(HalfstepError) -> [Int] {
      guard let values = node.intsAttribute(key), !values.isEmpty else {
        return [Int](repeating: value, count: count)
      }
      guard values.count == count,
        values.allSatisfy({ $0 >= value && $0 <= WindowGeometry.attributeLimit })
      else {
        throw HalfstepError(
          .invalidGraph, "node '\(node.label)': \(key) \(values) is out of range",
          node: node.label)
      }
      return values
    }
    let strides = try list("strides", rank, 1)
    let dilations = try list("dilations", rank, 1)
    let pads = try list("pads", 2 * rank, 0)
    let extra = try list("output_padding", rank, 0)
    let wanted = node.intsAttribute("output_shape").flatMap { $0.count < rank ? nil : $0 }
    let auto = node.stringAttribute("auto_pad") ?? "NOTSET"
    var output: [Int] = []
    var tables: [[Int32]] = []
    for axis in 0..<rank {
      // What the runtime does: see its TransposedConvolution.
      let reach = (kernel[axis] - 1) * dilations[axis] + 1
      let full = strides[axis] * (input[axis] - 1) + reach + extra[axis]
      var begin = pads[axis]
      var extent = full - pads[axis] - pads[axis + rank]
      if wanted != nil || auto.hasPrefix("SAME") {
        let size = wanted.map { $0[$0.count - rank + axis] } ?? input[axis] * strides[axis]
        let total = max(0, full - size)
        let isLow = auto == "SAME_UPPER" || wanted != nil && auto == "NOTSET"
        begin = isLow ? total / 2 : total - total / 2
        extent = max(size, full - total)
      }
      guard extent > 0, extent <= WindowGeometry.attributeLimit else {
        throw HalfstepError(
          .invalidGraph, "node '\(node.label)': an output of \(extent) along axis \(axis + 2)",
          node: node.label)
      }
      output.append(extent)
      tables.append(
        (0..<kernel[axis]).flatMap { tap in
          (0..<extent).map { position -> Int32 in
            let at = position + begin - tap * dilations[axis]
            guard at >= 0, at % strides[axis] == 0, at / strides[axis] < input[axis] else {
              return -1
            }
            return Int32(at / strides[axis])
          }
        })
    }
    return (output, tables)
  }
}

extension WeightLayout {
  /// Length of a row of the weight matrix.
  package var columns: Int { inputsPerGroup * spatial }

  private func offset(_ group: Int, _ output: Int, _ input: Int) -> Int {
    outputIsOuter
      ? ((group * outputsPerGroup + output) * inputsPerGroup + input) * spatial
      : ((group * inputsPerGroup + input) * outputsPerGroup + output) * spatial
  }

  /// The elements of a group as a matrix `[outputsPerGroup, inputsPerGroup · spatial]`.
  ///
  /// - Parameter elements: Elements in the weight's own order; weights or anything that goes with them.
  package func matrix<Element: BitwiseCopyable>(
    of elements: UnsafeBufferPointer<Element>, group: Int
  ) -> [Element] {
    var result: [Element] = []
    result.reserveCapacity(outputsPerGroup * columns)
    for output in 0..<outputsPerGroup {
      for input in 0..<inputsPerGroup {
        let start = offset(group, output, input)
        result.append(contentsOf: elements[start..<start + spatial])
      }
    }
    return result
  }

  /// Puts a group's matrix back.
  package func store<Element: BitwiseCopyable>(
    _ matrix: [Element], group: Int, into elements: UnsafeMutableBufferPointer<Element>
  ) {
    for output in 0..<outputsPerGroup {
      for input in 0..<inputsPerGroup {
        let start = offset(group, output, input)
        let from = (output * inputsPerGroup + input) * spatial
        for tap in 0..<spatial { elements[start + tap] = matrix[from + tap] }
      }
    }
  }
}

extension Shape {
  fileprivate static func strides(of extents: [Int]) -> [Int] {
    var result = [Int](repeating: 1, count: extents.count)
    for axis in extents.indices.dropLast().reversed() {
      result[axis] = result[axis + 1] * extents[axis + 1]
    }
    return result
  }

  /// The number of elements over a divisor, or nil if it leaves a rest or nothing.
  fileprivate func count(dividedBy divisor: Int) -> Int? {
    elementCount > 0 && elementCount % divisor == 0 ? elementCount / divisor : nil
  }
}
