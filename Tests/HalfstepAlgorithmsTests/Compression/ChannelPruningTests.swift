// SPDX-License-Identifier: Apache-2.0
// Tests of channel pruning: what is pruned, what is coupled, what blocks, and what it computes.

import HalfstepAlgorithms
import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import TestSupport
import Testing

@Suite struct ChannelPruningTests {
  /// A network, the layers that stand for its units, and how many channels each has.
  struct Network: Sendable, CustomTestStringConvertible {
    let name: String
    let lines: [String]
    let units: [String: Int]
    var shape: [Int] = [1, 3, 8, 8]
    var testDescription: String { name }
  }

  static let networks = [
    Network(
      name: "chain, batch norm, pools, flatten",
      lines: [
        "a = Conv(x, w[8,3,3,3], b[8]) pads=1,1,1,1",
        "n = BatchNormalization(a, g[8], h[8], m[8], v+[8])", "r = Relu(n)",
        "p = MaxPool(r) kernel_shape=2,2 strides=2,2", "c = Conv(p, u[6,8,3,3]) pads=1,1,1,1",
        "k = Clip(c, lo~0, hi~6)", "q = AveragePool(k) kernel_shape=2,2 strides=2,2",
        "f = Flatten(q)", "d = Gemm(f, t[24,7], s[7])", "e = Tanh(d)",
        "y = Gemm(e, z[5,7], o[1,5]) transB=1",
      ], units: ["n0": 8, "n4": 6, "n8": 7]),
    Network(
      name: "residual additions with a downsampling layer",
      lines: [
        "a = Conv(x, w[8,3,3,3]) pads=1,1,1,1", "r = Relu(a)",
        "b = Conv(r, v[5,8,3,3]) pads=1,1,1,1", "s = Relu(b)",
        "c = Conv(s, u[8,5,3,3]) pads=1,1,1,1", "d = Add(c, r)", "e = Relu(d)",
        "f = Conv(e, t[10,8,3,3]) pads=1,1,1,1 strides=2,2", "g = Relu(f)",
        "h = Conv(g, q[10,10,1,1])", "i = Conv(e, o[10,8,1,1]) strides=2,2", "j = Sum(h, i)",
        "k = GlobalAveragePool(j)", "l = Flatten(k)", "y = Gemm(l, p[10,4])",
      ], units: ["n0": 8, "n2": 5, "n7": 10, "n9": 10]),
    Network(
      name: "concatenation, and addition behind it",
      lines: [
        "a = Conv(x, w[4,3,1,1])", "b = Conv(x, v[6,3,3,3]) pads=1,1,1,1",
        "c = Concat(a, b, x) axis=1", "d = Conv(c, u[8,13,1,1])", "e = Concat(a, a, d) axis=1",
        "f = Conv(e, t[16,16,1,1])", "g = Add(f, e)", "y = Conv(g, s[3,16,1,1])",
      ], units: ["n0": 12, "n1": 6]),
    Network(
      name: "depthwise layers and a gate",
      lines: [
        "a = Conv(x, w[8,3,1,1])", "r = HardSwish(a)",
        "d = Conv(r, v[8,1,3,3], b[8]) group=8 pads=1,1,1,1", "s = Relu(d)",
        "g = GlobalAveragePool(s)", "h = Conv(g, u[4,8,1,1])", "i = Relu(h)",
        "j = Conv(i, t[8,4,1,1])", "k = Sigmoid(j)", "l = Mul(k, s)",
        "m = Conv(l, q[16,8,1,1])", "n = Conv(m, o[32,1,3,3]) group=16",
        "y = Conv(n, p[3,32,1,1])",
      ], units: ["n0": 8, "n5": 4, "n10": 16]),
    Network(
      name: "groups lose the same channels each",
      lines: [
        "a = Conv(x, w[8,3,1,1])", "b = Conv(a, v[12,4,3,3]) group=2 pads=1,1,1,1", "c = Relu(b)",
        "d = Conv(c, u[6,12,1,1])", "e = ConvTranspose(d, t[6,4,2,2], s[8]) group=2 strides=2,2",
        "y = Conv(e, q[3,8,1,1])",
      ], units: ["n0": 4, "n1": 6, "n3": 3, "n4": 4]),
    Network(
      name: "slopes that are reshaped for their only reader, as PyTorch exports them",
      lines: [
        "a = Conv(x, w[6,3,1,1])", "s = Reshape(v[6], k:6,1,1)", "b = PRelu(a, s)",
        "t = Unsqueeze(u[6], i:1,2)", "c = PRelu(b, t)", "d = Conv(c, q[4,6,1,1])",
        "e = Reshape(p[4], o:-1,1,1)", "f = PRelu(d, e)", "y = Conv(f, r[3,4,1,1])",
      ], units: ["n0": 6, "n5": 4]),
    Network(
      name: "slopes that two nodes read stay, and so do their channels",
      lines: [
        "a = Conv(x, w[6,3,1,1])", "s = Reshape(v[6], k:6,1,1)", "b = PRelu(a, s)",
        "c = Conv(b, q[6,6,1,1])", "d = PRelu(c, s)", "e = Conv(d, p[5,6,1,1])",
        "y = Conv(e, r[3,5,1,1])",
      ], units: ["n5": 5]),
    Network(
      name: "split and slice",
      lines: [
        "a = Conv(x, w[10,3,1,1])", "b, c = Split(a, z:4,6) axis=1", "d = Conv(b, v[5,4,1,1])",
        "e = Slice(c, s:1, t:5, k:1)", "f = Slice(c, o:-9, p:2, k)", "g = Conv(e, u[4,4,1,1])",
        "h = Concat(d, g, f) axis=-3", "y = Conv(h, q[3,11,1,1])",
      ], units: ["n0": 10, "n2": 5, "n5": 4]),
    Network(
      name: "products over the last axis",
      lines: [
        "a = MatMul(x, w[12,8])", "b = Add(a, v[8])", "c = Gelu(b)", "d = MatMul(c, u[8,12])",
        "e = Add(d, x)", "f = LayerNormalization(e, t[12], s[12]) axis=-1",
        "g = MatMul(f, q[12,6])",
        "h = Transpose(g) perm=0,2,1", "i = Softmax(h) axis=2", "j = Transpose(i) perm=0,2,1",
        "y = MatMul(j, p[6,4])",
      ], units: ["n0": 8, "n6": 6], shape: [1, 5, 12]),
    Network(
      name: "transposed, padded, resized, rearranged",
      lines: [
        "a = ConvTranspose(x, w[3,8,2,2], b[8]) strides=2,2", "r = PRelu(a, s[8,1,1])",
        "p = Pad(r, z:0,0,1,1,0,0,1,1)", "c = Conv(p, v[8,8,3,3])",
        "d = DepthToSpace(c) blocksize=2 mode=CRD", "e = Mul(d, m[1,2,1,1])",
        "f = SpaceToDepth(e) blocksize=2", "g = Conv(f, u[6,8,1,1])",
        "h = Resize(g, , , i:1,6,10,10) mode=nearest", "j = LeakyRelu(h)",
        "y = Conv(j, t[3,6,1,1])",
      ], units: ["n0": 8, "n3": 2, "n7": 6]),
    Network(
      name: "constants, reductions, reshapes, indices",
      lines: [
        "a = Conv(x, w[8,3,3,3])", "b = Add(a, b0[8,1,1])", "c = Mul(s0[1,8,1,1], b)",
        "d = Div(c, k~2)", "e = Gather(d, i:7,0,2,2,5) axis=1", "f = Conv(e, v[6,5,1,1])",
        "g = ReduceMean(f) axes=2,3 keepdims=0", "h = Reshape(g, q:1,6)", "j = Gemm(h, u[6,5])",
        "l = Unsqueeze(j, o:2,3)", "m = Conv(l, t[4,5,1,1])", "n = Squeeze(m, o)",
        "y = Gemm(n, p[4,3])",
      ], units: ["n0": 8, "n5": 6, "n8": 5, "n10": 4]),
    Network(
      name: "shapes that are computed",
      lines: [
        "a = Conv(x, w[6,3,3,3]) strides=2,2", "s = Shape(a)", "i = Gather(s, z:0) axis=0",
        "j = Concat(i, o:-1) axis=0", "f = Reshape(a, j)", "g = Gemm(f, v[54,8])",
        "h = Reshape(g, q:-1,4,2)", "y = MatMul(h, t[2,3])",
      ], units: ["n0": 6]),
  ]

  private func compressor(
    _ graph: Graph, ignoring: [String] = [], multiplicity: Int = 1,
    importance: ChannelImportance = .magnitude, reconstructs: Bool = false
  ) throws -> Compressor {
    var options = CompressionOptions()
    options.scheme = .channelPruning
    options.importance = importance
    options.reconstructs = reconstructs
    options.ignoredLayers = ignoring
    options.multiplicity = multiplicity
    return try Compressor(graph, options)
  }

  private func output(_ graph: Graph, _ x: Tensor) throws -> [Float] {
    try #require(try Session(graph: graph).run(["x": x])["y"]).floats()
  }

  private func input(_ shape: [Int], seed: UInt64 = 3) throws -> Tensor {
    var random = SeededGenerator(seed: seed)
    return try Tensor(random.floats(shape.reduce(1, *)), shape: shape)
  }

  /// The network as it was, with zeros where layers read a channel that goes.
  private func masked(_ graph: Graph, _ removal: ChannelRemoval) throws -> Graph {
    var result = graph
    var names = NameAllocator(graph)
    let index = GraphIndex(graph)
    for item in removal.dependencies.layers where !item.losesGroups {
      guard let inputs = item.inputs else { continue }
      let layout = item.layer.layout
      let factors = inputs.map { removal.isRemoved[$0] ? 0.0 : 1.0 }
      let weight = try layout.scaled(
        item.layer.weight(in: graph, index), outputFactors: nil, inputFactors: factors)
      item.layer.setWeight(weight, in: &result, index, names: &names)
    }
    return result
  }

  private func expectEqual(_ a: [Float], _ b: [Float], _ source: SourceLocation) {
    #expect(a.count == b.count && !a.isEmpty, sourceLocation: source)
    let range = b.map(abs).max() ?? 0
    // Sums of fewer terms in another order: up to 13 layers of 150 terms, 2⁻²⁴ of the range each.
    for (x, y) in zip(a, b) { #expect(abs(x - y) <= 1e-4 * range, sourceLocation: source) }
  }

  /// Prunes and checks against the masked network, and the costs against the new network's.
  @discardableResult
  private func check(
    _ graph: Graph, _ compressor: Compressor, _ units: [Int?], _ shape: [Int],
    sourceLocation: SourceLocation = #_sourceLocation
  ) throws -> Graph {
    let result = try compressor.compress(units: units)
    let x = try input(shape)
    let removal = try #require(try compressor.removal(units: units))
    var copy = result.graph
    try copy.validateAndSort()
    expectEqual(try output(copy, x), try output(masked(graph, removal), x), sourceLocation)
    let costs = try ModelCosts(copy, inputShapes: [:])
    #expect(costs.total == result.report.after, sourceLocation: sourceLocation)
    #expect(costs.total == compressor.cost(units: units), sourceLocation: sourceLocation)
    #expect(
      costs.layers.map(\.cost) == result.report.layers.map(\.after), sourceLocation: sourceLocation)
    return copy
  }

  @Test(arguments: networks)
  func prunedIsMasked(_ network: Network) throws {
    let graph = try TextGraph.make(network.lines, inputs: [("x", network.shape)])
    let compressor = try compressor(graph)
    let found = Dictionary(
      uniqueKeysWithValues: compressor.layers.map { ($0.name, $0.maximumUnits) })
    #expect(found == network.units)
    for ratio in [0.99, 0.5, 0.01] {
      let all = try compressor.layers.indices.map { position in
        try max(compressor.units(position, ratio: ratio) ?? 0, ratio < 0.1 ? 2 : 1)
      }
      try check(graph, compressor, all, network.shape)
    }
    // Each unit alone.
    for position in compressor.layers.indices {
      var units = [Int?](repeating: nil, count: compressor.layers.count)
      units[position] = max(2, compressor.layers[position].maximumUnits / 2)
      let smaller = try check(graph, compressor, units, network.shape)
      let count = smaller.initializers.values.reduce(0) { $0 + $1.count }
      let isWhole = units[position] == compressor.layers[position].maximumUnits
      #expect(isWhole || count < graph.initializers.values.reduce(0) { $0 + $1.count })
    }
  }

  @Test(arguments: networks)
  func ratioOneIsTheIdentity(_ network: Network) throws {
    let graph = try TextGraph.make(network.lines, inputs: [("x", network.shape)])
    let compressor = try compressor(graph)
    let units = try compressor.layers.indices.map { try compressor.units($0, ratio: 1) }
    let result = try compressor.compress(units: units)
    let x = try input(network.shape)
    #expect(try output(result.graph, x) == output(graph, x))
    #expect(result.report.after == result.report.before)
    // All channels, said in numbers, are the same.
    let all = try compressor.compress(units: compressor.layers.map(\.maximumUnits))
    #expect(try output(all.graph, x) == output(graph, x))
  }

  /// A network with residual blocks, concatenations, gates and depthwise layers at random.
  static func random(_ seed: UInt64) throws -> Graph {
    var random = SeededGenerator(seed: seed)
    var lines = ["t0 = Conv(x, w0[8,3,3,3]) pads=1,1,1,1"]
    var channels = ["t0": 8]
    var last = "t0"
    for step in 1...9 {
      let count = channels[last] ?? 8
      let name = "t\(step)"
      switch Int.random(in: 0..<7, using: &random) {
      case 0:
        let other = Int.random(in: 3...12, using: &random)
        lines.append("\(name) = Conv(\(last), w\(step)[\(other),\(count),3,3]) pads=1,1,1,1")
        channels[name] = other
      case 1:
        lines.append(
          "\(name) = Conv(\(last), w\(step)[\(count),1,3,3]) group=\(count) pads=1,1,1,1")
        channels[name] = count
      case 2:
        // A residual block; the sum with itself if nothing else fits.
        let partner = channels.keys.sorted().filter { channels[$0] == count }.randomElement(
          using: &random)!
        lines.append("r\(step) = Relu(\(last))")
        lines.append(
          "c\(step) = Conv(r\(step), w\(step)[\(count),\(count),1,1], b\(step)[\(count)])")
        lines.append("\(name) = Add(c\(step), \(partner))")
        channels[name] = count
      case 3:
        let partner = channels.keys.sorted().randomElement(using: &random)!
        lines.append("\(name) = Concat(\(last), \(partner)) axis=1")
        channels[name] = count + channels[partner]!
      case 4:
        lines.append(
          "\(name) = BatchNormalization(\(last), g\(step)[\(count)], h\(step)[\(count)], "
            + "m\(step)[\(count)], v\(step)+[\(count)])")
        channels[name] = count
      case 5:
        lines.append("q\(step) = GlobalAveragePool(\(last))")
        lines.append("k\(step) = Conv(q\(step), w\(step)[\(count),\(count),1,1])")
        lines.append("s\(step) = Sigmoid(k\(step))")
        lines.append("\(name) = Mul(\(last), s\(step))")
        channels[name] = count
      default:
        lines.append("\(name) = Relu(\(last))")
        channels[name] = count
      }
      last = name
    }
    lines.append("f = Flatten(\(last))")
    lines.append("y = Gemm(f, wy[\(channels[last]! * 64),5], by[5])")
    return try TextGraph.make(lines)
  }

  @Test(arguments: Array(UInt64(0)..<40))
  func randomNetworks(_ seed: UInt64) throws {
    let graph = try Self.random(seed)
    let compressor = try compressor(graph)
    #expect(!compressor.layers.isEmpty)
    var random = SeededGenerator(seed: seed)
    let curves = try #require(try compressor.removal(units: compressor.layers.map { _ in nil }))
    #expect(!curves.isRemoved.contains(true))
    let units = compressor.layers.map { layer in
      Int.random(in: min(3, layer.maximumUnits)...layer.maximumUnits, using: &random)
    }
    try check(graph, compressor, units, [1, 3, 8, 8])
  }

  @Test func zeroedChannelsGoExactly() throws {
    var graph = try TextGraph.make(Self.networks[1].lines)
    // Every layer that reads the first unit (n0: 8 channels) ignores channels 1, 4 and 6.
    for name in ["v", "t", "o"] {
      let shape = try #require(graph.initializers[name]?.shape)
      var values = try #require(graph.initializers[name]).floats()
      let run = shape.dimensions[2...].reduce(1, *)
      for index in values.indices where [1, 4, 6].contains(index / run % 8) { values[index] = 0 }
      graph.initializers[name] = try Tensor(values, shape: shape.dimensions)
    }
    let x = try input([1, 3, 8, 8])
    for importance in [ChannelImportance.magnitude, .reconstruction] {
      var compressor = try compressor(
        graph, importance: importance, reconstructs: importance == .reconstruction)
      if importance == .reconstruction {
        try compressor.calibrate([["x": try input([16, 3, 8, 8], seed: 8)]])
      }
      let result = try compressor.compress(units: [5, nil, nil, nil])
      #expect(result.graph.initializers["w"]?.shape.dimensions == [5, 3, 3, 3])
      #expect(result.graph.initializers["u"]?.shape.dimensions == [5, 5, 3, 3])
      expectEqual(try output(result.graph, x), try output(graph, x), #_sourceLocation)
      #expect(try compressor.errorCurves()[0][5] <= 1e-6)
    }
  }

  @Test func magnitudeIsAIMETs() throws {
    // n4 reads n0 with squared weights 1, 16, 4, 0.25: half of the channels are 1 and 2.
    var graph = try TextGraph.make([
      "a = Conv(x, w[4,3,1,1])", "b = Relu(a)", "c = Conv(b, v[1,4,1,1])",
      "d = Flatten(c)", "y = Gemm(d, u[64,2])",
    ])
    graph.initializers["v"] = try Tensor([1, -4, 2, 0.5], shape: [1, 4, 1, 1])
    let compressor = try compressor(graph)
    #expect(try compressor.units(0, ratio: 0.5) == 2)
    let smaller = try compressor.compress(units: [2]).graph
    #expect(try smaller.initializers["v"]?.floats() == [-4, 2])
    let old = try #require(graph.initializers["w"]).floats()
    #expect(try smaller.initializers["w"]?.floats() == Array(old[3..<9]))
    // Shares of 21.25 that are lost with 0 to 4 channels.
    let curve = try compressor.errorCurves()[0]
    for (share, expected) in zip(curve, [1, 5.25 / 21.25, 1.25 / 21.25, 0.25 / 21.25, 0]) {
      #expect(abs(share - expected) <= 1e-12)
    }
  }
}
