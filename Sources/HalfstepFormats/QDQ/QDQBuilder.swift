// SPDX-License-Identifier: Apache-2.0
// Rebuilds a graph with quantize-dequantize pairs.

import HalfstepGraph
import HalfstepNumerics
import OrderedCollections

/// Rebuilds a graph with quantize-dequantize pairs; one use.
struct QDQBuilder {
  private let table: EncodingTable
  private let options: QDQModel.Options
  /// Domain of the inserted operators.
  private let domain: String
  private var graph: Graph
  private let index: GraphIndex
  private var names: NamePool
  /// Nodes of the result in order.
  private var nodes: [Node] = []
  /// What readers of a tensor read instead.
  private var replacements: [String: String] = [:]
  /// Grids of tensors that have none of their own: operators handed values on unchanged.
  private var inherited: [String: Encoding] = [:]
  private let captured: Set<String>
  private let inputNames: Set<String>

  /// Prepares a build; every tensor that the table names must be a float32 tensor of the graph.
  init(
    _ graph: Graph, _ table: EncodingTable, _ options: QDQModel.Options, domain: String
  ) throws(HalfstepError) {
    self.table = table
    self.options = options
    self.domain = domain
    self.graph = graph
    // Constants inside nodes become initializers, which can be stored rounded.
    for node in graph.nodes where node.isOperator("Constant") {
      guard let name = node.outputs.first, table.parameters[name] != nil,
        case .tensor(let tensor)? = node.attributes["value"]
      else { continue }
      self.graph.initializers[name] = tensor
      self.graph.removeNodes { $0.id == node.id }
    }
    index = GraphIndex(self.graph)
    names = NamePool(graph)
    captured = Set(self.graph.nodes.flatMap(\.capturedInputs))
    inputNames = Set(self.graph.inputs.map(\.name))
    try check()
  }

  /// The graph with pairs.
  mutating func build() throws(HalfstepError) -> Graph {
    for input in graph.inputs where graph.initializers[input.name] == nil {
      if let encoding = table.activations[input.name], index.uses[input.name] != nil {
        replacements[input.name] = try pair(input.name, encoding, reading: input.name)
      }
    }
    for (source, var node) in graph.nodes.enumerated() {
      for input in Set(node.inputs + node.capturedInputs).sorted() {
        if let encoding = table.parameters[input], replacements[input] == nil {
          try addParameter(input, encoding)
        }
      }
      if options.exportsInt32Bias { try quantizeBias(of: &node) }
      node.inputs = node.inputs.map { replacements[$0] ?? $0 }
      let position = nodes.count
      nodes.append(node)
      for (slot, output) in node.outputs.enumerated() {
        if table.activations[output] == nil { inherit(output, slot, of: graph.nodes[source]) }
        guard let encoding = table.activations[output] ?? inherited[output] else { continue }
        if index.outputs.contains(output) || captured.contains(output) {
          let inner = names.tensor("\(output)_float")
          nodes[position].outputs[slot] = inner
          try pair(output, encoding, reading: inner, writing: output)
        } else if index.uses[output] != nil {
          replacements[output] = try pair(output, encoding, reading: output)
        }
      }
    }
    var result = graph
    result.removeNodes { _ in true }
    for node in nodes { result.insert(node) }
    result.removeUnusedInitializers()
    try result.validateAndSort()
    return result
  }

  // MARK: Operators that hand values on

  /// Lets an output take the grid of the first input if the node hands values on unchanged.
  ///
  /// Integer runtimes look for a pair at either side of each operator; without one, what follows such a
  /// node runs in float or is refused. The pair changes nothing, since the values lie on the grid.
  private mutating func inherit(_ output: String, _ slot: Int, of node: Node) {
    guard slot == 0 || node.isOperator("Split"), OperatorTraits.preservesGrid(node),
      !output.isEmpty, !["Col2Im", "NonZero", "SplitToSequence"].contains(node.opType),
      padsWithZeros(node),
      let input = node.input(0),
      let encoding = table.activations[input] ?? inherited[input] ?? table.parameters[input],
      encoding.granularity == .perTensor, encoding.bits <= 16
    else { return }
    inherited[output] = encoding
  }

  /// Whether what a Pad adds lies on any grid; true for other operators.
  private func padsWithZeros(_ node: Node) -> Bool {
    guard node.isOperator("Pad"), node.stringAttribute("mode") ?? "constant" == "constant" else {
      return true
    }
    guard let name = node.input(2) else { return node.floatAttribute("value") ?? 0 == 0 }
    return (try? graph.initializers[name]?.floats())?.allSatisfy { $0 == 0 } ?? false
  }

  // MARK: Checks

  private func check() throws(HalfstepError) {
    var types: [String: DataType] = [:]
    for info in graph.inputs + graph.outputs + Array(graph.valueInfos.values) {
      if let type = info.dataType { types[info.name] = type }
    }
    for (name, encoding) in table.activations {
      guard inputNames.contains(name) || index.producers[name] != nil else {
        throw HalfstepError(
          .encodingMismatch, "encoding of '\(name)': the graph has no such activation")
      }
      if let type = types[name], type != .float32 {
        throw HalfstepError(.typeMismatch, "encoding of '\(name)': expected float32, got \(type)")
      }
      guard encoding.bits <= 16 else {
        throw HalfstepError(
          .invalidArgument,
          "encoding of '\(name)': activations of \(encoding.bits) bits have no QuantizeLinear")
      }
      if case .perBlock = encoding.granularity {
        throw HalfstepError(
          .invalidArgument, "encoding of '\(name)': activations cannot have blocks")
      }
      if encoding.isNarrowerThanStorage, encoding.granularity != .perTensor {
        throw HalfstepError(
          .invalidArgument,
          "encoding of '\(name)': a strict or \(encoding.bits)-bit grid needs one scale")
      }
    }
    for (name, encoding) in table.parameters {
      guard let tensor = graph.initializers[name] else {
        throw HalfstepError(
          .encodingMismatch, "encoding of '\(name)': the graph has no such constant")
      }
      guard tensor.dataType == .float32 else {
        throw HalfstepError(
          .typeMismatch, "encoding of '\(name)': expected float32, got \(tensor.dataType)")
      }
      guard (try? encoding.layout(for: tensor.shape)) != nil else {
        throw HalfstepError(
          .encodingMismatch,
          "encoding of '\(name)': \(encoding.scales.count) scales do not fit shape \(tensor.shape)")
      }
      guard encoding.bits <= 16 || (encoding.isSigned && encoding.zeroPoints.allSatisfy { $0 == 0 })
      else {
        throw HalfstepError(
          .invalidArgument,
          "encoding of '\(name)': \(encoding.bits) bits need a signed grid with zero points 0")
      }
      // A caller may replace the constant of an input at run time, so it cannot be stored as codes.
      if inputNames.contains(name), encoding.bits > 16 || encoding.isNarrowerThanStorage {
        throw HalfstepError(
          .invalidArgument,
          "encoding of '\(name)': a graph input cannot have \(encoding.bits) bits or a strict grid")
      }
    }
  }

  // MARK: Pairs

  /// Adds the pair of an activation, or of a constant that stays in float; returns what it writes.
  @discardableResult
  private mutating func pair(
    _ name: String, _ encoding: Encoding, reading source: String, writing target: String? = nil
  ) throws(HalfstepError) -> String {
    let shape = graph.initializers[name]?.shape ?? .scalar
    var source = source
    if encoding.isNarrowerThanStorage, graph.initializers[name] == nil, inherited[name] == nil {
      source = try clip(name, encoding, source)
    }
    let operands = try addOperands(name, encoding, shape)
    let codes = names.tensor("\(name)_q")
    let result = target ?? names.tensor("\(name)_qdq")
    add("QuantizeLinear", name, [source] + operands, codes, encoding)
    add("DequantizeLinear", name, [codes] + operands, result, encoding)
    return result
  }

  private mutating func add(
    _ type: String, _ name: String, _ inputs: [String], _ output: String, _ encoding: Encoding
  ) {
    var attributes: OrderedDictionary<String, Attribute> = [:]
    switch encoding.granularity {
    case .perTensor: break
    case .perChannel(let axis): attributes["axis"] = .int(Int64(axis))
    case .perBlock(_, let axis, let size):
      attributes["axis"] = .int(Int64(axis))
      attributes["block_size"] = .int(Int64(size))
    }
    nodes.append(
      Node(
        name: names.node("\(name)_\(type)"), opType: type, domain: domain, inputs: inputs,
        outputs: [output], attributes: attributes))
  }

  private mutating func addOperands(
    _ name: String, _ encoding: Encoding, _ shape: Shape
  ) throws(HalfstepError) -> [String] {
    let scale = names.tensor("\(name)_scale")
    let zeroPoint = names.tensor("\(name)_zero_point")
    graph.initializers[scale] = try encoding.scaleOperand(for: shape)
    graph.initializers[zeroPoint] = try encoding.zeroPointOperand(for: shape)
    return [scale, zeroPoint]
  }

  /// Adds a Clip to the ends of a grid that is narrower than its type; returns what it writes.
  private mutating func clip(
    _ name: String, _ encoding: Encoding, _ source: String
  ) throws(HalfstepError) -> String {
    let low = Float(encoding.minimum(group: 0))
    let high = Float(encoding.maximum(group: 0))
    let output = names.tensor("\(name)_clipped")
    var node = Node(
      name: names.node("\(name)_Clip"), opType: "Clip", inputs: [source], outputs: [output])
    if graph.opset < 11 {
      node.attributes = ["min": .float(low), "max": .float(high)]
    } else {
      for (role, bound) in [("minimum", low), ("maximum", high)] {
        let operand = names.tensor("\(name)_\(role)")
        graph.initializers[operand] = try Tensor([bound], shape: [])
        node.inputs.append(operand)
      }
    }
    nodes.append(node)
    return output
  }

  // MARK: Constants

  private mutating func addParameter(
    _ name: String, _ encoding: Encoding
  ) throws(HalfstepError) {
    guard let tensor = graph.initializers[name] else { return }
    if inputNames.contains(name) {
      replacements[name] = try pair(name, encoding, reading: name)
      return
    }
    // A subgraph goes on reading the name, which the pair then writes.
    let keepsName = captured.contains(name)
    let target = keepsName ? name : names.tensor("\(name)_qdq")
    if options.prequantizesConstants || encoding.bits > 16 {
      try addCodes(of: tensor, name, encoding, target)
    } else {
      let source: String
      if keepsName || index.outputs.contains(name) {
        source = names.tensor("\(name)_float")
      } else {
        source = name
      }
      graph.initializers[source] = try encoding.fakeQuantize(tensor)
      let operands = try addOperands(name, encoding, tensor.shape)
      let codes = names.tensor("\(name)_q")
      add("QuantizeLinear", name, [source] + operands, codes, encoding)
      add("DequantizeLinear", name, [codes] + operands, target, encoding)
    }
    if keepsName {
      graph.initializers[name] = nil
    } else {
      replacements[name] = target
    }
  }

  /// Stores a constant as integers and adds the node that turns them into reals.
  private mutating func addCodes(
    of tensor: Tensor, _ name: String, _ encoding: Encoding, _ target: String
  ) throws(HalfstepError) {
    let codes = names.tensor("\(name)_q")
    graph.initializers[codes] = try encoding.codes(of: tensor)
    let operands = try addOperands(name, encoding, tensor.shape)
    add("DequantizeLinear", name, [codes] + operands, target, encoding)
  }

  // MARK: Biases

  /// Makes a layer's bias 32-bit integers whose scale is that of the layer's sums.
  ///
  /// A bias stays in float where that scale is not known or where it does not fit in 32 bits: integer
  /// runtimes take the scale for granted.
  private mutating func quantizeBias(of node: inout Node) throws(HalfstepError) {
    guard node.domain.isEmpty, ["Conv", "ConvTranspose", "Gemm"].contains(node.opType),
      let name = node.input(2), table.parameters[name] == nil, !inputNames.contains(name),
      let bias = graph.initializers[name], bias.dataType == .float32, bias.shape.rank == 1,
      bias.count > 0, (node.floatAttribute("alpha") ?? 1) == 1,
      (node.floatAttribute("beta") ?? 1) == 1,
      let inputScale = node.input(0).flatMap(activationScale),
      let weightScales = node.input(1).flatMap({ channelScales(of: $0, count: bias.count) })
    else { return }
    let scales = weightScales.map { Float(Double(inputScale) * Double($0)) }
    let values = try bias.floats()
    for (channel, value) in values.enumerated() {
      let scale = scales.count == 1 ? scales[0] : scales[channel]
      guard scale.isNormal, abs(Double(value) / Double(scale)) < 2_147_483_647 else { return }
    }
    let encoding = try Encoding(
      bits: 32, isSigned: true, isSymmetric: true,
      granularity: scales.count == 1 ? .perTensor : .perChannel(axis: 0), scales: scales,
      zeroPoints: [Int32](repeating: 0, count: scales.count))
    let target = names.tensor("\(name)_qdq")
    try addCodes(of: bias, name, encoding, target)
    node.inputs[2] = target
  }

  /// The scale of an activation, looked up through operators that hand values on unchanged.
  private func activationScale(_ name: String) -> Float? {
    var name = name
    for _ in 0...graph.nodes.count {
      if let encoding = table.activations[name] {
        return encoding.granularity == .perTensor ? encoding.scales[0] : nil
      }
      guard let producer = index.producers[name],
        OperatorTraits.preservesGrid(graph.nodes[producer]),
        let source = graph.nodes[producer].input(0)
      else { return nil }
      name = source
    }
    return nil
  }

  /// One scale for the whole weight, or one for each of `count` output channels.
  private func channelScales(of name: String, count: Int) -> [Float]? {
    guard let encoding = table.parameters[name] else { return nil }
    switch encoding.granularity {
    case .perTensor: return encoding.scales
    case .perChannel: return encoding.scales.count == count ? encoding.scales : nil
    case .perBlock:
      guard encoding.scales.count % count == 0 else { return nil }
      let blocks = encoding.scales.count / count
      return (0..<count).map { encoding.scales[$0 * blocks..<($0 + 1) * blocks].max()! }
    }
  }
}
