// SPDX-License-Identifier: Apache-2.0
// Ranges against AIMET 2.42's, case by case.

import HalfstepNumerics
import TestSupport
import Testing

@Suite(.enabled(if: Golden.isPresent)) struct RangeGoldenTests {
  // MARK: - Min-max

  @Test func minMaxEqualsOnnxPackage() throws {
    let rows = try Golden.onnxRows().filter { $0.scheme == "min_max" }
    #expect(rows.count == 435)
    for row in rows {
      let encoding = try Encoding.make(for: row.tensor, spec: row.channelSpec, scheme: .minMax)
      for (group, choice) in row.choices.enumerated() {
        #expect(encoding.scales[group] == Float(choice.scale), "\(row)")
        #expect(Double(encoding.zeroPoints[group]) == choice.zero, "\(row)")
      }
      if row.groups.count == 1 {
        #expect(
          try observed(row.groups[0]).encoding(for: row.spec, scheme: .minMax).scales
            == encoding.scales, "\(row)")
      }
    }
  }

  /// Cases in which AIMET's packages differ, with our number and the reason.
  ///
  /// Where `(maximum − minimum)/N` is below its floor of 2⁻²³, the torch package widens the range by N
  /// floors, so that the scale becomes the floor plus the scale that was too small; the onnx package
  /// takes the floor. We take the floor: it is the finest grid allowed, and closer to the data. Only the
  /// input named "tiny" (−4.7·10⁻⁷...3.2·10⁻⁷) is concerned.
  static let torchDiffers: [(bits: Int, mode: String, torch: Float, ours: Float)] = [
    (4, "asym", 1.7207873e-07, 0x1p-23), (4, "sym", 1.7777279e-07, 0x1p-23),
    (4, "strict", 1.861390e-07, 0x1p-23), (8, "asym", 1.2231926e-07, 0x1p-23),
    (8, "sym", 1.2286951e-07, 0x1p-23), (8, "strict", 1.2289833e-07, 0x1p-23),
    (16, "asym", 1.1922138e-07, 0x1p-23), (16, "sym", 1.1922359e-07, 0x1p-23),
    (16, "strict", 1.1922359e-07, 0x1p-23),
  ]

  @Test func minMaxEqualsTorchPackage() throws {
    let rows = try Golden.torchRows().filter { $0.scheme == "min_max" }
    #expect(rows.count == 261)
    for row in rows {
      let encoding = try Encoding.make(for: row.tensor, spec: row.channelSpec, scheme: .minMax)
      for (group, choice) in row.choices.enumerated() {
        let ours = encoding.scales[group]
        if let known = Self.torchDiffers.first(where: {
          row.input == "tiny" && $0.bits == row.bits && $0.mode == row.mode
        }) {
          #expect(ours == known.ours)
          // The ends of the range scale with the batch, so only the first batch has these numbers.
          if row.batches == "1" { expectClose(Float(choice.scale), known.torch, relative: 1e-5) }
          continue
        }
        // AIMET computes ends in float (two roundings), we the scale in double: 2 units.
        expectClose(ours, Float(choice.scale), ulps: 2, "\(row)")
        #expect(Double(encoding.zeroPoints[group]) == choice.zero, "\(row)")
      }
    }
  }

  @Test func minMaxEqualsTorchQuantizers() throws {
    let inputs = try Golden.arrays("inputs.npz")
    let file = try #require(try Golden.json("torch_encodings.json") as? [String: Any])
    let rows = try #require(file["quantizer_minmax"] as? [[String: Any]])
    #expect(rows.count == 132)
    for row in rows {
      let name = try #require(row["t"] as? String)
      let input = try #require(inputs[name])
      let mode = try #require(row["mode"] as? String)
      let bits = try #require(row["bw"] as? Int)
      let offset = try #require((row["offset"] as? [Double])?.first)
      let scale = try #require((row["scale"] as? [Double])?.first)
      let lowest = try #require(row["qmin"] as? Int)
      let spec = QuantizerSpec(bits: bits, isSymmetric: mode != "asym", isStrict: mode == "strict")
      let encoding = try Encoding.make(for: input, spec: spec, scheme: .minMax)
      if name == "tiny" {
        #expect(encoding.scales == [0x1p-23])
        continue
      }
      // Float against double arithmetic: 1 unit.
      expectClose(encoding.scales[0], Float(scale), ulps: 1, "\(row)")
      // "sym_unsigned" keeps symmetric reals on codes from 0: its zero is half the codes up.
      let zero = -offset + Double(encoding.minimumCode - lowest)
      #expect(Double(encoding.zeroPoints[0]) == zero, "\(row)")
    }
  }

  // MARK: - Searched ranges

  /// AIMET's schemes and ours, with the weight of clipping in the definition of noise.
  static let searches: [(theirs: String, ours: RangeScheme, gamma: Double)] = [
    ("tf_enhanced", .sqnr, 3), ("sqnr", .sqnr, 3), ("sqnr_gamma1", .mse, 1),
  ]

  @Test(arguments: [4, 8, 16]) func searchedRangesAreNoNoisier(bits: Int) throws {
    for package in [try Golden.onnxRows(), try Golden.torchRows()] {
      for (theirs, ours, gamma) in Self.searches {
        var fromValues: [Double] = []
        var fromHistogram: [Double] = []
        for row in package.filter({ $0.scheme == theirs && $0.bits == bits }).thinned {
          let direct = try Encoding.make(for: row.tensor, spec: row.channelSpec, scheme: ours)
          for group in row.groups.indices {
            fromValues.append(row.loss(of: direct, group: group, gamma: gamma))
            #expect(fromValues.last! <= Self.tolerance(bits), "\(row)")
          }
          if row.groups.count == 1 {
            let seen = try observed(row.groups[0]).encoding(for: row.spec, scheme: ours)
            fromHistogram.append(row.loss(of: seen, group: 0, gamma: gamma))
            #expect(fromHistogram.last! <= Self.tolerance(bits), "\(row)")
          }
        }
        // On average ours is better by more than a quarter of a dB, mostly thanks to AIMET's defects.
        if !fromValues.isEmpty {
          #expect(fromValues.reduce(0, +) / Double(fromValues.count) < -0.25)
          #expect(fromHistogram.reduce(0, +) / Double(fromHistogram.count) < -0.25)
        }
      }
    }
  }

  /// Decibels by which our noise may exceed AIMET's.
  ///
  /// 0.05 as promised, with one exception. At 16 bits these inputs have far fewer values (1,152 and
  /// less) than codes, and the step is a small part of a histogram bin: how well single values happen to
  /// hit the grid cannot be known from a histogram, nor found by a search that does not try
  /// every scale. The luck of the draw is then worth up to half a dB either way.
  static func tolerance(_ bits: Int) -> Double {
    bits == 16 ? 0.5 : 0.05
  }

  @Test func percentilesMatchTorchPackage() throws {
    for row in try Golden.torchRows()
    where row.scheme.hasPrefix("percentile") && row.groups.count == 1 {
      let percentile = Double(row.scheme.dropFirst("percentile_".count)) ?? 100
      let encoding = try observed(row.groups[0]).encoding(
        for: row.spec, scheme: .percentile(percentile))
      #expect(row.loss(of: encoding, group: 0, gamma: 1) <= 0.05, "\(row)")
    }
  }
}

extension Array {
  /// All elements, or every ninth in a debug build, which is fifty times as slow.
  fileprivate var thinned: [Element] {
    #if DEBUG
      stride(from: 0, to: count, by: 9).map { self[$0] }
    #else
      self
    #endif
  }
}
