// SPDX-License-Identifier: Apache-2.0
// Channels that must be treated alike, and those that must stay as they are.

/// Channels that must be treated alike, and those that must stay as they are, each with a reason.
///
/// Disjoint sets of identifiers; a set's representative is its smallest member. Pinning a member pins
/// the set, and the first reason of either set stays when two are joined.
struct ChannelSets: Sendable {
  private var parents: [Int] = []
  /// Number of the reason that a representative is pinned for; −1 if it is free.
  private var reasons: [Int32] = []

  /// Adds identifiers, each a set of its own.
  mutating func add(_ count: Int) -> Range<Int> {
    let range = parents.count..<parents.count + count
    parents += range
    reasons += [Int32](repeating: -1, count: count)
    return range
  }

  /// Number of identifiers.
  var count: Int { parents.count }

  /// The representative of an identifier.
  mutating func find(_ id: Int) -> Int {
    var id = id
    while parents[id] != id {
      parents[id] = parents[parents[id]]
      id = parents[id]
    }
    return id
  }

  /// Makes two sets one.
  mutating func join(_ a: Int, _ b: Int) {
    let (a, b) = (find(a), find(b))
    guard a != b else { return }
    let (low, high) = (min(a, b), max(a, b))
    parents[high] = low
    if reasons[low] < 0 { reasons[low] = reasons[high] }
  }

  /// Pins a set.
  ///
  /// - Parameter reason: A number of the caller's, 0 or more.
  mutating func pin(_ id: Int, reason: Int = 0) {
    let root = find(id)
    if reasons[root] < 0 { reasons[root] = Int32(clamping: reason) }
  }

  /// The reason that a set is pinned for, or nil if it is free.
  mutating func reason(_ id: Int) -> Int? {
    let reason = reasons[find(id)]
    return reason < 0 ? nil : Int(reason)
  }
}
