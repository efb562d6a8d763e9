// SPDX-License-Identifier: Apache-2.0
// One thread's pass over a stretch of values: extremes, and a histogram while the values are in cache.

import CVectorKernels

/// One thread's pass over values: extremes, and a histogram while the values are in cache.
///
/// Owns its counters; the creator calls `release()`.
struct ValueScan {
  /// Finite values in the extremes and in the bins.
  var count = 0
  /// Zeros that were set apart on request. They are in no other result; only the counter of their bin
  /// holds them too.
  var zeros = 0
  var minimum = Float.infinity
  var maximum = -Float.infinity
  var sawNonFinite = false

  /// Exponent of the bin width, valid once a value was counted.
  private(set) var exponent = RangeStatistics.minimumExponent
  /// Four histograms of 8,192 bins, one after the other: neighbors in memory go to different ones, so
  /// that equal values do not wait for each other's increment.
  private let counters: UnsafeMutablePointer<UInt32>?
  /// Scratch space of the counting loop.
  private let slots: UnsafeMutablePointer<Int32>?

  private static let bins = 2 * RangeStatistics.binsPerSide
  private static let copies = 4
  /// Values per step: small enough to stay in the first-level cache between the two passes.
  private static let chunk = 4096

  init(keepsHistogram: Bool) {
    guard keepsHistogram else {
      counters = nil
      slots = nil
      return
    }
    let total = Self.bins * Self.copies
    let memory = UnsafeMutablePointer<UInt32>.allocate(capacity: total)
    memory.initialize(repeating: 0, count: total)
    counters = memory
    slots = .allocate(capacity: Self.slotBlock)
  }

  func release() {
    counters?.deallocate()
    slots?.deallocate()
  }

  /// Adds up to 2³² values.
  ///
  /// - Parameter setsZerosApart: Whether zeros count in `zeros` and nowhere else.
  mutating func add(_ values: UnsafePointer<Float>, count total: Int, setsZerosApart: Bool) {
    var offset = 0
    // Without a histogram there is no second pass that would profit from the cache.
    let chunk = counters == nil ? total : Self.chunk
    while offset < total {
      let length = min(chunk, total &- offset)
      let part = values + offset
      let extremes =
        setsZerosApart
        ? findNonzeroExtremes(part, count: length) : findExtremes(part, count: length)
      if extremes.isFinite {
        if let counters, let slots {
          raiseExponent(to: max(extremes.maximum, -extremes.minimum), counters)
          Self.countBins(part, length, exponent, counters, slots)
        }
        count &+= length &- extremes.zeros
        zeros &+= extremes.zeros
        minimum = min(minimum, extremes.minimum)
        maximum = max(maximum, extremes.maximum)
      } else {
        addOneByOne(part, length, setsZerosApart: setsZerosApart)
      }
      offset &+= length
    }
  }

  /// Calls `body` with the number of values in each bin that is not empty, lowest first.
  func forEachBin(_ body: (_ index: Int, _ count: UInt64) -> Void) {
    guard let counters, count > 0 else { return }
    let first = RangeStatistics.binIndex(minimum, exponent: exponent)
    let last = RangeStatistics.binIndex(maximum, exponent: exponent)
    for index in first...last {
      let slot = counters + (index + RangeStatistics.binsPerSide)
      var sum =
        UInt64(slot[0]) + UInt64(slot[Self.bins])
        + UInt64(slot[2 * Self.bins]) + UInt64(slot[3 * Self.bins])
      if index == 0 { sum -= UInt64(zeros) }
      if sum > 0 { body(index, sum) }
    }
  }

  // MARK: - Steps

  private mutating func raiseExponent(
    to magnitude: Float, _ counters: UnsafeMutablePointer<UInt32>
  ) {
    let wanted = RangeStatistics.binExponent(forMagnitude: magnitude)
    guard wanted > exponent else { return }
    let shift = wanted - exponent
    // Zeros that were set apart are counted, too, but their bin stays where it is.
    let occupied =
      count == 0
      ? 0...0
      : RangeStatistics.binIndex(
        minimum, exponent: exponent)...RangeStatistics.binIndex(maximum, exponent: exponent)
    exponent = wanted
    let half = RangeStatistics.binsPerSide
    // Bins move toward zero, so walking outward from zero never overwrites an unread one.
    func move(_ index: Int) {
      let target = index >> shift
      if target == index { return }
      for copy in 0..<Self.copies {
        let amount = counters[index + half + copy * Self.bins]
        counters[index + half + copy * Self.bins] = 0
        counters[target + half + copy * Self.bins] += amount
      }
    }
    for index in stride(from: max(occupied.lowerBound, 0), through: occupied.upperBound, by: 1) {
      move(index)
    }
    for index in stride(from: min(occupied.upperBound, -1), through: occupied.lowerBound, by: -1) {
      move(index)
    }
  }

  private mutating func addOneByOne(
    _ values: UnsafePointer<Float>, _ total: Int, setsZerosApart: Bool
  ) {
    for index in 0..<total {
      let value = values[index]
      guard value.isFinite else {
        sawNonFinite = true
        continue
      }
      if let counters {
        raiseExponent(to: abs(value), counters)
        let bin = RangeStatistics.binIndex(value, exponent: exponent)
        counters[bin + RangeStatistics.binsPerSide] &+= 1
      }
      if value == 0 && setsZerosApart {
        zeros &+= 1
      } else {
        count &+= 1
        minimum = min(minimum, value)
        maximum = max(maximum, value)
      }
    }
  }

  /// Counts finite values whose bins are known to exist.
  @inline(never)
  private static func countBins(
    _ values: UnsafePointer<Float>, _ total: Int, _ exponent: Int,
    _ counters: UnsafeMutablePointer<UInt32>, _ slots: UnsafeMutablePointer<Int32>
  ) {
    let width = Float(sign: .plus, exponent: exponent, significand: 1)
    let reciprocalWidth = 1 / width
    if hsk_has_avx512() != 0 {
      hsk_count_bins(values, total, reciprocalWidth, counters)
      return
    }
    let half = Int32(RangeStatistics.binsPerSide)
    let one = Int32(bins)
    let four = SIMD4<Int32>(0, one, 2 &* one, 3 &* one)
    let eight = SIMD8<Int32>(lowHalf: four, highHalf: four)
    let copy = SIMD16<Int32>(lowHalf: eight, highHalf: eight)
    let magicBits = SIMD16<Int32>(repeating: Int32(bitPattern: roundingMagic.bitPattern) &- half)
    var index = 0
    while index &+ Lanes.width <= total {
      // Slots of a block of values first, increments after: the two loops need different units.
      let block = min(slotBlock, (total &- index) & ~15)
      var done = 0
      while done < block {
        let value = Lanes(loading: values + (index &+ done))
        // The nearest integer, then one less where it lies above: the floor. The bits of the sum hold
        // the integer, and a true comparison is −1. The comparison is made with the value itself,
        // since the quotient of a tiny negative value can underflow to zero.
        let sum = value * reciprocalWidth + roundingMagic
        let nearest = unsafeBitCast(sum, to: SIMD16<Int32>.self) &- magicBits
        let above = unsafeBitCast((sum - roundingMagic) * width .> value, to: SIMD16<Int32>.self)
        let slot = nearest &+ above &+ copy
        UnsafeMutableRawPointer(slots + done).storeBytes(of: slot, as: SIMD16<Int32>.self)
        done &+= Lanes.width
      }
      done = 0
      while done < block {
        for lane in 0..<8 { counters[Int(slots[done &+ lane])] &+= 1 }
        done &+= 8
      }
      index &+= block
    }
    while index < total {
      let bin = RangeStatistics.binIndex(values[index], exponent: exponent)
      counters[bin &+ Int(half)] &+= 1
      index &+= 1
    }
  }

  /// Values whose slots are computed at a time.
  private static let slotBlock = 256
}

/// Extremes of a stretch of values.
struct Extremes {
  /// Smallest and largest value, NaN left out; (∞, −∞) if there is none.
  var minimum: Float
  var maximum: Float
  /// Whether no NaN and no infinity was seen.
  var isFinite: Bool
  /// Zeros that were left out, if they were to be.
  var zeros = 0
}

extension Extremes {
  /// - Parameter isEmpty: Whether no value took part.
  fileprivate init(_ found: hsk_extremes, isEmpty: Bool) {
    self.init(minimum: found.minimum, maximum: found.maximum, isFinite: found.has_nan == 0)
    zeros = Int(found.zeros)
    // All values +∞ or −∞ leave an extreme at its start.
    if minimum == -.infinity || maximum == .infinity { isFinite = false }
    if minimum == .infinity && !isEmpty { isFinite = false }
  }
}

/// Finds the extremes of contiguous floats.
@inline(never)
func findExtremes(_ values: UnsafePointer<Float>, count: Int) -> Extremes {
  if hsk_has_avx512() != 0 {
    return Extremes(hsk_find_extremes(values, count, 0), isEmpty: count == 0)
  }
  var low = Lanes(repeating: .infinity)
  var high = Lanes(repeating: -.infinity)
  var unordered = SIMD16<Int32>(repeating: 0)
  var index = 0
  while index &+ Lanes.width <= count {
    let value = Lanes(loading: values + index)
    low = value.atMost(low)
    high = value.atLeast(high)
    unordered |= unsafeBitCast(value .!= value, to: SIMD16<Int32>.self)
    index &+= Lanes.width
  }
  var result = Extremes(
    minimum: low.min(), maximum: high.max(), isFinite: unordered == SIMD16<Int32>(repeating: 0))
  while index < count {
    let value = values[index]
    if value < result.minimum { result.minimum = value }
    if value > result.maximum { result.maximum = value }
    if value.isNaN { result.isFinite = false }
    index &+= 1
  }
  if result.minimum == -.infinity || result.maximum == .infinity { result.isFinite = false }
  // All values +∞ or −∞ leave an extreme at its start; so does an empty stretch.
  if result.minimum == .infinity && count > 0 { result.isFinite = false }
  return result
}

/// Finds the extremes of those contiguous floats that are not zero, and counts the zeros.
@inline(never)
func findNonzeroExtremes(_ values: UnsafePointer<Float>, count: Int) -> Extremes {
  if hsk_has_avx512() != 0 {
    let found = hsk_find_extremes(values, count, 1)
    return Extremes(found, isEmpty: found.zeros == count)
  }
  let infinity = Lanes(repeating: .infinity)
  var low = infinity
  var high = -infinity
  // x − x is NaN for exactly the non-finite values.
  var residue = Lanes(repeating: 0)
  var zeros = SIMD16<Int32>(repeating: 0)
  var index = 0
  while index &+ Lanes.width <= count {
    let value = Lanes(loading: values + index)
    let isZero = value .== 0
    // A true comparison is −1.
    zeros &-= unsafeBitCast(isZero, to: SIMD16<Int32>.self)
    low = value.replacing(with: infinity, where: isZero).atMost(low)
    high = value.replacing(with: -infinity, where: isZero).atLeast(high)
    residue += value - value
    index &+= Lanes.width
  }
  var result = Extremes(minimum: low.min(), maximum: high.max(), isFinite: true)
  result.zeros = Int(zeros.wrappedSum())
  var rest = residue.sum()
  while index < count {
    let value = values[index]
    rest += value - value
    if value == 0 {
      result.zeros += 1
    } else {
      if value < result.minimum { result.minimum = value }
      if value > result.maximum { result.maximum = value }
    }
    index &+= 1
  }
  result.isFinite = rest == 0
  return result
}
