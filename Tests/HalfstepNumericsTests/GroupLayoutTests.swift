// SPDX-License-Identifier: Apache-2.0
// Groups of elements: runs, rows, gathering, extremes.

import HalfstepNumerics
import TestSupport
import Testing

@Suite struct GroupLayoutTests {
  static let shapes: [[Int]] = [
    [1], [17], [3, 40], [40, 3], [2, 5, 4, 3], [4, 2, 33], [2, 3, 1], [1, 64, 1, 1], [6, 8, 2, 2],
  ]

  static func granularities(rank: Int) -> [Granularity] {
    var result: [Granularity] = [.perTensor]
    for axis in 0..<rank {
      result.append(.perChannel(axis: axis))
      for other in 0..<rank where other != axis {
        for size in [1, 2, 3, 100] {
          result.append(.perBlock(channelAxis: axis, axis: other, size: size))
        }
      }
    }
    return result
  }

  /// Group of an element by the definition: from its coordinates.
  static func group(_ index: Int, _ granularity: Granularity, _ shape: Shape) -> Int {
    func coordinate(_ axis: Int) -> Int { index / shape.strides[axis] % shape[axis] }
    switch granularity {
    case .perTensor: return 0
    case .perChannel(let axis): return coordinate(axis)
    case .perBlock(let channel, let axis, let size):
      return coordinate(channel) * ((shape[axis] + size - 1) / size) + coordinate(axis) / size
    }
  }

  @Test(arguments: shapes) func runsAndRowsFollowTheDefinition(_ dimensions: [Int]) throws {
    let shape = try Shape(dimensions)
    for granularity in Self.granularities(rank: shape.rank) {
      let layout = try GroupLayout(granularity, shape: shape)
      let expected = (0..<shape.elementCount).map { Self.group($0, granularity, shape) }
      #expect(layout.groupCount == (expected.max() ?? 0) + 1)
      var fromRuns = [Int](repeating: -1, count: shape.elementCount)
      for index in 0..<layout.runCount {
        let run = layout.run(index)
        for element in run.offset..<run.offset + run.count {
          #expect(fromRuns[element] == -1)
          fromRuns[element] = run.group
        }
      }
      #expect(fromRuns == expected, "\(granularity) of \(shape)")
      if layout.prefersRows {
        let fromRows = (0..<layout.rowCount).flatMap { row in
          (0..<layout.rowLength).map {
            layout.group(pattern: layout.pattern(ofRow: row), lane: $0)
          }
        }
        #expect(fromRows == expected, "\(granularity) of \(shape)")
      }
    }
  }

  @Test(arguments: shapes) func groupedWorkEqualsElementwiseWork(_ dimensions: [Int]) throws {
    let shape = try Shape(dimensions)
    var random = SeededGenerator(seed: 3)
    let values = (0..<shape.elementCount).map { _ in Float.random(in: -2...3, using: &random) }
    let tensor = try Tensor(values, shape: dimensions)
    for granularity in Self.granularities(rank: shape.rank) {
      let ranges = try tensor.ranges(granularity)
      var groups = [[Float]](repeating: [], count: try granularity.groupCount(for: shape))
      for (index, value) in values.enumerated() {
        groups[Self.group(index, granularity, shape)].append(value)
      }
      #expect(ranges.minimum == groups.map { $0.min() ?? .infinity })
      #expect(ranges.maximum == groups.map { $0.max() ?? -.infinity })
      #expect(ranges.magnitude == groups.map { $0.map(abs).max() ?? 0 })

      // Grids differ from group to group; each element is rounded by its own group's scalar grid.
      for isSigned in [true, false] {
        let encoding = try Encoding(
          bits: 4, isSigned: isSigned, isSymmetric: false, granularity: granularity,
          scales: groups.indices.map { 0.1 + 0.01 * Float($0) },
          zeroPoints: groups.indices.map { Int32($0 % 7) })
        var inPlace = tensor
        try encoding.fakeQuantize(inPlace: &inPlace)
        let output = try encoding.fakeQuantize(tensor).floats()
        #expect(try inPlace.floats() == output)
        #expect(try tensor.floats() == values)
        for (index, value) in values.enumerated() {
          let group = Self.group(index, granularity, shape)
          let zero = Float(encoding.zeroPoints[group])
          let code = (value * (1 / encoding.scales[group])).rounded(.toNearestOrEven)
          let low = Float(encoding.minimumCode) - zero
          let clamped = min(max(code, low), Float(encoding.maximumCode) - zero)
          #expect(output[index] == clamped * encoding.scales[group])
        }
      }
    }
  }

  @Test func emptyTensorsHaveNoRuns() throws {
    for dimensions in [[0], [0, 3], [3, 0], [2, 0, 4]] {
      let shape = try Shape(dimensions)
      for granularity in Self.granularities(rank: shape.rank) {
        guard let layout = try? GroupLayout(granularity, shape: shape) else { continue }
        #expect(layout.runCount == 0 || layout.run(0).count == 0)
        #expect(layout.rowCount == 0)
      }
    }
  }

  @Test func badAxesAndNonFiniteValuesAreRefused() throws {
    let tensor = try Tensor([1, .infinity, 2, 3, 4, 5], shape: [2, 3])
    for granularity in [
      Granularity.perChannel(axis: 2), .perChannel(axis: -1),
      .perBlock(channelAxis: 0, axis: 0, size: 2), .perBlock(channelAxis: 0, axis: 1, size: 0),
      .perBlock(channelAxis: 0, axis: 1, size: -3), .perBlock(channelAxis: 5, axis: 1, size: 2),
    ] {
      #expect(throws: HalfstepError.self) { try tensor.ranges(granularity) }
    }
    for granularity in [Granularity.perTensor, .perChannel(axis: 0), .perChannel(axis: 1)] {
      #expect(throws: HalfstepError.self) { try tensor.ranges(granularity) }
    }
    let one = try Encoding(bits: 8, isSigned: true, isSymmetric: true, scales: [1], zeroPoints: [0])
    let perChannel = try Encoding(
      bits: 8, isSigned: true, isSymmetric: true, granularity: .perChannel(axis: 0),
      scales: [1, 1, 1], zeroPoints: [0, 0, 0])
    #expect(throws: HalfstepError.self) { try perChannel.fakeQuantize(tensor) }
    #expect(throws: HalfstepError.self) { try one.fakeQuantize(Tensor([Int64(1)])) }
  }

  @Test func deadChannelsGetAGuardedScale() throws {
    // Ranges 10³, 1 and 10⁻⁶: the last is below 2⁻²⁰ of the largest.
    let weights = try Tensor([1e3, -1e3, 1, 0, 1e-6, -1e-6], shape: [3, 2])
    for scheme in [RangeScheme.minMax] + searchingSchemes {
      let spec = QuantizerSpec(bits: 8, isSymmetric: true, granularity: .perChannel(axis: 0))
      let scales = try Encoding.make(for: weights, spec: spec, scheme: scheme).scales
      expectClose(scales[2], scales[0] * 0x1p-20, ulps: 1)
      #expect(scales[1] < scales[0] * 0.002)
    }
  }
}

@Suite struct SignalToNoiseTests {
  @Test func decibelsOfWorkedCases() throws {
    // Signal 3² + 4² = 25; noise 0.5² = 0.25: 20 dB. Nine elements reach both loops.
    let reference = try Tensor([3, 4, 0, 0, 0, 0, 0, 0, 0], shape: [9])
    let test = try Tensor([3, 4, 0, 0, 0, 0, 0, 0, 0.5], shape: [9])
    #expect(try abs(SignalToNoise(reference: reference, test: test).decibels - 20) < 1e-12)
    #expect(try SignalToNoise(reference: reference, test: reference).decibels == .infinity)
    let silence = try Tensor([0], shape: [1])
    #expect(
      try SignalToNoise(reference: silence, test: Tensor([1], shape: [1])).decibels == -.infinity)
    #expect(throws: HalfstepError.self) { try SignalToNoise(reference: reference, test: silence) }
    // Squares beyond float's range are no problem.
    let huge = try Tensor([3e38], shape: [1])
    #expect(try abs(SignalToNoise(reference: huge, test: silence).decibels) < 1e-12)
  }
}
