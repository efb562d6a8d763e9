// SPDX-License-Identifier: Apache-2.0
// Gives every buffer of a plan a place in one arena, reusing memory after its last use.

import HalfstepNumerics

/// Gives every buffer of a plan a place in one arena, reusing memory after its last use.
enum MemoryPlanner {
  /// Buffers that share one place.
  private final class Group {
    var members: [Buffer]
    var byteCount: Int
    var first: Int
    var last: Int
    var offset = 0
    init(_ buffer: Buffer) {
      members = [buffer]
      byteCount = buffer.byteCount
      first = buffer.firstStep
      last = buffer.lastStep
    }
  }

  private static let alignment = 64

  /// Sets the offset of each arena buffer.
  ///
  /// Steps that can work in place share their input's memory where it dies with them; then larger
  /// buffers are placed first, each at the lowest offset that is free while it lives.
  ///
  /// - Parameter kept: Buffers that must survive the last step.
  /// - Returns: Bytes that the arena needs.
  /// - Throws: `HalfstepError.outOfMemory` if that exceeds `limit`.
  /// - Complexity: O(n²) in buffers.
  static func place(_ steps: [Step], kept: [Buffer], limit: Int) throws(HalfstepError) -> Int {
    var groups: [ObjectIdentifier: Group] = [:]
    var order: [Buffer] = []
    func touch(_ buffer: Buffer, _ step: Int) {
      guard buffer.isArena else { return }
      if buffer.lastStep < 0 { order.append(buffer) }
      buffer.firstStep = min(buffer.firstStep, step)
      buffer.lastStep = max(buffer.lastStep, step)
    }
    for (position, step) in steps.enumerated() {
      for buffer in step.reads { touch(buffer, position) }
      for buffer in step.writes { touch(buffer, position) }
    }
    for buffer in kept { touch(buffer, steps.count) }
    for buffer in order { groups[ObjectIdentifier(buffer)] = Group(buffer) }

    for (position, step) in steps.enumerated() {
      guard let (input, output) = step.inPlace, input !== output,
        let source = groups[ObjectIdentifier(input)],
        let target = groups[ObjectIdentifier(output)], source !== target
      else { continue }
      // Every member of the source's group must be dead and the output new.
      guard source.last == position, target.first == position,
        input.byteCount >= output.byteCount, step.reads.count(where: { $0 === input }) == 1
      else { continue }
      source.members += target.members
      source.last = max(source.last, target.last)
      source.byteCount = max(source.byteCount, target.byteCount)
      for member in target.members { groups[ObjectIdentifier(member)] = source }
    }

    var seen = Set<ObjectIdentifier>()
    var unique: [Group] = []
    for buffer in order {
      guard let group = groups[ObjectIdentifier(buffer)] else { continue }
      if seen.insert(ObjectIdentifier(group)).inserted { unique.append(group) }
    }
    // A stable order, so that the plan does not depend on hashing.
    let sorted = unique.enumerated().sorted {
      ($0.element.byteCount, -$0.offset) > ($1.element.byteCount, -$1.offset)
    }.map(\.element)
    var placed: [Group] = []
    var total = 0
    for group in sorted {
      let size = (max(group.byteCount, 1) + alignment - 1) / alignment * alignment
      var offset = 0
      for other in placed where other.first <= group.last && group.first <= other.last {
        // `placed` is sorted by offset: the first gap that is large enough wins.
        if other.offset - offset >= size { break }
        offset = max(offset, other.offset + other.byteCount)
      }
      group.offset = offset
      group.byteCount = size
      let (end, overflow) = offset.addingReportingOverflow(size)
      guard !overflow, end <= limit else {
        throw HalfstepError(
          .outOfMemory, "the network needs more than \(limit) bytes for intermediate tensors")
      }
      total = max(total, end)
      let index = placed.firstIndex { $0.offset > offset } ?? placed.count
      placed.insert(group, at: index)
    }
    for group in unique { for member in group.members { member.offset = group.offset } }
    return total
  }
}
