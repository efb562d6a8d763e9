// SPDX-License-Identifier: Apache-2.0
// Runs a network twice, in float and with a quantized prefix, one linear layer at a time.

import HalfstepGraph
import HalfstepNumerics
import HalfstepRuntime
import OrderedCollections

/// Runs a network twice, in float and with a quantized prefix, and stops before each linear layer.
///
/// At every stop both networks' tensors that later nodes read are kept in an `ActivationStore`; going
/// on runs only the nodes up to the next stop, so that a whole walk costs one run of each network.
/// Layers are visited in the order of the nodes. Not safe for concurrent use.
package final class LayerWalk {
  /// One stop.
  package struct Stop: Sendable {
    /// The layer, as in `graph`.
    package let layer: LinearLayer
    /// The name of its weight.
    package let weight: String
  }

  /// The network behind the layer at work, as it runs when candidates for the layer are compared.
  package struct Rest {
    /// The same nodes as in `graph`.
    let graph: Graph
    /// Grids of its activations; empty to keep them in float.
    let activations: [String: Encoding]

    package init(graph: Graph, activations: [String: Encoding]) {
      self.graph = graph
      self.activations = activations
    }
  }

  /// The float network, sorted; positions are the same in both networks.
  package let graph: Graph
  /// Who writes and reads what in `graph`.
  package let index: GraphIndex
  /// The stops.
  package let stops: [Stop]
  /// Number of pieces that the data is in.
  package var chunkCount: Int { data.chunks.count }
  /// Position of the current stop; -1 before the first.
  package private(set) var position = -1

  /// The network with weights rounded as far as the walk has come.
  private(set) var quantized: Graph
  let activations: [String: Encoding]
  let data: ReconstructionData
  private let store: ActivationStore
  let cuts: _Cuts
  /// What runs behind the layer at work when candidates are compared; nil if they are not.
  let rest: Rest?
  /// The validation of the current stop's candidates, made when it is first asked for.
  var outputs: OutputValidation?
  /// What the float network makes of the pieces that validate, once it was asked for.
  var knownOutputs: [OrderedDictionary<String, Tensor>]?
  /// Whether both networks are still one, so that one run serves both.
  private var isShared: Bool
  /// Slots of the live tensors of each piece.
  private var reference: [[String: ActivationStore.Slot]]
  private var simulated: [[String: ActivationStore.Slot]]

  /// Prepares a walk.
  ///
  /// - Parameters:
  ///   - graph: The float network; valid and sorted.
  ///   - quantized: The same nodes; constants that are quantized but not rounded by the walk's user
  ///     hold their rounded values. Nil if it is the float network until the first change.
  ///   - stops: Layers of `graph` in the order of their nodes.
  ///   - activations: Per-tensor grids of computed tensors in the quantized network; empty to keep
  ///     activations in float.
  ///   - data: Inputs.
  ///   - maximumBytes: Bytes of activations that are held in memory; more goes to a temporary file.
  ///   - rest: What to run behind a layer to compare candidates by the network's outputs; nil not to.
  package init(
    graph: Graph, quantized: Graph?, stops: [Stop], activations: [String: Encoding],
    data: ReconstructionData, maximumBytes: Int, rest: Rest? = nil
  ) {
    self.graph = graph
    self.index = GraphIndex(graph)
    self.quantized = quantized ?? graph
    isShared = quantized == nil && activations.isEmpty
    self.stops = stops
    self.activations = activations
    self.data = data
    self.store = ActivationStore(maximumBytes: maximumBytes)
    self.rest = rest
    self.cuts = _Cuts(
      graph, index, stops.map { ($0.layer.node, $0.layer.input) },
      outputs: rest == nil ? [] : OutputValidation.outputs(of: graph))
    self.reference = Array(repeating: [:], count: data.chunks.count)
    self.simulated = reference
  }

  /// Runs both networks up to the next stop.
  ///
  /// - Parameter progress: Called between pieces; throws to stop the walk.
  /// - Returns: False if there is none.
  /// - Throws: What `Session` throws; `HalfstepError.fileAccess` for the temporary file;
  ///   `.nonFiniteValue` naming a layer whose input is not finite.
  package func advance(
    progress: () throws(HalfstepError) -> Void = {}
  ) throws(HalfstepError) -> Bool {
    guard position + 1 < stops.count else { return false }
    position += 1
    outputs = nil
    let segment = cuts.segments[position]
    if !segment.nodes.isEmpty {
      let float = try session(segment, graph, [:])
      let rounded = isShared ? nil : try session(segment, quantized, activations)
      for chunk in data.chunks.indices {
        try progress()
        try run(float, segment, chunk, &reference)
        if let rounded { try run(rounded, segment, chunk, &simulated) }
      }
    }
    for name in segment.dropped {
      for chunk in data.chunks.indices {
        if let slot = reference[chunk].removeValue(forKey: name) { store.remove(slot) }
        if let slot = simulated[chunk].removeValue(forKey: name) { store.remove(slot) }
      }
    }
    return true
  }

  /// The current layer's input in both networks.
  ///
  /// - Parameter chunk: Which piece, below `chunkCount`.
  /// - Returns: The input in the float network and with the quantized prefix, in the shape that the
  ///   layer reads, float32.
  package func inputs(
    _ chunk: Int
  ) throws(HalfstepError) -> (reference: Tensor, quantized: Tensor) {
    let name = stops[position].layer.input
    if let given = data.chunks[chunk][name] {
      let rounded = try activations[name].map { (grid) throws(HalfstepError) in
        try grid.fakeQuantize(given)
      }
      return (given, rounded ?? given)
    }
    guard let float = reference[chunk][name],
      let rounded = isShared ? float : simulated[chunk][name]
    else {
      if let constant = graph.constant(name, index) { return (constant, constant) }
      throw HalfstepError(.internalError, "layer walk: tensor '\(name)' is not live")
    }
    let given = try store.get(float)
    return (given, isShared ? given : try store.get(rounded))
  }

  /// Changes the quantized network at the current stop.
  package func commit(
    _ change: (inout Graph) throws(HalfstepError) -> Void
  ) throws(HalfstepError) {
    try change(&quantized)
    guard isShared else { return }
    isShared = false
    for chunk in data.chunks.indices {
      for (name, slot) in reference[chunk].sorted(by: { $0.key < $1.key }) {
        simulated[chunk][name] = try store.put(try store.get(slot))
      }
    }
  }

  /// A tensor of the quantized network that is live at the current stop, or a given input.
  func simulatedTensor(_ name: String, _ chunk: Int) throws(HalfstepError) -> Tensor? {
    if let given = data.chunks[chunk][name] { return given }
    let live = isShared ? reference : simulated
    return try live[chunk][name].map { (slot) throws(HalfstepError) in try store.get(slot) }
  }

  /// A computed tensor that is live at the current stop, in both networks; nil if it is not.
  func liveTensors(
    _ name: String, _ chunk: Int
  ) throws(HalfstepError) -> (reference: Tensor, quantized: Tensor)? {
    guard let float = reference[chunk][name] else { return nil }
    let given = try store.get(float)
    if isShared { return (given, given) }
    guard let rounded = simulated[chunk][name] else { return nil }
    return (given, try store.get(rounded))
  }

  // MARK: Segments

  func session(
    _ segment: _Cuts.Segment, _ source: Graph, _ grids: [String: Encoding]
  ) throws(HalfstepError) -> Session {
    var part = Graph()
    part.name = source.name
    part.opsetVersions = source.opsetVersions
    for position in segment.nodes {
      let node = source.nodes[position]
      part.insert(node)
      for name in node.inputs + node.capturedInputs {
        if let value = source.initializers[name] { part.initializers[name] = value }
      }
    }
    part.inputs = segment.inputs.map { name in
      let isGiven = source.inputs.first { $0.name == name }
      return isGiven
        ?? ValueInfo(name: name, dataType: dataTypes[name] ?? .float32, dimensions: nil)
    }
    part.outputs = segment.outputs.map { ValueInfo(name: $0, dataType: nil, dimensions: nil) }
    var present = Set(part.nodes.flatMap(\.outputs))
    for name in segment.inputs where data.chunks[0][name] != nil { present.insert(name) }
    return try Session(graph: part, quantized: grids.filter { present.contains($0.key) })
  }

  /// Element types of stored tensors.
  private var dataTypes: [String: DataType] = [:]

  private func run(
    _ session: Session, _ segment: _Cuts.Segment, _ chunk: Int,
    _ live: inout [[String: ActivationStore.Slot]]
  ) throws(HalfstepError) {
    var inputs: [String: Tensor] = [:]
    for name in segment.inputs {
      if let given = data.chunks[chunk][name] {
        inputs[name] = given
      } else if let slot = live[chunk][name] {
        inputs[name] = try store.get(slot)
      }
    }
    // What nothing after this segment reads need not be held while it runs.
    let results = try session.run(inputs)
    for (name, tensor) in results {
      dataTypes[name] = tensor.dataType
      live[chunk][name] = try store.put(tensor)
    }
    for name in segment.dropped {
      if let slot = live[chunk].removeValue(forKey: name) { store.remove(slot) }
    }
  }
}

/// Where a graph is cut, and which tensors cross each cut.
struct _Cuts {
  struct Segment {
    /// Positions of the nodes that run before the stop, with nodes that compute constants.
    var nodes: [Int] = []
    /// Computed tensors and graph inputs that they read.
    var inputs: [String] = []
    /// Tensors that they write and that later nodes read.
    var outputs: [String] = []
    /// Tensors of the stop before that nothing reads any more.
    var dropped: [String] = []
  }
  private(set) var segments: [Segment] = []
  /// Nodes that depend on a graph input.
  let isDynamic: [Bool]
  /// Nodes that a stop's input or an output depends on.
  let needed: [Bool]

  /// - Parameter outputs: Graph outputs that can be computed from what is live at each stop.
  init(
    _ graph: Graph, _ index: GraphIndex, _ stops: [(node: Int, input: String)],
    outputs: [String] = []
  ) {
    // Nodes that depend on a graph input.
    var dynamic = Set(graph.inputs.map(\.name).filter { graph.initializers[$0] == nil })
    let given = dynamic
    var isDynamic = [Bool](repeating: false, count: graph.nodes.count)
    // Tensors that depend on inputs through shapes only, and whose shapes these are. The runtime wants
    // them computed where they are used, so they count as constants.
    var shapeSources: [String: Set<String>] = [:]
    for (position, node) in graph.nodes.enumerated() {
      let read = node.inputs + node.capturedInputs
      let isShape = node.isOperator("Shape") || node.isOperator("Size")
      if !isShape && read.contains(where: dynamic.contains) {
        isDynamic[position] = true
        dynamic.formUnion(node.outputs)
        continue
      }
      var sources = Set(isShape ? read.filter(dynamic.contains) : [])
      for name in read { sources.formUnion(shapeSources[name] ?? []) }
      if sources.isEmpty { continue }
      for name in node.outputs { shapeSources[name] = sources }
    }
    // Nodes that a stop's input depends on.
    var needed = [Bool](repeating: false, count: graph.nodes.count)
    for name in stops.map(\.input) + outputs {
      if let producer = index.producers[name] { needed[producer] = true }
    }
    for position in graph.nodes.indices.reversed() where needed[position] {
      let node = graph.nodes[position]
      for name in node.inputs + node.capturedInputs {
        if let producer = index.producers[name] { needed[producer] = true }
      }
    }
    // Last position at which each tensor is read.
    var lastUse: [String: Int] = [:]
    for (position, node) in graph.nodes.enumerated() where needed[position] {
      for name in node.inputs + node.capturedInputs {
        lastUse[name] = position
        for source in shapeSources[name] ?? [] { lastUse[source] = position }
      }
    }
    for stop in stops { lastUse[stop.input] = max(lastUse[stop.input] ?? 0, stop.node) }
    for name in outputs { lastUse[name] = graph.nodes.count }
    self.isDynamic = isDynamic
    self.needed = needed

    var live: Set<String> = []
    var start = 0
    for stop in stops {
      var segment = Segment()
      let own = (start..<stop.node).filter { needed[$0] && isDynamic[$0] }
      segment.nodes = Self.withConstants(own, graph, index, isDynamic)
      let written = Set(own.flatMap { graph.nodes[$0].outputs })
      var read: Set<String> = []
      for position in segment.nodes {
        let node = graph.nodes[position]
        read.formUnion(node.inputs + node.capturedInputs)
      }
      segment.inputs = read.filter { (live.contains($0) || given.contains($0)) && !$0.isEmpty }
        .sorted()
      segment.outputs = written.filter { !$0.isEmpty && (lastUse[$0] ?? -1) >= stop.node }
        .sorted()
      segment.dropped = live.filter { (lastUse[$0] ?? -1) < stop.node }.sorted()
      live.subtract(segment.dropped)
      live.formUnion(segment.outputs)
      segments.append(segment)
      start = stop.node
    }
  }

  /// Nodes with those that compute constants for them: these run in every segment that reads their
  /// results.
  static func withConstants(
    _ own: [Int], _ graph: Graph, _ index: GraphIndex, _ isDynamic: [Bool]
  ) -> [Int] {
    var all = Set(own)
    var pending = own
    while let position = pending.popLast() {
      let node = graph.nodes[position]
      for name in node.inputs + node.capturedInputs {
        guard let producer = index.producers[name], !isDynamic[producer],
          all.insert(producer).inserted
        else { continue }
        pending.append(producer)
      }
    }
    return all.sorted()
  }
}
