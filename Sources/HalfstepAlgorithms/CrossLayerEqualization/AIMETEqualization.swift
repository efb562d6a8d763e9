// SPDX-License-Identifier: Apache-2.0
// The steps of AIMET's equalization, for comparison with it.

import HalfstepGraph
import HalfstepNumerics

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

extension EqualizationPass {
  /// How AIMET sees a convolution.
  private enum LayerClass {
    case plain
    case depthwise
    case unsupported
  }

  /// Equalizes as AIMET 2.42 does for ONNX: Relu6 becomes Relu; chains of Conv and ConvTranspose
  /// through Relu and PRelu are cut into pairs and depthwise triples, which are scaled once in order;
  /// then high biases move on, whatever the padding.
  mutating func equalizeLikeAIMET(absorbsHighBiases: Bool) throws(HalfstepError) {
    replaceRelu6()
    var pairs: [(first: Int, second: Int, isRectified: Bool)] = []
    for chain in try chains() {
      var at = 0
      while at + 1 < chain.count {
        let classes = chain[at...].prefix(3).map { layerClass($0.place) }
        let members: Int
        switch (classes[0], classes[1]) {
        case (.plain, .plain), (.depthwise, .plain): members = 2
        case (.plain, .depthwise): members = classes.count == 3 && classes[2] == .plain ? 3 : 0
        default: members = 0
        }
        guard members > 0 else {
          at += classes[1] == .unsupported ? 2 : 1
          continue
        }
        let places = chain[at..<at + members].map(\.place)
        try scaleSet(places)
        for step in 1..<members {
          pairs.append((places[step - 1], places[step], chain[at + step - 1].isRectified))
        }
        at += members - 1
      }
    }
    report.iterations = 1
    guard absorbsHighBiases else { return }
    for pair in pairs {
      let (first, second) = (layers[pair.first].layer, layers[pair.second].layer)
      guard first.hasBias, second.hasBias, let norm = graph.foldedBatchNorms[first.output],
        norm.beta.count == first.outputChannels
      else { continue }
      var amounts: [Double] = []
      for channel in norm.beta.indices {
        let (beta, gamma) = (Double(norm.beta[channel]), abs(Double(norm.gamma[channel])))
        amounts.append(pair.isRectified ? max(0, beta - 3 * gamma) : beta)
      }
      try absorb(from: pair.first, into: [pair.second], amounts: amounts)
    }
  }

  private mutating func replaceRelu6() {
    for position in graph.nodes.indices {
      let node = graph.nodes[position]
      guard node.isOperator("Clip") else { continue }
      let low: Float?
      let high: Float?
      if graph.opset < 11 {
        (low, high) = (node.floatAttribute("min"), node.floatAttribute("max"))
      } else {
        low = node.input(1).flatMap { graph.constantScalar($0, index) }
        high = node.input(2).flatMap { graph.constantScalar($0, index) }
      }
      guard low == 0, high == 6 else { continue }
      graph.update(at: position) { node in
        node.opType = "Relu"
        node.inputs = [node.inputs[0]]
        node.attributes = [:]
      }
      report.replacedActivations.append(node.label)
    }
  }

  /// Maximal chains of convolutions, each with whether an activation function follows it.
  private mutating func chains() throws(HalfstepError) -> [[(place: Int, isRectified: Bool)]] {
    var next: [Int: (node: Int, isRectified: Bool)] = [:]
    var convolutions: [LinearLayer] = []
    var hasPrevious: Set<Int> = []
    for position in graph.nodes.indices {
      guard let layer = LinearLayer(graph, at: position, index),
        layer.kind == .conv || layer.kind == .convTranspose
      else { continue }
      convolutions.append(layer)
      var tensor = layer.output
      var isRectified = false
      while let use = index.soleUse(of: tensor), use.input == 0 {
        let node = graph.nodes[use.node]
        if node.isOperator("Relu") || node.isOperator("PRelu") {
          isRectified = true
          tensor = node.outputs[0]
          continue
        }
        if node.isOperator("Conv") || node.isOperator("ConvTranspose") {
          next[position] = (use.node, isRectified)
          hasPrevious.insert(use.node)
        }
        break
      }
    }
    let nodes = Set(convolutions.map(\.node))
    var result: [[(place: Int, isRectified: Bool)]] = []
    for layer in convolutions where !hasPrevious.contains(layer.node) {
      var chain: [(place: Int, isRectified: Bool)] = []
      var position: Int? = layer.node
      while let current = position, nodes.contains(current) {
        guard let member = LinearLayer(graph, at: current, index) else { break }
        chain.append((try add(member), next[current]?.isRectified ?? false))
        position = next[current]?.node
      }
      result.append(chain)
    }
    return result
  }

  private func layerClass(_ place: Int) -> LayerClass {
    let layer = layers[place].layer
    if layer.layout.groups == 1 { return .plain }
    return layer.isDepthwise ? .depthwise : .unsupported
  }

  /// Scales a pair or a triple.
  private mutating func scaleSet(_ places: [Int]) throws(HalfstepError) {
    let first = try ranges(places[0], ofOutputs: true)
    let last = try ranges(places[places.count - 1], ofOutputs: false)
    var factors: [[Double]]
    if places.count == 2 {
      factors = [zip(first, last).map { Self.guarded($0 / ($0 * $1).squareRoot()) }]
    } else {
      let middle = try ranges(places[1], ofOutputs: true)
      factors = [[], []]
      for channel in first.indices {
        let product = first[channel] * middle[channel] * last[channel]
        let root = cbrt(product)
        factors[0].append(Self.guarded(first[channel] / root))
        factors[1].append(Self.guarded(root / last[channel]))
      }
    }
    for (position, place) in places.enumerated() {
      try scale(
        place, outputs: position < factors.count ? factors[position].map { 1 / $0 } : nil,
        inputs: position > 0 ? factors[position - 1] : nil)
    }
    report.sets.append(
      .init(
        layers: places.map { layers[$0].label },
        factors: factors.map { $0.map { Float($0) } }))
  }

  /// Largest weight of each output or input channel.
  private mutating func ranges(_ place: Int, ofOutputs: Bool) throws(HalfstepError) -> [Double] {
    let layout = layers[place].layer.layout
    let slices = try slices(place).floats()
    var result = [Double](
      repeating: 0, count: ofOutputs ? layout.outputChannels : layout.inputChannels)
    for (slice, value) in slices.enumerated() {
      let row = slice / layout.inner
      let channel =
        ofOutputs == layout.outputIsOuter
        ? row : row / layout.outer * layout.inner + slice % layout.inner
      result[channel] = max(result[channel], Double(abs(value)))
    }
    return result
  }

  /// A factor that is zero, infinite or not a number becomes 1.
  private static func guarded(_ factor: Double) -> Double {
    factor.isFinite && factor > 0 ? factor : 1
  }
}
