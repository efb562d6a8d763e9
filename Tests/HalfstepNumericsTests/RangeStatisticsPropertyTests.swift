// SPDX-License-Identifier: Apache-2.0
// Statistics are a function of the multiset of values: shuffled, split, merged, serialized.

import HalfstepNumerics
import TestSupport
import Testing

@Suite struct RangeStatisticsPropertyTests {
  /// Multisets that exercise every kind of float.
  static func data(_ kind: Int) -> [Float] {
    var random = SeededGenerator(seed: UInt64(kind) + 1)
    func values(_ count: Int, _ make: (inout SeededGenerator) -> Float) -> [Float] {
      (0..<count).map { _ in make(&random) }
    }
    switch kind {
    case 0: return [0]
    case 1: return [-0.0, 0, -0.0]
    case 2: return [3.25]
    case 3: return [Float.leastNonzeroMagnitude, -Float.leastNonzeroMagnitude, 0x1p-130]
    case 4: return [Float.greatestFiniteMagnitude, -1e-30, 1]
    case 5: return [-Float.greatestFiniteMagnitude, Float.greatestFiniteMagnitude]
    case 6: return [1, 2, 4, 8, 1024, 0x1.fffffep9, -1, -2, -1024]
    case 7: return values(5000) { Float.random(in: -1...1, using: &$0) }
    case 8:  // all magnitudes
      return values(3000) {
        Float(sign: .plus, exponent: Int.random(in: -149...127, using: &$0), significand: 1)
          * Float.random(in: -0.99...0.99, using: &$0)
      }
    case 9: return values(70_000) { max(0, Float.random(in: -6...6, using: &$0)) }  // ReLU
    default: return (0..<66_000).map { Float($0 % 977) - 100 }
    }
  }

  @Test(arguments: 0...10) func stateDependsOnTheMultisetOnly(kind: Int) throws {
    let values = Self.data(kind)
    let whole = observed(values)
    #expect(whole.count == UInt64(values.count))
    #expect(whole.binCounts.reduce(0, +) == whole.count)
    var random = SeededGenerator(seed: 77)
    for parts in [1, 2, 5] {
      let shuffled = values.shuffled(using: &random)
      // Parts are seen by different quantizers in batches, sent as bytes and merged in any order.
      var pieces = (0..<parts).map { _ in RangeStatistics(keepsHistogram: true) }
      var start = 0
      while start < shuffled.count {
        let length = Int.random(in: 1...max(1, values.count / 3), using: &random)
        let end = min(start + length, shuffled.count)
        pieces[Int.random(in: 0..<parts, using: &random)].observe(Array(shuffled[start..<end]))
        start = end
      }
      var merged = RangeStatistics(keepsHistogram: true)
      for piece in pieces.shuffled(using: &random) {
        let received = try RangeStatistics(serialized: piece.serialized())
        #expect(received == piece)
        try merged.merge(received)
      }
      #expect(merged == whole)
      #expect(merged.serialized() == whole.serialized())
      #expect(merged.minimum.bitPattern == whole.minimum.bitPattern)
    }
  }

  @Test(arguments: 0...10) func binsHoldTheValuesOfTheirInterval(kind: Int) {
    let values = Self.data(kind)
    let statistics = observed(values)
    var expected = [UInt64](repeating: 0, count: statistics.binCounts.count)
    for value in values {
      let index = Int((Double(value) / statistics.binWidth).rounded(.down))
      expected[index - statistics.firstBin] += 1
    }
    #expect(statistics.binCounts == expected)
    // Ends are occupied, and a side has at most 4,096 bins.
    #expect(statistics.binCounts.first != 0 && statistics.binCounts.last != 0)
    #expect(statistics.firstBin >= -4096)
    #expect(statistics.firstBin + statistics.binCounts.count <= 4096)
  }

  @Test func nonFiniteValuesAreNotedAndIgnored() {
    for keepsHistogram in [false, true] {
      for bad in [Float.nan, .infinity, -.infinity] {
        for position in [0, 5, 40_000, 99_999] {
          var values = (0..<100_000).map { Float($0 % 100) }
          values[position] = bad
          var seen = RangeStatistics(keepsHistogram: keepsHistogram)
          seen.observe(values)
          values.remove(at: position)
          var clean = RangeStatistics(keepsHistogram: keepsHistogram)
          clean.observe(values)
          #expect(seen.sawNonFinite && !clean.sawNonFinite)
          #expect(seen.count == clean.count && seen.binCounts == clean.binCounts)
          #expect(seen.minimum == clean.minimum && seen.maximum == clean.maximum)
        }
      }
    }
    var nothing = RangeStatistics(keepsHistogram: true)
    nothing.observe([.nan, .infinity])
    #expect(nothing.isEmpty && nothing.sawNonFinite && nothing.binCounts.isEmpty)
  }

  @Test func paddingZerosDoNotCount() {
    let data: [[Float]] = [
      [], [1, 2], [-3, 0, 4], [0, 0], [-0.0, 5], [-2, .nan, 0, 1], Self.data(7), Self.data(9),
    ]
    for values in data {
      for padding in [1, 3, 40_000] {
        for keepsHistogram in [false, true] {
          var padded = RangeStatistics(keepsHistogram: keepsHistogram)
          // Padding lies among the values, as in a blocked layout.
          let zeros = [Float](repeating: 0, count: padding)
          let block = values.prefix(values.count / 2) + zeros + values.dropFirst(values.count / 2)
          Array(block).withUnsafeBufferPointer { padded.observe($0, paddingZeros: padding) }
          var plain = RangeStatistics(keepsHistogram: keepsHistogram)
          plain.observe(values)
          #expect(padded == plain)
        }
      }
    }
    // More padding than zeros is the caller's mistake and costs the zeros only.
    var wrong = RangeStatistics(keepsHistogram: true)
    [Float(1), 0, 2].withUnsafeBufferPointer { wrong.observe($0, paddingZeros: 9) }
    #expect(wrong == observed([1, 2]))
  }

  @Test func malformedBytesThrow() throws {
    var bytes = observed([1, -2, 3, 0.25]).serialized()
    #expect(throws: HalfstepError.self) { try RangeStatistics(serialized: []) }
    #expect(throws: HalfstepError.self) { try RangeStatistics(serialized: Array(bytes.dropLast())) }
    #expect(throws: HalfstepError.self) { try RangeStatistics(serialized: bytes + [0]) }
    // Every single-byte change is refused, or gives a state that survives being used.
    let spec = QuantizerSpec(bits: 8, isSymmetric: false)
    var refused = 0
    for position in bytes.indices {
      let original = bytes[position]
      for flip: UInt8 in [0x01, 0x10, 0x80, 0xFF] {
        bytes[position] = original ^ flip
        do {
          var state = try RangeStatistics(serialized: bytes)
          state.observe([1, 2, -7e30])
          if !state.isEmpty { _ = try state.encoding(for: spec, scheme: .minMax) }
        } catch {
          refused += 1
        }
      }
      bytes[position] = original
    }
    // Bins, count and range check each other, so nearly all changes are noticed.
    #expect(refused > 4 * bytes.count * 9 / 10)
  }

  @Test func differentKindsDoNotMerge() {
    var with = RangeStatistics(keepsHistogram: true)
    #expect(throws: HalfstepError.self) { try with.merge(RangeStatistics(keepsHistogram: false)) }
  }
}
