// SPDX-License-Identifier: Apache-2.0
// Which scale belongs to which row and block of a layer's weight matrices.

import HalfstepGraph
import HalfstepNumerics

/// The scales of a layer's encoding, and which of them each row and block of its matrices has.
struct LayerScales: Sendable {
  private let base: Encoding
  private let layout: WeightLayout
  private var scales: [Float]
  /// Scale of each group, row and block.
  private let indices: [Int32]
  /// Blocks in a row; 1 unless scales go by blocks of input channels.
  let blocks: Int
  private let blockColumns: Int
  var scaleCount: Int { scales.count }

  /// Starts from scales that cover the weights.
  ///
  /// - Throws: `HalfstepError.invalidArgument` if scales run along neither rows nor blocks of columns.
  init(_ layer: LayerWeights) throws(HalfstepError) {
    let layout = layer.layout
    base = try Encoding.make(for: layer.weight, spec: layer.spec, scheme: .minMax)
    self.layout = layout
    scales = base.scales
    let places = try GroupLayout(layer.spec.granularity, shape: layer.weight.shape)
    var owners = [Int32](repeating: 0, count: places.elementCount)
    for index in 0..<places.runCount {
      let run = places.run(index)
      for element in run.offset..<run.offset + run.count { owners[element] = Int32(run.group) }
    }
    var blockColumns = layout.columns
    if case .perBlock(_, _, let size) = layer.spec.granularity {
      blockColumns = min(size, layout.inputsPerGroup) * layout.spatial
    }
    self.blockColumns = blockColumns
    let blocks = (layout.columns + blockColumns - 1) / blockColumns
    self.blocks = blocks
    var indices: [Int32] = []
    var isRegular = true
    owners.withUnsafeBufferPointer { owners in
      for group in 0..<layout.groups {
        let matrix = layout.matrix(of: owners, group: group)
        for row in 0..<layout.outputsPerGroup {
          for block in 0..<blocks {
            let start = row * layout.columns + block * blockColumns
            let end = min(start + blockColumns, (row + 1) * layout.columns)
            indices.append(matrix[start])
            isRegular = isRegular && matrix[start..<end].allSatisfy { $0 == matrix[start] }
          }
        }
      }
    }
    guard isRegular else {
      throw HalfstepError(
        .invalidArgument,
        "node '\(layer.label)': scales along input channels cannot be rounded layer by layer",
        node: layer.label)
    }
    self.indices = indices
  }

  /// Position of a scale.
  func index(_ group: Int, _ row: Int, _ block: Int) -> Int {
    Int(indices[(group * layout.outputsPerGroup + row) * blocks + block])
  }

  /// The same with each scale multiplied by a factor.
  func scaled(_ factor: (Int) -> Float) -> LayerScales {
    var copy = self
    for index in scales.indices { copy.scales[index] = base.scales[index] * factor(index) }
    return copy
  }

  /// The grid of a group's matrix.
  func grid(_ group: Int) -> RoundingGrid {
    var (values, low, high): ([Float], [Float], [Float]) = ([], [], [])
    for row in 0..<layout.outputsPerGroup {
      for block in 0..<blocks {
        let index = index(group, row, block)
        values.append(scales[index])
        low.append(Float(base.minimumCode - Int(base.zeroPoints[index])))
        high.append(Float(base.maximumCode - Int(base.zeroPoints[index])))
      }
    }
    return RoundingGrid(
      blockColumns: blockColumns, blocks: blocks, scales: values, low: low, high: high)
  }

  /// Takes a group's scales.
  mutating func take(_ grid: RoundingGrid, _ group: Int) {
    for row in 0..<layout.outputsPerGroup {
      for block in 0..<blocks {
        scales[index(group, row, block)] = grid.scales[row * blocks + block]
      }
    }
  }

  /// The encoding with the scales as they are.
  func encoding() throws(HalfstepError) -> Encoding {
    try Encoding(
      bits: base.bits, isSigned: base.isSigned, isSymmetric: base.isSymmetric,
      isStrict: base.isStrict, granularity: base.granularity, scales: scales,
      zeroPoints: base.zeroPoints)
  }
}
