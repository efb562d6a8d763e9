// SPDX-License-Identifier: Apache-2.0
// Runs the layers with large tensors a few images at a time, so that tensors stay in cache.

import CDNNL
import HalfstepGraph
import HalfstepNumerics

/// A node, or a chain of nodes that one primitive computes, in the order of compilation.
struct Unit {
  /// Positions in the graph; the leader of a chain first.
  let positions: [Int]
  /// Whether the first node can take others with it.
  let isChain: Bool
}

/// The first layers of a network, compiled for a part of the batch and run once for each part.
///
/// Early layers have large tensors: those of a whole batch leave the caches between the layer that
/// writes and the layer that reads them. Run image by image, they do not. Only operators that
/// treat every image on its own take part, so that each value comes from the same operations.
struct Front {
  /// The caller's tensors, of the whole batch.
  var inputs: [(name: String, buffer: Buffer)] = []
  /// Number of units that the front covers.
  var unitCount = 0
  /// What later units and the caller read, of the whole batch.
  var values: [(name: String, value: Value)] = []
  /// Runs the front.
  var step: Step
}

extension Program {
  /// Units that contribute to something that was asked for.
  var units: [Unit] {
    var units: [Unit] = []
    for position in graph.nodes.indices where needed[position] {
      if fusion.absorbed.contains(position) { continue }
      if let chain = fusion.chains[position] {
        units.append(Unit(positions: chain, isChain: true))
      } else {
        // Alone, but its result may have to be rounded.
        units.append(
          Unit(positions: [position], isChain: Fusion.canLead(graph.nodes[position])))
      }
    }
    return units
  }

  /// Bytes of one image's tensor from which a unit belongs to the front: half of a core's
  /// second-level cache, and work enough for the start of a loop not to matter.
  private static let largeTensor = 1 << 19
  /// Bytes of a batch's tensor that the caches are taken to hold anyway.
  private static let cachedTensor = 1 << 22
  /// Units without a large tensor after which no other one is expected.
  private static let patience = 8

  /// Compiles the front for inputs of given shapes.
  ///
  /// - Returns: Nil if nothing is gained, or if the inputs have no common batch.
  func compileFront(
    _ inputs: [(name: String, shape: Shape, dataType: DataType)], _ units: [Unit]
  ) throws(HalfstepError) -> Front? {
    guard let first = inputs.first?.shape, first.rank > 0 else { return nil }
    let batch = first[0]
    guard batch > 1, inputs.allSatisfy({ $0.shape.rank > 0 && $0.shape[0] == batch }) else {
      return nil
    }
    // An image for every two threads, and parts of equal size.
    let part = (1...max(1, min(Parallel.maximumThreads / 2, batch / 2))).last {
      batch.isMultiple(of: $0)
    }
    guard let part else { return nil }
    let lowering = Lowering(
      opset: graph.opset, constants: constants, limit: limit, isForRuns: isForRuns)
    var windows: [Window] = []
    for input in inputs {
      let shape = try input.shape.replacingBatch(part)
      let whole = Buffer(
        external: Tensor.byteCount(of: input.dataType, count: input.shape.elementCount))
      let bytes = Tensor.byteCount(of: input.dataType, count: shape.elementCount)
      guard bytes * (batch / part) == whole.byteCount else { return nil }
      let value = Value(
        shape: shape, dataType: input.dataType, buffer: Buffer(external: bytes))
      windows.append(Window(part: value.buffer, whole: whole))
      try finish(input.name, value, lowering)
    }
    defineInitializers(lowering)

    var unitCount = 0
    var stepCount = 0
    var large = 0
    var small = 0
    for (index, unit) in units.enumerated() {
      if isConstant(unit, lowering) {
        try compile(unit, lowering)
        continue
      }
      guard small < Self.patience, isPerImage(unit, part, lowering) else { break }
      try compile(unit, lowering)
      guard let isLarge = isLarge(unit, part, batch, lowering) else { break }
      small += 1
      if isLarge {
        (unitCount, stepCount) = (index + 1, lowering.steps.count)
        (large, small) = (large + 1, 0)
      }
    }
    // A loop over parts of a single layer keeps nothing in cache.
    guard large > 1 else { return nil }
    return try assemble(
      lowering, inputs.map(\.name), &windows, units: units, unitCount: unitCount,
      stepCount: stepCount, parts: batch / part)
  }

  // MARK: - What may take part

  /// Operators whose first input is computed, and all others are constants.
  private static let layers: Set<String> = [
    "Conv", "ConvTranspose", "BatchNormalization", "Relu", "Clip", "LeakyRelu", "Sigmoid",
    "HardSigmoid", "HardSwish", "Tanh", "Elu", "Identity", "MaxPool", "AveragePool",
    "GlobalAveragePool", "GlobalMaxPool",
  ]
  /// Operators that broadcast their inputs.
  private static let broadcasting: Set<String> = [
    "Add", "Sub", "Mul", "Div", "Min", "Max", "PRelu",
  ]

  /// Whether a unit is a node that only constants enter.
  private func isConstant(_ unit: Unit, _ lowering: Lowering) -> Bool {
    let node = graph.nodes[unit.positions[0]]
    return unit.positions.count == 1 && node.capturedInputs.isEmpty
      && node.inputs.allSatisfy { $0.isEmpty || lowering.value(named: $0)?.constant != nil }
  }

  /// Whether a unit computes every image from that image alone.
  private func isPerImage(_ unit: Unit, _ part: Int, _ lowering: Lowering) -> Bool {
    // Results of the unit's own nodes have the rank of its first input.
    var inside: Set<String> = []
    var rank: Int?
    for position in unit.positions {
      let node = graph.nodes[position]
      guard node.domain.isEmpty, node.capturedInputs.isEmpty,
        node.outputs.count(where: { !$0.isEmpty }) == 1
      else { return false }
      let broadcasts = Self.broadcasting.contains(node.opType)
      let isConcat = node.isOperator("Concat")
      guard broadcasts || isConcat || Self.layers.contains(node.opType) else { return false }
      for (index, name) in node.inputs.enumerated() where !name.isEmpty {
        if inside.contains(name) { continue }
        guard let value = lowering.value(named: name) else { return false }
        if value.constant == nil {
          guard index == 0 || broadcasts || isConcat, value.isFloat, value.rank > 0,
            value.shape[0] == part, value.rank == rank ?? value.rank
          else { return false }
          rank = value.rank
        } else if index == 0 && !broadcasts || isConcat {
          return false
        }
      }
      guard let rank else { return false }
      for name in node.inputs where broadcasts {
        if let constant = lowering.value(named: name), constant.constant != nil {
          guard constant.rank < rank || (constant.rank == rank && constant.shape[0] == 1) else {
            return false
          }
        }
      }
      if isConcat {
        guard let axis = node.intAttribute("axis"), axis != 0, axis != -rank else {
          return false
        }
      }
      inside.formUnion(node.outputs)
    }
    return true
  }

  /// Whether a compiled unit moves so much that it belongs to the front; nil if its result has
  /// another batch than it should.
  private func isLarge(
    _ unit: Unit, _ part: Int, _ batch: Int, _ lowering: Lowering
  ) -> Bool? {
    var largest = 0
    var weights = 0
    for position in unit.positions {
      let node = graph.nodes[position]
      for name in node.inputs + node.outputs where !name.isEmpty {
        guard let value = lowering.value(named: name) else { continue }
        let bytes = value.count * MemoryLayout<Float>.stride
        if value.constant != nil {
          weights += bytes
        } else {
          guard value.rank > 0, value.shape[0] == part else { return nil }
          largest = max(largest, bytes / part)
        }
      }
    }
    // Weights are read once for each part.
    return largest >= Self.largeTensor && largest >= weights / part
      && largest * batch > Self.cachedTensor
  }

  // MARK: - Assembly

  /// A part of a tensor of the whole batch.
  private struct Window {
    let part: Buffer
    let whole: Buffer
  }

  private func assemble(
    _ lowering: Lowering, _ inputNames: [String], _ windows: inout [Window], units: [Unit],
    unitCount: Int, stepCount: Int, parts: Int
  ) throws(HalfstepError) -> Front? {
    // Names that are read later, in order; tensors of units that were tried in vain do not count.
    var wanted: [String] = []
    for unit in units[unitCount...] {
      for position in unit.positions {
        wanted += graph.nodes[position].inputs + graph.nodes[position].capturedInputs
      }
    }
    wanted += results
    var later: Set<String> = []
    for unit in units[unitCount...] {
      for position in unit.positions { later.formUnion(graph.nodes[position].outputs) }
    }
    var values: [(name: String, value: Value)] = []
    var seen: Set<String> = []
    let inputCount = windows.count
    for name in wanted where !name.isEmpty && !later.contains(name) {
      guard seen.insert(name).inserted, let value = lowering.value(named: name) else { continue }
      if value.constant != nil {
        values.append((name, value))
        continue
      }
      let shape = try value.shape.replacingBatch(value.shape[0] * parts)
      var layout: MemoryDescriptor?
      if let given = value.layout {
        guard let wide = given.replacingBatch(shape[0]) else { return nil }
        layout = wide
      }
      let whole: Buffer
      if let window = windows.first(where: { $0.part === value.buffer }) {
        whole = window.whole
      } else {
        guard value.buffer.isArena else { return nil }
        whole = Buffer(arena: value.buffer.byteCount * parts)
        windows.append(Window(part: value.buffer, whole: whole))
      }
      let needed =
        layout?.byteCount ?? Tensor.byteCount(of: value.dataType, count: shape.elementCount)
      guard whole.byteCount == needed, needed <= limit else { return nil }
      values.append(
        (name, Value(shape: shape, dataType: value.dataType, buffer: whole, layout: layout)))
    }
    for window in windows.dropFirst(inputCount) { window.part.leaveArena() }
    let plan = try Plan(
      inputs: [], steps: Array(lowering.steps.prefix(stepCount)), outputs: [], limit: limit)
    let scratch = Buffer(arena: plan.arenaBytes)
    let bound = windows
    let step = Step(
      label: "\(unitCount) layers in \(parts) parts", reads: [],
      writes: [scratch] + bound.dropFirst(inputCount).map(\.whole)
    ) { () throws(HalfstepError) in
      try plan.bind(try scratch.bytes)
      for index in 0..<parts {
        for window in bound {
          try window.part.bind(try window.whole.bytes + index * window.part.byteCount)
        }
        try plan.run()
      }
    }
    return Front(
      inputs: zip(inputNames, windows).map { ($0, $1.whole) }, unitCount: unitCount,
      values: values, step: step)
  }
}

extension Shape {
  /// The same shape with another extent along the first axis.
  func replacingBatch(_ batch: Int) throws(HalfstepError) -> Shape {
    var dimensions = dimensions
    dimensions[0] = batch
    return try Shape(dimensions)
  }
}

extension MemoryDescriptor {
  /// The layout in which tensors of this one lie one after the other; nil if the first axis is
  /// blocked, padded or not the outermost.
  func replacingBatch(_ batch: Int) -> MemoryDescriptor? {
    guard raw.format_kind == dnnl_blocked, raw.offset0 == 0, rank > 0, raw.dims.0 > 0,
      raw.padded_dims.0 == raw.dims.0, raw.padded_offsets.0 == 0
    else { return nil }
    let blocking = raw.format_desc.blocking
    let isSplit = withUnsafeBytes(of: blocking.inner_idxs) {
      $0.bindMemory(to: Int64.self).prefix(Int(blocking.inner_nblks)).contains(0)
    }
    let image = Int64(elementCount) / raw.dims.0
    guard !isSplit, raw.dims.0 == 1 || blocking.strides.0 == image else { return nil }
    var wide = raw
    wide.dims.0 = Int64(batch)
    wide.padded_dims.0 = Int64(batch)
    wide.format_desc.blocking.strides.0 = image
    return MemoryDescriptor(raw: wide)
  }
}
