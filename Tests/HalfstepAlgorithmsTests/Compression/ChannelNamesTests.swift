// SPDX-License-Identifier: Apache-2.0
// Tests of what channel pruning says about channels: who writes and reads them, which stay, and why.

import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics
import TestSupport
import Testing

@Suite struct ChannelNamesTests {
  /// n0, n2: one residual unit, read by n2, n5 and n6; n5 and n6 are strung together for n8.
  static let lines = [
    "a = Conv(x, w[8,3,3,3]) pads=1,1,1,1", "r = Relu(a)",
    "b = Conv(r, v[8,8,3,3], vb[8]) pads=1,1,1,1", "c = Add(b, r)", "d = Relu(c)",
    "e = Conv(d, u[6,8,1,1])", "f = Conv(d, t[4,8,1,1])", "g = Concat(e, f) axis=1",
    "h = Conv(g, q[8,10,1,1]) group=1", "i = Conv(h, p[8,1,3,3]) group=8",
    "y = Conv(i, o[2,8,1,1])",
  ]

  private func compressor(
    _ lines: [String] = lines, _ change: (inout CompressionOptions) -> Void = { _ in }
  ) throws -> Compressor {
    var options = CompressionOptions()
    options.scheme = .channelPruning
    options.importance = .magnitude
    options.reconstructs = false
    change(&options)
    return try Compressor(try TextGraph.make(lines), options)
  }

  private func message(_ body: () throws -> Void) -> String {
    do {
      try body()
      return ""
    } catch {
      return (error as? HalfstepError)?.message ?? "\(error)"
    }
  }

  @Test func unitsKnowTheirLayers() throws {
    let compressor = try compressor()
    let names = compressor.costs.layers.map(\.name)
    let members = compressor.layers.indices.map { position in
      let members = compressor.members(position)
      return (members.writers.map { names[$0] }, members.readers.map { names[$0] })
    }
    #expect(members.map(\.0) == [["n0", "n2"], ["n5"], ["n6"], ["n8"]])
    #expect(members.map(\.1) == [["n2", "n5", "n6"], ["n8"], ["n8"], ["n10"]])
    #expect(try compressor.positions(readBy: "n2") == [0])
    #expect(try compressor.positions(readBy: "t") == [0])
    #expect(try compressor.positions(readBy: "n8") == [1, 2])
    #expect(try compressor.positions(readBy: "n10") == [3])
    #expect(
      message { _ = try compressor.positions(readBy: "n0") }
        == "layer 'n0': its input channels stay: it reads no layer's channels one by one")
    #expect(message { _ = try compressor.positions(readBy: "n9") }.contains("groups"))
    #expect(message { _ = try compressor.positions(readBy: "z") }.contains("no layer 'z'"))
  }

  @Test func splitLayersAreTheirOwnMembers() throws {
    let compressor = try compressor { $0.scheme = .spatialSVD }
    let position = try compressor.position(of: "n2")
    #expect(try compressor.positions(readBy: "n2") == [position])
    let members = compressor.members(position)
    #expect(members.writers == members.readers && members.writers.count == 1)
    #expect(compressor.costs.layers[members.readers[0]].name == "n2")
  }

  @Test func keptIndicesAreThoseOfTheWeights() throws {
    let compressor = try compressor()
    let result = try compressor.compress(units: [5, nil, 3, 7])
    let constants = result.report.constants
    for constant in constants {
      let before = try #require(compressor.graph.initializers[constant.name])
      let after = try #require(result.graph.initializers[constant.result])
      #expect(after.shape[constant.axis] == constant.kept.count)
      #expect(constant.kept == constant.kept.sorted())
      // Axes that are not listed lost nothing.
      let listed = constants.filter { $0.name == constant.name }.map(\.axis)
      for axis in 0..<before.shape.rank where !listed.contains(axis) {
        #expect(before.shape[axis] == after.shape[axis])
      }
    }
    let entries = Set(constants.map { "\($0.name)\($0.axis)" })
    #expect(
      entries == ["w0", "v0", "v1", "vb0", "u1", "t0", "t1", "q0", "q1", "p0", "o1"])
    func kept(_ name: String, _ axis: Int) -> [Int] {
      constants.first { $0.name == name && $0.axis == axis }?.kept ?? []
    }
    #expect(kept("w", 0) == kept("v", 0) && kept("w", 0) == kept("v", 1))
    #expect(kept("w", 0) == kept("vb", 0) && kept("w", 0) == kept("u", 1))
    // The second part of a concatenation lies behind the first one.
    #expect(kept("q", 1) == Array(0..<6) + kept("t", 0).map { $0 + 6 })
    #expect(try compressor.compress(units: [nil, nil, nil, nil]).report.constants.isEmpty)
  }

  @Test func inputKeepersKeepWhatTheyReadAndNothingElse() throws {
    let compressor = try compressor { $0.inputKeepers = ["n8"] }
    #expect(compressor.layers.map(\.name) == ["n0", "n8"])
    // Those who were asked for are no refusals.
    #expect(compressor.refusals.map(\.layer) == ["n10"])
    #expect(message { _ = try compressor.positions(readBy: "n8") }.contains("were to stay"))
    #expect(throws: HalfstepError.self) { try self.compressor { $0.inputKeepers = ["z"] } }
  }

  @Test(arguments: [
    ["b, c = Split(a, z:4,4) axis=1", "d = Add(b, c)"],
    ["d = Slice(a, s:1, t:5, k:1)"],
    ["d = Gather(a, s:0,2,4,6) axis=1"],
  ])
  func positionsCanBeKept(_ middle: [String]) throws {
    let lines =
      ["a = Conv(x, w[8,3,1,1])"] + middle + ["e = Conv(d, v[5,4,1,1])", "y = Conv(e, u[2,5,1,1])"]
    #expect(try compressor(lines).layers.map(\.maximumUnits).count == 2)
    let kept = try compressor(lines) { $0.keepsPositions = true }
    #expect(kept.layers.map(\.weight) == ["v"])
    let reason = try #require(kept.refusals.first { $0.layer == "n0" }?.reason)
    let node = middle.count > 1 ? "(Split)" : middle[0].contains("Slice") ? "(Slice)" : "(Gather)"
    #expect(reason.contains(node))
  }

  @Test func whatBlocksIsNamedAndTheRestIsPruned() throws {
    // A mean over channels needs them all; so do the network's outputs.
    let compressor = try compressor([
      "a = Conv(x, w[8,3,1,1])", "b = Relu(a)", "c = Conv(b, v[6,8,1,1])",
      "d = Softmax(c) axis=1", "e = Conv(d, u[5,6,1,1])", "y = Conv(e, t[2,5,1,1])",
    ])
    #expect(compressor.layers.map(\.name) == ["n0", "n4"])
    #expect(compressor.refusals.map(\.layer) == ["n2", "n5"])
    #expect(compressor.refusals[0].reason.contains("node 'n3' (Softmax)"))
    #expect(compressor.refusals[1].reason.contains("output 'y'"))
    let smaller = try compressor.compress(units: [4, 2]).graph
    #expect(smaller.initializers["v"]?.shape.dimensions == [6, 4, 1, 1])
    #expect(smaller.initializers["u"]?.shape.dimensions == [2, 6, 1, 1])
  }

  @Test(arguments: [1, 2, 3, 5, 8])
  func multiplicityIsRespected(_ multiplicity: Int) throws {
    let compressor = try compressor { $0.multiplicity = multiplicity }
    for (position, layer) in compressor.layers.enumerated() {
      for step in 1..<20 {
        let size = try #require(try compressor.units(position, ratio: Double(step) / 20))
        #expect(size % multiplicity == 0 || size == layer.maximumUnits)
        #expect(Double(size) >= (Double(layer.maximumUnits) * Double(step) / 20).rounded(.down))
      }
    }
    // Units of 8, 6, 4 and 8 channels: with 8 there is nothing to choose.
    guard multiplicity < 8 else { return }
    for (size, layer) in zip(try compressor.select(target: 0.9), compressor.layers) {
      #expect(size.map { $0 % multiplicity == 0 && $0 < layer.maximumUnits } ?? true)
    }
  }
}
