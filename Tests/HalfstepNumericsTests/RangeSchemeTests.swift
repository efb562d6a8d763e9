// SPDX-License-Identifier: Apache-2.0
// Range schemes: worked cases, properties and degenerate data.

import HalfstepNumerics
import TestSupport
import Testing

/// Schemes that search or cut a range, and the grids they are tried on.
let searchingSchemes: [RangeScheme] = [.sqnr, .mse, .percentile(99.9), .entropy]
let allSpecs: [QuantizerSpec] = [2, 3, 4, 8, 16].flatMap { bits in
  [(false, false, false), (true, false, false), (true, true, false), (true, false, true)].map {
    QuantizerSpec(bits: bits, isSymmetric: $0, isStrict: $1, allowsUnsigned: $2)
  }
}

@Suite struct RangeSchemeTests {
  @Test(arguments: searchingSchemes) func allSpecsGiveValidGrids(_ scheme: RangeScheme) throws {
    let data: [[Float]] = [
      [0], [3.5], [-3.5], [3.5, 3.5, 3.5], [1e-7, 2e-7], [3e38, -3e38], [0, 0, 0, 7],
      (0..<1000).map { Float($0) / 100 - 3 }, [0x1p-140, -0x1p-140], [65504, 1e-5],
    ]
    for values in data {
      for spec in allSpecs {
        let encoding = try observed(values).encoding(for: spec, scheme: scheme)
        // Zero is on the grid, and the grid is no wider than a sixteenth over the smallest that
        // covers the data (the search looks that far), or its scale is the smallest allowed one.
        let cover = try observed(values).encoding(for: spec, scheme: .minMax)
        #expect(encoding.scales[0] <= cover.scales[0] * 1.0626)
        let weights = try Tensor(values, shape: [values.count])
        let direct = try Encoding.make(for: weights, spec: spec, scheme: scheme)
        #expect(direct.scales[0] <= cover.scales[0] * 1.0626)
      }
    }
  }

  @Test func constantTensorIsNotClippedAway() throws {
    // AIMET 2.42 (onnx) clips a constant 3.5 to 0.033 at 4 bits, symmetric.
    for bits in [3, 4, 8, 16] {
      let spec = QuantizerSpec(bits: bits, isSymmetric: true)
      for scheme in [RangeScheme.sqnr, .mse, .entropy, .percentile(99)] {
        let encoding = try observed([Float](repeating: 3.5, count: 10)).encoding(
          for: spec, scheme: scheme)
        let output = try encoding.fakeQuantize(Tensor([3.5], shape: [1])).floats()[0]
        expectClose(output, 3.5, ulps: 2, "\(bits) bits \(scheme)")
      }
    }
  }

  @Test func outlierIsClippedWhenThatPays() throws {
    // 100,000 values spread over ±1 and one outlier of 10, 4 bits symmetric. With the whole range the
    // step is 10/7, so everything rounds to 0 or ±1.43: more than the squared 9 that clipping costs.
    var values = (0..<100_000).map { Float($0) / 50_000 - 1 }
    values.append(10)
    let spec = QuantizerSpec(bits: 4, isSymmetric: true)
    for scheme in searchingSchemes where scheme != .percentile(99.9) {
      let encoding = try observed(values).encoding(for: spec, scheme: scheme)
      #expect(encoding.maximum(group: 0) < 2, "\(scheme)")
    }
  }

  @Test func percentileCutsTheStatedShare() throws {
    // 1...1000: the top 1 % is above 990. The largest is below 2^10, so bins are 2^(9−11) = 0.25 wide,
    // and the bin of 990 ends at 990.25.
    let statistics = observed((1...1000).map(Float.init))
    let spec = QuantizerSpec(bits: 8, isSymmetric: false)
    let encoding = try statistics.encoding(for: spec, scheme: .percentile(99))
    #expect(encoding.zeroPoints == [0])
    expectClose(encoding.scales[0], Float(990.25 / 255), ulps: 1)
    let all = try statistics.encoding(for: spec, scheme: .percentile(100))
    expectClose(all.scales[0], 1000 / 255, ulps: 1)
  }

  @Test func fixedBoundsReplaceObservedOnes() throws {
    let spec = QuantizerSpec(bits: 8, isSymmetric: false)
    let statistics = observed([-0.5, 2])
    for scheme in [RangeScheme.minMax] + searchingSchemes {
      let both = try statistics.encoding(
        for: spec, scheme: scheme, fixedMinimum: 0, fixedMaximum: 1)
      #expect(both.scales == [1 / 255] && both.zeroPoints == [0])
      let one = try statistics.encoding(for: spec, scheme: scheme, fixedMinimum: 0)
      #expect(one.zeroPoints == [0])
      #expect(one.maximum(group: 0) <= 2.0001 && one.maximum(group: 0) > 1)
    }
    let empty = RangeStatistics(keepsHistogram: false)
    #expect(
      try empty.encoding(for: spec, scheme: .sqnr, fixedMinimum: -1, fixedMaximum: 1).scales
        == [2 / 255])
  }

  @Test func errorsNameTheirCause() throws {
    let spec = QuantizerSpec(bits: 8, isSymmetric: false)
    func code(_ body: () throws -> Void) -> HalfstepError.Code? {
      do { try body() } catch { return (error as? HalfstepError)?.code }
      return nil
    }
    let empty = RangeStatistics(keepsHistogram: true)
    #expect(code { _ = try empty.encoding(for: spec, scheme: .minMax) } == .emptyStatistics)
    var bare = RangeStatistics(keepsHistogram: false)
    bare.observe([1])
    #expect(code { _ = try bare.encoding(for: spec, scheme: .sqnr) } == .invalidState)
    let seen = observed([1])
    #expect(code { _ = try seen.encoding(for: spec, scheme: .percentile(49)) } == .invalidArgument)
    #expect(
      code { _ = try seen.encoding(for: spec, scheme: .percentile(.nan)) } == .invalidArgument)
    for bits in [1, 17, 31, 33, -1] {
      let bad = QuantizerSpec(bits: bits, isSymmetric: true)
      #expect(code { _ = try seen.encoding(for: bad, scheme: .minMax) } == .invalidArgument)
    }
    #expect(
      code { _ = try seen.encoding(for: spec, scheme: .minMax, fixedMinimum: .nan) }
        == .invalidArgument)
    #expect(
      code {
        _ = try seen.encoding(for: spec, scheme: .minMax, fixedMinimum: 2, fixedMaximum: 1)
      } == .invalidArgument)
    let weights = try Tensor([1, .nan], shape: [2])
    #expect(
      code { _ = try Encoding.make(for: weights, spec: spec, scheme: .minMax) } == .nonFiniteValue)
    let none = try Tensor([Float](), shape: [0, 3])
    #expect(
      code { _ = try Encoding.make(for: none, spec: spec, scheme: .minMax) } == .emptyStatistics)
    var channels = spec
    channels.granularity = .perChannel(axis: 2)
    #expect(
      code { _ = try Encoding.make(for: weights, spec: channels, scheme: .minMax) }
        == .invalidArgument)
  }
}
