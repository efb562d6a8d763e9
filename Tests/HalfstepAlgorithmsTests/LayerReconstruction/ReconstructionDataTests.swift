// SPDX-License-Identifier: Apache-2.0
// Data cut into pieces: what shares memory, and that it lives as long as the pieces.

import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics
import TestSupport
import Testing

@Suite struct ReconstructionDataTests {
  @Test func piecesOfABatchShareItsMemoryAndKeepIt() throws {
    let graph = try LayerWalkTests.graph()
    var tensor = try LayerWalkTests.data(10)
    let values = try tensor.floats()
    let start = tensor.storage.baseAddress
    let data = try ReconstructionData([["x": tensor]], for: graph)
    let pieces = try data.chunks.map { try #require($0["x"]) }
    #expect(pieces.map { $0.shape[0] } == [4, 4, 2])
    let rowBytes = 192 * MemoryLayout<Float>.stride
    for (index, piece) in pieces.enumerated() {
      #expect(piece.storage.baseAddress == start + index * 4 * rowBytes)
    }
    // Whoever writes to the batch gets memory of his own; without the batch, pieces still live.
    try tensor.withMutableFloats { $0[0] = .nan }
    tensor = try Tensor([0], shape: [1])
    #expect(try pieces.flatMap { try $0.floats() } == values)
  }

  @Test func aPieceOfTwoBatchesIsACopyOfBoth() throws {
    let graph = try LayerWalkTests.graph()
    let tensor = try LayerWalkTests.data(10)
    let parts = try [0..<3, 3..<10].map { ["x": try tensor.rows($0)] }
    let pieces = try ReconstructionData(parts, for: graph).chunks.map { try #require($0["x"]) }
    #expect(pieces.map { $0.shape[0] } == [4, 4, 2])
    #expect(try pieces.flatMap { try $0.floats() } == tensor.floats())
    #expect(pieces[0].storage.baseAddress != tensor.storage.baseAddress)
  }
}
