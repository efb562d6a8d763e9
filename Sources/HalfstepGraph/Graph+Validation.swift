// SPDX-License-Identifier: Apache-2.0
// Structural rules of a graph, and the sort that a file may need.

import HalfstepNumerics

extension Graph {
  /// Checks every structural rule and sorts the nodes so that each follows those it reads from.
  ///
  /// - Throws: `HalfstepError.invalidGraph` naming the culprit: a tensor written twice, a tensor that
  ///   nothing provides, a cycle, an output that does not exist, a repeated input.
  package mutating func validateAndSort() throws(HalfstepError) {
    var producer: [String: Int] = [:]
    for (position, node) in nodes.enumerated() {
      for output in node.outputs where !output.isEmpty {
        guard producer.updateValue(position, forKey: output) == nil else {
          throw HalfstepError(
            .invalidGraph, "tensor '\(output)' is written twice, again by node '\(node.label)'",
            node: node.label)
        }
      }
    }
    var given = Set(initializers.keys).union(opaqueInitializers.keys)
    for (name, position) in producer where given.contains(name) {
      throw HalfstepError(
        .invalidGraph, "initializer '\(name)' is also written by node '\(nodes[position].label)'",
        node: nodes[position].label)
    }
    var seen = Set<String>()
    for input in inputs {
      guard seen.insert(input.name).inserted, producer[input.name] == nil else {
        throw HalfstepError(.invalidGraph, "graph input '\(input.name)' is defined twice")
      }
    }
    given.formUnion(seen)

    var pending = [Int](repeating: 0, count: nodes.count)
    var readers = [[Int]](repeating: [], count: nodes.count)
    for (position, node) in nodes.enumerated() {
      for name in Set(node.inputs + node.capturedInputs)
      where !name.isEmpty && !given.contains(name) {
        guard let source = producer[name] else {
          throw HalfstepError(
            .invalidGraph, "node '\(node.label)' reads '\(name)', which nothing provides",
            node: node.label)
        }
        readers[source].append(position)
        pending[position] += 1
      }
    }
    for output in outputs where producer[output.name] == nil && !given.contains(output.name) {
      throw HalfstepError(.invalidGraph, "graph output '\(output.name)' is never written")
    }

    // Kahn's algorithm; a list in order already comes out unchanged.
    var order: [Int] = []
    order.reserveCapacity(nodes.count)
    var ready = PositionQueue(pending.indices.filter { pending[$0] == 0 })
    while let position = ready.popSmallest() {
      order.append(position)
      for reader in readers[position] {
        pending[reader] -= 1
        if pending[reader] == 0 { ready.push(reader) }
      }
    }
    if order.count < nodes.count, let stuck = pending.firstIndex(where: { $0 > 0 }) {
      throw HalfstepError(
        .invalidGraph, "the graph has a cycle through node '\(nodes[stuck].label)'",
        node: nodes[stuck].label)
    }
    if order != Array(nodes.indices) { reorder(order) }
  }

  /// Stops a debug build if a pass left the graph invalid; empty in release builds.
  package func checkInvariants(_ pass: String = #function) {
    #if DEBUG
      var copy = self
      do { try copy.validateAndSort() } catch { assertionFailure("\(pass): \(error.message)") }
    #endif
  }
}

/// A binary heap of node positions.
private struct PositionQueue {
  private var items: [Int] = []

  init(_ sorted: [Int]) { items = sorted }

  mutating func push(_ item: Int) {
    items.append(item)
    var child = items.count - 1
    while child > 0, items[child] < items[(child - 1) / 2] {
      items.swapAt(child, (child - 1) / 2)
      child = (child - 1) / 2
    }
  }

  mutating func popSmallest() -> Int? {
    guard let first = items.first else { return nil }
    let last = items.removeLast()
    guard !items.isEmpty else { return first }
    items[0] = last
    var parent = 0
    while true {
      var smallest = parent
      for child in [2 * parent + 1, 2 * parent + 2]
      where child < items.count && items[child] < items[smallest] {
        smallest = child
      }
      if smallest == parent { return first }
      items.swapAt(parent, smallest)
      parent = smallest
    }
  }
}
