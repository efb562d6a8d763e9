// SPDX-License-Identifier: Apache-2.0
// How operators hand channels on.

import HalfstepGraph
import HalfstepNumerics

extension ChannelDependencies {
  /// Operators that compute each element from one element.
  private static let elementwise: Set<String> = [
    "Relu", "LeakyRelu", "Identity", "Dropout", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh",
    "Elu",
    "Selu", "Celu", "Gelu", "Erf", "Softplus", "Softsign", "Mish", "ThresholdedRelu", "Abs", "Neg",
    "Exp", "Log", "Sqrt", "Reciprocal", "Floor", "Ceil", "Round", "Sign", "Clip", "Cast", "Not",
  ]
  /// Operators on operands that broadcast.
  private static let combining: Set<String> = [
    "Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "Pow", "PRelu", "Where", "Mod",
    "Equal",
    "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor",
  ]
  private static let pooling: Set<String> = [
    "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool",
  ]

  /// Hands channels on through a node that reads some; false if the node needs them all.
  mutating func follow(_ position: Int, _ node: Node) -> Bool {
    guard node.domain.isEmpty, let output = node.outputs.first, !output.isEmpty else {
      return false
    }
    // Other outputs (a mask, indices) must not be read.
    if node.opType != "Split" {
      for name in node.outputs.dropFirst() where !name.isEmpty {
        if index.uses[name] != nil || index.outputs.contains(name) { return false }
      }
    }
    if Self.combining.contains(node.opType) { return combine(position, node, output) }
    guard let source = node.input(0) else { return false }
    if node.opType == "Concat" { return concatenate(node, output) }
    guard let channels = tensors[source], let shape = shapes[source],
      channels.axis < shape.rank, shape[channels.axis] == channels.ids.count
    else { return false }
    // Nothing but the first operand may be computed.
    if Self.elementwise.contains(node.opType) {
      guard node.inputs.dropFirst().allSatisfy({ $0.isEmpty || isScalar($0) }) else { return false }
      tensors[output] = channels
      return true
    }
    if Self.pooling.contains(node.opType) {
      guard channels.axis == 1 else { return false }
      tensors[output] = channels
      return true
    }
    switch node.opType {
    case "BatchNormalization", "InstanceNormalization":
      guard channels.axis == 1 else { return false }
      let count = node.opType == "BatchNormalization" ? 4 : 2
      for input in 1...count {
        guard let name = node.input(input),
          graph.constant(name, index)?.shape.dimensions == [channels.ids.count]
        else { return false }
        edits.append(.constant(node: position, input: input, axis: 0, ids: channels.ids))
      }
      tensors[output] = channels
      return true
    case "LayerNormalization", "Softmax", "LogSoftmax":
      return normalize(node, channels, shape, output)
    case "Flatten":
      let axis = node.intAttribute("axis") ?? 1
      guard let place = try? ShapeRules.axis(axis, rank: shape.rank), place >= 1 else {
        return false
      }
      return reshape(position, node, channels, shape, output, entries: nil)
    case "Reshape":
      guard let target = node.input(1), let entries = shapeEntries(target) else { return false }
      return reshape(position, node, channels, shape, output, entries: entries)
    case "Transpose":
      let order = node.intsAttribute("perm") ?? Array((0..<shape.rank).reversed())
      guard let axis = order.firstIndex(of: channels.axis) else { return false }
      tensors[output] = Channels(axis: axis, ids: channels.ids)
      return true
    case "Squeeze", "Unsqueeze": return moveAxis(node, channels, shape, output)
    case "Split": return split(position, node, channels, shape)
    case "Slice": return slice(position, node, channels, shape, output)
    case "Gather": return gather(position, node, channels, shape, output)
    case "Pad", "Tile", "Expand", "Resize", "Upsample":
      return resize(position, node, channels, shape, output)
    case "DepthToSpace", "SpaceToDepth": return moveBlocks(node, channels, output)
    case "Shape": return isShapeOfOtherAxes(node, channels, shape)
    default:
      return node.opType.hasPrefix("Reduce") && reduce(node, channels, shape, output)
    }
  }

  // MARK: Operands

  private func isScalar(_ name: String) -> Bool {
    guard let value = graph.constant(name, index) else { return false }
    return value.count == 1
  }

  /// The integers of an attribute, or of a constant operand; nil if there are none that are known.
  private func integers(_ node: Node, attribute: String, input: Int) -> [Int]? {
    if let values = node.intsAttribute(attribute) { return values }
    return node.input(input).flatMap { graph.constant($0, index) }.flatMap { try? $0.integers() }
  }

  private mutating func combine(_ position: Int, _ node: Node, _ output: String) -> Bool {
    guard let result = shapes[output], node.inputs.allSatisfy({ !$0.isEmpty }) else { return false }
    var place: Int?
    var operands: [[Int]] = []
    var constants: [(input: Int, axis: Int)] = []
    for name in node.inputs {
      guard let channels = tensors[name], let shape = shapes[name] else { continue }
      // One channel that is handed to all others.
      let axis = channels.axis + result.rank - shape.rank
      guard shape.rank <= result.rank, channels.axis < shape.rank,
        result[axis] == channels.ids.count, place == nil || place == axis
      else { return false }
      place = axis
      operands.append(channels.ids)
    }
    guard let axis = place, let first = operands.first else { return false }
    for (input, name) in node.inputs.enumerated() where tensors[name] == nil {
      let value = graph.constant(name, index)
      guard let shape = value?.shape ?? shapes[name] else { return false }
      let own = axis - (result.rank - shape.rank)
      if own < 0 || shape[own] == 1 { continue }
      if value != nil {
        constants.append((input, own))
        continue
      }
      // A computed tensor whose channels are not followed meets them one by one, unless it is nothing
      // but a constant of another shape.
      guard let column = column(name, axis: own, count: first.count) else { return false }
      edits.append(.constant(node: column.node, input: 0, axis: 0, ids: first))
      if let entry = column.entry {
        edits.append(.extent(node: column.node, input: 1, entry: entry, ids: first))
      }
    }
    for ids in operands.dropFirst() {
      for (a, b) in zip(first, ids) { sets.join(a, b) }
    }
    for (input, own) in constants {
      edits.append(.constant(node: position, input: input, axis: own, ids: first))
    }
    tensors[output] = Channels(axis: axis, ids: first)
    return true
  }

  /// The node that spreads a constant of rank 1 along an axis for a single reader, as PyTorch's PRelu
  /// does with its slopes, and the entry of its shape that says how many there are.
  private func column(_ name: String, axis: Int, count: Int) -> (node: Int, entry: Int?)? {
    guard index.uses[name]?.count == 1, !index.outputs.contains(name),
      let position = index.producers[name], let shape = shapes[name],
      shape.dimensions.indices.contains(axis), shape[axis] == count
    else { return nil }
    let node = graph.nodes[position]
    guard let source = node.input(0),
      graph.constant(source, index)?.shape.dimensions == [count]
    else { return nil }
    if node.isOperator("Unsqueeze") { return (position, nil) }
    guard node.isOperator("Reshape"), let target = node.input(1),
      graph.constant(target, index) != nil, let entries = shapeEntries(target),
      entries.count == shape.rank
    else { return nil }
    switch entries[axis] {
    case .fixed(-1): return (position, nil)
    case .fixed(count): return (position, axis)
    default: return nil
    }
  }

  private mutating func concatenate(_ node: Node, _ output: String) -> Bool {
    guard let result = shapes[output], let given = node.intAttribute("axis"),
      let along = try? ShapeRules.axis(given, rank: result.rank),
      let axis = node.inputs.compactMap({ tensors[$0]?.axis }).first
    else { return false }
    var parts: [[Int]] = []
    for name in node.inputs {
      if let channels = tensors[name] {
        guard channels.axis == axis else { return false }
        parts.append(channels.ids)
      } else if along == axis {
        guard let shape = graph.constant(name, index)?.shape ?? shapes[name], shape.rank > axis
        else { return false }
        parts.append(pinned(shape[axis], "they are no layer's"))
      } else {
        return false
      }
    }
    if along == axis {
      tensors[output] = Channels(axis: axis, ids: parts.flatMap { $0 })
      return true
    }
    for part in parts.dropFirst() {
      guard part.count == parts[0].count else { return false }
      for (a, b) in zip(parts[0], part) { sets.join(a, b) }
    }
    tensors[output] = Channels(axis: axis, ids: parts[0])
    return true
  }

  // MARK: Axes

  private mutating func normalize(
    _ node: Node, _ channels: Channels, _ shape: Shape, _ output: String
  ) -> Bool {
    // LayerNormalization, and Softmax before version 13, take all axes from this one on.
    let isSoftmax = node.opType != "LayerNormalization"
    let isOne = isSoftmax && graph.opset >= 13
    let given = node.intAttribute("axis") ?? (isSoftmax && !isOne ? 1 : -1)
    guard let axis = try? ShapeRules.axis(given, rank: shape.rank) else { return false }
    guard isOne ? axis != channels.axis : axis > channels.axis else { return false }
    tensors[output] = channels
    return true
  }

  private mutating func reduce(
    _ node: Node, _ channels: Channels, _ shape: Shape, _ output: String
  ) -> Bool {
    guard let given = integers(node, attribute: "axes", input: 1),
      let axes = try? ShapeRules.axes(given, rank: shape.rank), !axes.isEmpty,
      !axes.contains(channels.axis)
    else { return false }
    let keeps = (node.intAttribute("keepdims") ?? 1) != 0
    let axis = keeps ? channels.axis : channels.axis - axes.count { $0 < channels.axis }
    tensors[output] = Channels(axis: axis, ids: channels.ids)
    return true
  }

  private mutating func moveAxis(
    _ node: Node, _ channels: Channels, _ shape: Shape, _ output: String
  ) -> Bool {
    guard let given = integers(node, attribute: "axes", input: 1), let result = shapes[output]
    else { return false }
    let isSqueeze = node.opType == "Squeeze"
    guard let axes = try? ShapeRules.axes(given, rank: isSqueeze ? shape.rank : result.rank) else {
      return false
    }
    if isSqueeze {
      guard !axes.contains(channels.axis) else { return false }
      let axis = channels.axis - axes.count { $0 < channels.axis }
      tensors[output] = Channels(axis: axis, ids: channels.ids)
      return true
    }
    let old = (0..<result.rank).filter { !axes.contains($0) }
    guard old.indices.contains(channels.axis) else { return false }
    tensors[output] = Channels(axis: old[channels.axis], ids: channels.ids)
    return true
  }

  /// Reshape and Flatten: channels that end up within one axis, with what lies around them.
  ///
  /// - Parameter entries: The target shape of a Reshape; nil for Flatten, which adapts by itself.
  private mutating func reshape(
    _ position: Int, _ node: Node, _ channels: Channels, _ shape: Shape, _ output: String,
    entries: [ShapeEntry]?
  ) -> Bool {
    guard let result = shapes[output], channels.axis >= 1, !channels.ids.isEmpty else {
      return false
    }
    let count = channels.ids.count
    let before = shape.dimensions[..<channels.axis].reduce(1, *)
    let behind = shape.dimensions[(channels.axis + 1)...].reduce(1, *)
    // The batch must stay on its own: the first axis is never the one.
    var outer = result.dimensions.first ?? 1
    for axis in 1..<max(result.rank, 1) {
      let extent = result[axis]
      let inner = result.dimensions[(axis + 1)...].reduce(1, *)
      defer { outer *= extent }
      guard extent >= count, outer > 0, inner > 0, before % outer == 0, behind % inner == 0,
        extent == before / outer * count * (behind / inner)
      else { continue }
      let step = behind / inner
      if let entries {
        guard entries.count == result.rank, followsNoOther(entries, at: axis) else { return false }
        checkedExtents.insert(position)
        switch entries[axis] {
        case .fixed(-1): break
        // Zero keeps the extent of the same axis, and so does what was read from it.
        case .fixed(0):
          guard axis == channels.axis, extent == count, (node.intAttribute("allowzero") ?? 0) == 0
          else { return false }
        case .extent(let tensor, let from):
          guard let other = tensors[tensor], other.axis == from, extent == count,
            other.ids == channels.ids
          else { return false }
        case .fixed:
          guard let name = node.input(1), graph.constant(name, index) != nil else { return false }
          edits.append(
            .extent(
              node: position, input: 1, entry: axis,
              ids: (0..<extent).map { channels.ids[$0 / step % count] }))
        }
      }
      tensors[output] = Channels(
        axis: axis, ids: (0..<extent).map { channels.ids[$0 / step % count] })
      return true
    }
    return false
  }

  // MARK: Parts

  private mutating func split(
    _ position: Int, _ node: Node, _ channels: Channels, _ shape: Shape
  ) -> Bool {
    guard let axis = try? ShapeRules.axis(node.intAttribute("axis") ?? 0, rank: shape.rank),
      node.outputs.allSatisfy({ !$0.isEmpty })
    else { return false }
    if axis != channels.axis {
      for name in node.outputs { tensors[name] = channels }
      return true
    }
    if keepsPositions { return false }
    var start = 0
    var parts: [[Int]] = []
    for name in node.outputs {
      guard let extent = shapes[name], extent.rank == shape.rank,
        start + extent[axis] <= channels.ids.count
      else { return false }
      parts.append(Array(channels.ids[start..<start + extent[axis]]))
      start += extent[axis]
    }
    // Sizes that are computed cannot be edited.
    if let name = node.input(1), graph.constant(name, index) == nil { return false }
    guard start == channels.ids.count else { return false }
    for (name, ids) in zip(node.outputs, parts) { tensors[name] = Channels(axis: axis, ids: ids) }
    edits.append(.split(node: position, parts: parts))
    return true
  }

  private mutating func slice(
    _ position: Int, _ node: Node, _ channels: Channels, _ shape: Shape, _ output: String
  ) -> Bool {
    guard graph.opset >= 10, let starts = integers(node, attribute: "", input: 1),
      let ends = integers(node, attribute: "", input: 2), starts.count == ends.count
    else { return false }
    var axes = Array(starts.indices)
    if node.input(3) != nil {
      guard let given = integers(node, attribute: "", input: 3) else { return false }
      axes = given
    }
    var steps = [Int](repeating: 1, count: starts.count)
    if node.input(4) != nil {
      guard let given = integers(node, attribute: "", input: 4) else { return false }
      steps = given
    }
    guard axes.count == starts.count, steps.count == starts.count else { return false }
    for (entry, given) in axes.enumerated() {
      guard let axis = try? ShapeRules.axis(given, rank: shape.rank) else { return false }
      if axis != channels.axis { continue }
      guard steps[entry] == 1, !keepsPositions else { return false }
      let count = channels.ids.count
      func place(_ value: Int) -> Int {
        min(max(value < 0 ? value &+ count : value, 0), count)
      }
      let (low, high) = (place(starts[entry]), place(ends[entry]))
      guard low < high else { return false }
      tensors[output] = Channels(axis: axis, ids: Array(channels.ids[low..<high]))
      edits.append(
        .slice(node: position, entry: entry, ids: channels.ids, range: low..<high))
      return true
    }
    tensors[output] = channels
    return true
  }

  private mutating func gather(
    _ position: Int, _ node: Node, _ channels: Channels, _ shape: Shape, _ output: String
  ) -> Bool {
    guard let axis = try? ShapeRules.axis(node.intAttribute("axis") ?? 0, rank: shape.rank),
      let name = node.input(1), let value = graph.constant(name, index),
      let indices = try? value.integers(), value.shape.rank <= 1
    else { return false }
    if axis != channels.axis {
      let removes = value.shape.rank == 0 && axis < channels.axis
      tensors[output] = Channels(axis: channels.axis - (removes ? 1 : 0), ids: channels.ids)
      return true
    }
    let count = channels.ids.count
    guard !keepsPositions, value.shape.rank == 1,
      indices.allSatisfy({ $0 >= -count && $0 < count })
    else { return false }
    let places = indices.map { $0 < 0 ? $0 + count : $0 }
    tensors[output] = Channels(axis: axis, ids: places.map { channels.ids[$0] })
    edits.append(.gather(node: position, ids: channels.ids, indices: places))
    return true
  }

  private mutating func moveBlocks(
    _ node: Node, _ channels: Channels, _ output: String
  ) -> Bool {
    guard channels.axis == 1, let size = node.intAttribute("blocksize"), size > 0, size < 1 << 16
    else { return false }
    let block = size * size
    let count = channels.ids.count
    if node.opType == "SpaceToDepth" {
      tensors[output] = Channels(
        axis: 1, ids: (0..<block).flatMap { _ in channels.ids })
      return true
    }
    guard count % block == 0 else { return false }
    let isRowFirst = node.stringAttribute("mode") == "CRD"
    var ids: [Int] = []
    for channel in 0..<count / block {
      let own = (0..<block).map {
        isRowFirst ? channel * block + $0 : $0 * (count / block) + channel
      }
      for place in own { sets.join(channels.ids[own[0]], channels.ids[place]) }
      ids.append(channels.ids[own[0]])
    }
    tensors[output] = Channels(axis: 1, ids: ids)
    return true
  }

  // MARK: Extents

  /// Pad, Tile, Expand and Resize: they may do what they like to the other axes.
  private mutating func resize(
    _ position: Int, _ node: Node, _ channels: Channels, _ shape: Shape, _ output: String
  ) -> Bool {
    guard let result = shapes[output], result.rank >= shape.rank else { return false }
    let axis = channels.axis + result.rank - shape.rank
    guard result[axis] == channels.ids.count else { return false }
    var operand: Int?
    switch node.opType {
    case "Pad":
      // An equal extent may be padded on one side and cut on the other.
      let pads = integers(node, attribute: "pads", input: 1)
      guard let pads, pads.count == 2 * shape.rank, node.input(3) == nil,
        pads[channels.axis] == 0, pads[channels.axis + shape.rank] == 0
      else { return false }
    case "Tile", "Upsample": break
    case "Expand": operand = 1
    default:
      guard node.input(1) == nil || graph.constant(node.inputs[1], index) != nil,
        node.attributes["axes"] == nil
      else { return false }
      operand = node.input(3) == nil ? nil : 3
    }
    if let operand, let name = node.input(operand) {
      guard let entries = shapeEntries(name), entries.count <= result.rank else { return false }
      let entry = axis - (result.rank - entries.count)
      guard followsNoOther(entries, at: entry) else { return false }
      checkedExtents.insert(position)
      if entry >= 0 {
        switch entries[entry] {
        case .fixed(1) where node.opType == "Expand": break
        case .fixed(let extent):
          guard extent == channels.ids.count, graph.constant(name, index) != nil else {
            return false
          }
          edits.append(.extent(node: position, input: operand, entry: entry, ids: channels.ids))
        case .extent(let tensor, let from):
          guard let other = tensors[tensor], other.axis == from, other.ids == channels.ids else {
            return false
          }
        }
      }
    }
    tensors[output] = Channels(axis: axis, ids: channels.ids)
    return true
  }

  /// An entry of a shape that is a constant or put together from other shapes.
  enum ShapeEntry: Hashable {
    case fixed(Int)
    /// The extent of a tensor along an axis.
    case extent(String, Int)
  }

  /// The tensor whose number of channels an entry is; nil if it is something else.
  func followedExtent(_ entry: ShapeEntry) -> String? {
    guard case .extent(let tensor, let axis) = entry, tensors[tensor]?.axis == axis else {
      return nil
    }
    return tensor
  }

  /// Whether no entry but one is a number of channels.
  private func followsNoOther(_ entries: [ShapeEntry], at place: Int) -> Bool {
    entries.indices.allSatisfy { $0 == place || followedExtent(entries[$0]) == nil }
  }

  /// Where the entries of a shape come from; nil if they are computed in another way.
  func shapeEntries(_ name: String, depth: Int = 0) -> [ShapeEntry]? {
    if let value = graph.constant(name, index) {
      return (try? value.integers())?.map { .fixed($0) }
    }
    guard depth < 16, let position = index.producers[name] else { return nil }
    let node = graph.nodes[position]
    guard node.domain.isEmpty, let source = node.input(0) else { return nil }
    switch node.opType {
    case "Shape":
      guard node.attributes.isEmpty, let shape = shapes[source] else { return nil }
      return (0..<shape.rank).map { .extent(source, $0) }
    case "Identity", "Squeeze", "Unsqueeze", "Cast":
      return shapeEntries(source, depth: depth + 1)
    case "Gather":
      guard let entries = shapeEntries(source, depth: depth + 1),
        let indices = node.input(1).flatMap({ graph.constant($0, index) }).flatMap({
          try? $0.integers()
        })
      else { return nil }
      let places = indices.map { $0 < 0 ? $0 + entries.count : $0 }
      return places.allSatisfy(entries.indices.contains) ? places.map { entries[$0] } : nil
    case "Slice":
      guard let entries = shapeEntries(source, depth: depth + 1),
        let low = integers(node, attribute: "starts", input: 1)?.first,
        let high = integers(node, attribute: "ends", input: 2)?.first, node.input(4) == nil
      else { return nil }
      func place(_ value: Int) -> Int {
        min(max(value < 0 ? value &+ entries.count : value, 0), entries.count)
      }
      return place(low) <= place(high) ? Array(entries[place(low)..<place(high)]) : nil
    case "Concat":
      var result: [ShapeEntry] = []
      for name in node.inputs {
        guard let part = shapeEntries(name, depth: depth + 1) else { return nil }
        result += part
      }
      return result
    default: return nil
    }
  }

  /// Whether a Shape's readers only ask for axes without channels, or put shapes together for what
  /// follows channels itself.
  private func isShapeOfOtherAxes(
    _ node: Node, _ channels: Channels, _ shape: Shape
  ) -> Bool {
    guard node.attributes.isEmpty, let source = node.input(0) else { return false }
    let wanted = ShapeEntry.extent(source, channels.axis)
    var pending = [node.outputs[0]]
    var seen: Set<String> = []
    while let name = pending.popLast() {
      guard seen.insert(name).inserted else { continue }
      if index.outputs.contains(name) { return false }
      for use in index.uses[name] ?? [] {
        let reader = graph.nodes[use.node]
        guard use.input != nil, reader.domain.isEmpty else { return false }
        switch reader.opType {
        case "Reshape", "Expand", "Resize":
          // What they make of the entries is looked at with them.
          if use.input == 0 || shapeEntries(name) == nil { return false }
        case "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Identity", "Cast":
          guard use.input == 0 || reader.opType == "Concat" else { return false }
          pending.append(reader.outputs[0])
        default:
          guard let entries = shapeEntries(name), !entries.contains(wanted) else { return false }
        }
      }
    }
    return true
  }
}
