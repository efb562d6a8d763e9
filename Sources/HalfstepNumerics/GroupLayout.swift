// SPDX-License-Identifier: Apache-2.0
// Where the elements of each scale's group lie in a row-major tensor.

/// Where the elements of each group (tensor, channel or block) lie in a row-major tensor.
///
/// The tensor is seen as `[outer, first, middle, second, inner]`, where `first` and `second` are the
/// axes that decide the group. Elements fall into runs: contiguous stretches of one group.
package struct GroupLayout: Sendable, Hashable {
  /// Number of groups, one scale each.
  package let groupCount: Int
  /// Number of elements of the tensor.
  package let elementCount: Int
  let outer: Int
  let first: Int
  let middle: Int
  let second: Int
  let inner: Int
  /// Whether channels lie along `first` (blocks along `second`), or the other way around.
  let channelsFirst: Bool
  let blockSize: Int
  let blocks: Int

  /// Lays out the groups of a tensor.
  ///
  /// - Throws: `HalfstepError.invalidArgument` if an axis is outside the shape or a block is empty.
  package init(_ granularity: Granularity, shape: Shape) throws(HalfstepError) {
    groupCount = try granularity.groupCount(for: shape)
    elementCount = shape.elementCount
    let dims = shape.dimensions
    func product(_ range: Range<Int>) -> Int { dims[range].reduce(1, *) }
    switch granularity {
    case .perTensor:
      (outer, first, middle, second, inner) = (1, 1, 1, 1, shape.elementCount)
      (channelsFirst, blockSize, blocks) = (true, 1, 1)
    case .perChannel(let axis):
      (outer, first, middle, second) = (product(0..<axis), dims[axis], 1, 1)
      inner = product(axis + 1..<dims.count)
      (channelsFirst, blockSize, blocks) = (true, 1, 1)
    case .perBlock(let channelAxis, let axis, let size):
      let low = min(channelAxis, axis)
      let high = max(channelAxis, axis)
      (outer, first, middle) = (product(0..<low), dims[low], product(low + 1..<high))
      (second, inner) = (dims[high], product(high + 1..<dims.count))
      // A block longer than the axis is one block; clamping keeps the products below in range.
      blockSize = max(1, min(size, dims[axis]))
      blocks = (dims[axis] + blockSize - 1) / blockSize
      channelsFirst = channelAxis < axis
    }
  }

  // MARK: - Runs

  /// A contiguous stretch of elements that share a group.
  package struct Run: Sendable {
    /// Index of the first element.
    package let offset: Int
    /// Number of elements.
    package let count: Int
    /// The group that they belong to.
    package let group: Int
  }

  /// Number of runs; together they cover every element once.
  package var runCount: Int {
    if elementCount == 0 { return 0 }
    let slow = outer * first * middle
    return channelsFirst ? slow * blocks : slow * second
  }

  /// The run at an index below `runCount`.
  package func run(_ index: Int) -> Run {
    if channelsFirst {
      let (row, block) = index.quotientAndRemainder(dividingBy: blocks)
      let start = block * blockSize
      return Run(
        offset: (row * second + start) * inner, count: min(blockSize, second - start) * inner,
        group: (row / middle % first) * blocks + block)
    }
    let (row, channel) = index.quotientAndRemainder(dividingBy: second)
    let block = (row / middle % first) / blockSize
    return Run(offset: index * inner, count: inner, group: channel * blocks + block)
  }

  // MARK: - Lanes

  /// Whether runs are so short that whole rows of several groups should be handled at once.
  package var prefersRows: Bool {
    if inner >= 16 { return false }
    return channelsFirst ? middle == 1 && second == 1 && first > 1 : second > 1
  }
  /// Elements in a row: one stretch over all channels.
  package var rowLength: Int { channelsFirst ? first * inner : second * inner }
  /// Number of rows; together they cover every element once.
  package var rowCount: Int {
    if elementCount == 0 { return 0 }
    return channelsFirst ? outer : outer * first * middle
  }
  /// Number of distinct patterns of groups among the rows.
  package var patternCount: Int { channelsFirst ? 1 : blocks }
  /// The pattern of a row.
  package func pattern(ofRow row: Int) -> Int {
    channelsFirst ? 0 : (row / middle % first) / blockSize
  }
  /// The group of an element of a row with a given pattern.
  package func group(pattern: Int, lane: Int) -> Int { (lane / inner) * blocks + pattern }

  // MARK: - Gathering

  /// Number of elements of each group, summing to `elementCount`.
  package func groupSizes() -> [Int] {
    var sizes = [Int](repeating: 0, count: groupCount)
    for index in 0..<runCount {
      let run = run(index)
      sizes[run.group] += run.count
    }
    return sizes
  }

  /// Copies elements so that each group is contiguous, groups in order, elements in row-major order.
  ///
  /// - Parameters:
  ///   - values: Elements of the tensor, `elementCount` of them.
  ///   - result: Room for `elementCount` elements.
  ///   - sizes: What `groupSizes()` returned.
  /// - Complexity: O(elements).
  package func gather<Element: BitwiseCopyable>(
    _ values: UnsafePointer<Element>, into result: UnsafeMutablePointer<Element>, sizes: [Int]
  ) {
    var cursor = [Int](repeating: 0, count: groupCount)
    for group in 1..<max(groupCount, 1) { cursor[group] = cursor[group - 1] + sizes[group - 1] }
    for index in 0..<runCount {
      let run = run(index)
      (result + cursor[run.group]).update(from: values + run.offset, count: run.count)
      cursor[run.group] += run.count
    }
  }
}
