// SPDX-License-Identifier: Apache-2.0
// Adds values to statistics: split over threads, then merged.

extension RangeStatistics {
  /// Adds values.
  ///
  /// NaN and infinities set `sawNonFinite` and are ignored. Runs on several threads if there is enough
  /// to do; the result does not depend on how many.
  ///
  /// - Parameters:
  ///   - values: Any number of floats.
  ///   - paddingZeros: How many of them are zeros that the memory layout added. They do not count;
  ///     if there are fewer zeros than that, all of them are left out.
  /// - Complexity: O(values).
  package mutating func observe(_ values: UnsafeBufferPointer<Float>, paddingZeros: Int = 0) {
    guard let start = values.baseAddress else { return }
    let keepsHistogram = keepsHistogram
    let setsZerosApart = paddingZeros > 0
    var zeros = 0
    // Counters of a scan hold 32 bits, so one stretch stays far below 2^32 values.
    let limit = 1 << 30
    var offset = 0
    while offset < values.count {
      let length = min(limit, values.count - offset)
      let threads = Parallel.threadCount(for: length, grain: Self.grain)
      var scans = (0..<threads).map { _ in ValueScan(keepsHistogram: keepsHistogram) }
      scans.withUnsafeMutableBufferPointer { slots in
        // Each part writes its own slot only.
        guard let slots = slots.baseAddress else { return }
        Parallel.forEachRange(length, grain: Self.grain) { part, range in
          slots[part].add(
            start + offset + range.lowerBound, count: range.count, setsZerosApart: setsZerosApart)
        }
      }
      for scan in scans {
        add(scan)
        zeros += scan.zeros
        scan.release()
      }
      offset += length
    }
    if zeros > paddingZeros { addZeros(zeros - paddingZeros) }
  }

  /// Adds the values of all elements of a tensor.
  ///
  /// - Throws: `HalfstepError.typeMismatch` unless the tensor is float32.
  package mutating func observe(_ tensor: Tensor) throws(HalfstepError) {
    var copy = self
    try tensor.withFloats { (values) throws(HalfstepError) in copy.observe(values) }
    self = copy
  }

  /// Values below which another thread is not worth its start.
  private static var grain: Int { 1 << 15 }

  /// Adds one thread's scan.
  private mutating func add(_ scan: ValueScan) {
    sawNonFinite = sawNonFinite || scan.sawNonFinite
    guard scan.count > 0 else { return }
    widen(to: scan.minimum, scan.maximum)
    count += UInt64(scan.count)
    if keepsHistogram {
      let shift = binExponent - scan.exponent
      let first = firstBin
      scan.forEachBin { index, amount in binCounts[(index >> shift) - first] += amount }
    }
  }

  private mutating func addZeros(_ number: Int) {
    widen(to: 0, 0)
    count += UInt64(number)
    if keepsHistogram { binCounts[-firstBin] += UInt64(number) }
  }
}
