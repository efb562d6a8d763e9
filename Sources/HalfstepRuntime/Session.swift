// SPDX-License-Identifier: Apache-2.0
// Runs a graph on the CPU.

import HalfstepGraph
import HalfstepNumerics
import OrderedCollections

/// Receives tensors while a graph runs.
package protocol TensorObserver: AnyObject {
  /// Called on the running thread, in execution order, for each observed tensor of a run.
  ///
  /// Large tensors come in several calls, a few images each; each value is shown once.
  /// `values` may be in any memory order and hold `paddingZeros` extra zeros; they die on return.
  func observe(_ tensor: String, values: UnsafeBufferPointer<Float>, paddingZeros: Int)
}

/// A graph prepared to run on the CPU; compiled once for each combination of input shapes.
///
/// Not safe for concurrent use: one session is used by one thread at a time.
package final class Session {
  private let program: Program
  private let inputs: [ValueInfo]
  /// The plans of the latest input shapes, the most recent last.
  private var plans: [(key: [InputKey], plan: Plan)] = []
  private var arena: TensorStorage?

  private static let planLimit = 4

  /// Prepares a graph.
  ///
  /// - Parameters:
  ///   - graph: A valid graph. Constants are used as they are.
  ///   - quantized: Per-tensor encodings by tensor name: right after such a tensor (graph input or
  ///     node output) is computed it is rounded to its grid. Nodes are fused only where no tensor
  ///     of `observed` or `extraOutputs` would disappear; a tensor of `quantized` may become a part
  ///     of a fused node, with the same result.
  ///   - observed: Tensors that `run` hands to its observer, before they are quantized. Tensors
  ///     that do not hold floats are not shown.
  ///   - extraOutputs: Tensors that `run` returns besides the graph's outputs.
  ///   - isForRuns: False if only `outputShapes` will be asked for; then nothing may be run.
  /// - Throws: `HalfstepError.unsupportedOperator` naming every operator it cannot run;
  ///   `.unknownName` for a tensor that the graph does not have.
  package init(
    graph: Graph, quantized: [String: Encoding] = [:], observed: Set<String> = [],
    extraOutputs: [String] = [], isForRuns: Bool = true
  ) throws(HalfstepError) {
    var graph = graph
    try graph.validateAndSort()
    let index = GraphIndex(graph)
    let inputNames = Set(graph.inputs.map(\.name))
    for name in quantized.keys.sorted() + observed.sorted() + extraOutputs {
      guard
        index.producers[name] != nil || inputNames.contains(name)
          || graph.initializers[name] != nil
      else { throw HalfstepError(.unknownName, "the graph has no tensor '\(name)'") }
    }
    for (name, encoding) in quantized {
      guard encoding.granularity == .perTensor else {
        throw HalfstepError(
          .invalidArgument, "tensor '\(name)': expected a per-tensor encoding")
      }
      guard encoding.bits <= QuantizerSpec.bitRange.upperBound else {
        throw HalfstepError(
          .invalidArgument, "tensor '\(name)': expected up to 16 bits, got \(encoding.bits)")
      }
    }
    var results = graph.outputs.map(\.name)
    for name in extraOutputs where !results.contains(name) { results.append(name) }
    let kept = observed.union(extraOutputs)
    let needed = Self.neededNodes(graph, index, kept.union(results))
    try Self.checkOperators(graph, needed)
    for name in graph.initializers.keys {
      if let tensor = graph.initializers[name], Conversion.isHalfOrDouble(tensor.dataType) {
        graph.initializers[name] = try Conversion.convert(tensor, to: .float32)
      }
    }
    self.inputs = graph.inputs
    self.program = Program(
      graph: graph, quantized: quantized, observed: observed, results: results,
      fusion: Fusion(graph, index, needed: needed, kept: kept), needed: needed,
      constants: ConstantStore(), observer: ObserverSlot(), limit: SystemMemory.limit,
      isForRuns: isForRuns)
  }

  /// Runs the graph.
  ///
  /// - Returns: The graph's outputs, then the extra outputs, by name.
  /// - Throws: `HalfstepError` naming the input or node: missing, unknown, wrong type or shape.
  package func run(
    _ inputs: [String: Tensor], observer: (any TensorObserver)? = nil
  ) throws(HalfstepError) -> OrderedDictionary<String, Tensor> {
    let tensors = try checked(inputs)
    let plan = try plan(for: tensors)
    if arena.map({ $0.byteCount < plan.arenaBytes }) ?? true {
      arena = nil
      arena = try TensorStorage(byteCount: plan.arenaBytes)
    }
    if let arena { try plan.bind(arena.baseAddress) }
    for (input, tensor) in zip(plan.inputs, tensors) {
      try input.buffer.bind(tensor.tensor.storage.baseAddress)
    }
    program.observer.current = observer
    defer { program.observer.current = nil }
    try plan.run()
    let results = try plan.collect()
    withExtendedLifetime(tensors) {}
    return results
  }

  /// The shapes of the outputs and extra outputs for inputs of given shapes, without a run.
  ///
  /// - Parameter shapes: Shapes of the inputs; their declared types are assumed.
  /// - Throws: As `run`, for shapes that do not fit.
  package func outputShapes(
    _ shapes: [String: Shape]
  ) throws(HalfstepError) -> [String: Shape] {
    var inputs: [String: Tensor] = [:]
    for (name, shape) in shapes {
      let dataType = self.inputs.first { $0.name == name }?.dataType ?? .float32
      inputs[name] = try Tensor(uninitialized: dataType, shape: shape)
    }
    let plan = try plan(for: try checked(inputs))
    var result: [String: Shape] = [:]
    for output in plan.outputs { result[output.name] = output.value.shape }
    return result
  }

  /// Seconds that each step of a run took, by what it does; for development.
  package func profile(
    _ inputs: [String: Tensor]
  ) throws(HalfstepError) -> [(label: String, seconds: Double)] {
    _ = try run(inputs)
    let tensors = try checked(inputs)
    let plan = try plan(for: tensors)
    for (input, tensor) in zip(plan.inputs, tensors) {
      try input.buffer.bind(tensor.tensor.storage.baseAddress)
    }
    var result: [(label: String, seconds: Double)] = []
    let clock = ContinuousClock()
    for step in plan.steps {
      let start = clock.now
      try step.body()
      let duration = (clock.now - start).components
      result.append(
        (step.label, Double(duration.seconds) + Double(duration.attoseconds) * 1e-18))
    }
    withExtendedLifetime(tensors) {}
    return result
  }

  /// Bytes of intermediate tensors of the largest plan so far.
  package var arenaBytes: Int { arena?.byteCount ?? 0 }

  // MARK: Preparation

  private static func neededNodes(
    _ graph: Graph, _ index: GraphIndex, _ wanted: Set<String>
  ) -> [Bool] {
    var needed = [Bool](repeating: false, count: graph.nodes.count)
    for name in wanted { if let producer = index.producers[name] { needed[producer] = true } }
    for position in graph.nodes.indices.reversed() where needed[position] {
      let node = graph.nodes[position]
      for name in node.inputs + node.capturedInputs {
        if let producer = index.producers[name] { needed[producer] = true }
      }
    }
    return needed
  }

  private static func checkOperators(
    _ graph: Graph, _ needed: [Bool]
  ) throws(HalfstepError) {
    var objections: OrderedSet<String> = []
    var example: [String: String] = [:]
    for (position, node) in graph.nodes.enumerated() where needed[position] {
      guard let objection = OperatorTable.objection(to: node) else { continue }
      if objections.append(objection).inserted { example[objection] = node.label }
    }
    guard let first = objections.first else { return }
    let list = objections.map { "\($0) (node '\(example[$0] ?? "")')" }.joined(separator: ", ")
    throw HalfstepError(
      .unsupportedOperator, "the runtime cannot execute: \(list)", node: example[first])
  }

  // MARK: Inputs

  /// What distinguishes plans.
  private struct InputKey: Hashable {
    let name: String
    let shape: Shape
    let dataType: DataType
  }

  private func checked(
    _ given: [String: Tensor]
  ) throws(HalfstepError) -> [(name: String, tensor: Tensor)] {
    for name in given.keys.sorted() where !inputs.contains(where: { $0.name == name }) {
      throw HalfstepError(
        .unknownName,
        "unknown input '\(name)'; the network's inputs are \(inputs.map(\.name))")
    }
    var symbols: [String: Int] = [:]
    var result: [(name: String, tensor: Tensor)] = []
    for input in inputs {
      guard let tensor = given[input.name] else {
        if program.graph.initializers[input.name] != nil { continue }
        throw HalfstepError(.unknownName, "input '\(input.name)' is missing")
      }
      try Self.check(tensor, against: input, &symbols)
      let isConverted = Conversion.isHalfOrDouble(tensor.dataType)
      result.append(
        (input.name, isConverted ? try Conversion.convert(tensor, to: .float32) : tensor))
    }
    return result
  }

  private static func check(
    _ tensor: Tensor, against input: ValueInfo, _ symbols: inout [String: Int]
  ) throws(HalfstepError) {
    let expected = input.dataType ?? .float32
    guard tensor.dataType == expected else {
      throw HalfstepError(
        .typeMismatch, "input '\(input.name)': expected \(expected), got \(tensor.dataType)")
    }
    guard let bits = expected.bitWidth, bits >= 8 else {
      throw HalfstepError(
        .typeMismatch, "input '\(input.name)': tensors of \(expected) are not supported")
    }
    guard tensor.count > 0 else {
      throw HalfstepError(
        .shapeMismatch, "input '\(input.name)' \(tensor.shape): expected at least one element")
    }
    guard let dimensions = input.dimensions else { return }
    guard dimensions.count == tensor.shape.rank else {
      throw HalfstepError(
        .shapeMismatch,
        "input '\(input.name)' \(tensor.shape): expected rank \(dimensions.count), "
          + "got \(tensor.shape.rank)")
    }
    for (axis, dimension) in dimensions.enumerated() {
      let extent = tensor.shape[axis]
      switch dimension {
      case .fixed(let fixed) where fixed != extent:
        throw HalfstepError(
          .shapeMismatch,
          "input '\(input.name)' \(tensor.shape): expected \(fixed) along axis \(axis), "
            + "got \(extent)")
      case .symbolic(let symbol):
        guard symbols.updateValue(extent, forKey: symbol).map({ $0 == extent }) ?? true else {
          throw HalfstepError(
            .shapeMismatch,
            "input '\(input.name)' \(tensor.shape): '\(symbol)' along axis \(axis) differs from "
              + "its extent elsewhere")
        }
      default: break
      }
    }
  }

  private func plan(
    for tensors: [(name: String, tensor: Tensor)]
  ) throws(HalfstepError) -> Plan {
    let key = tensors.map {
      InputKey(name: $0.name, shape: $0.tensor.shape, dataType: $0.tensor.dataType)
    }
    if let position = plans.firstIndex(where: { $0.key == key }) {
      let entry = plans.remove(at: position)
      plans.append(entry)
      return entry.plan
    }
    let plan = try program.compile(
      tensors.map { ($0.name, $0.tensor.shape, $0.tensor.dataType) })
    if plans.count >= Self.planLimit { plans.removeFirst() }
    plans.append((key, plan))
    return plan
  }
}
