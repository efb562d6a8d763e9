// SPDX-License-Identifier: Apache-2.0
// Statistics as bytes, for files and other processes.

extension RangeStatistics {
  /// The state as bytes; equal states give equal bytes on every machine.
  ///
  /// Little-endian: "HSRS", version (4 bytes), flags (4: bit 0 histogram, bit 1 non-finite), number of
  /// bins (4), number of values (8), minimum and maximum (4 each, float bits), then 8 bytes a bin from
  /// the minimum's bin to the maximum's.
  package func serialized() -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.reserveCapacity(Self.headerSize + 8 * binCounts.count)
    func append<T: FixedWidthInteger>(_ value: T) {
      withUnsafeBytes(of: value.littleEndian) { bytes.append(contentsOf: $0) }
    }
    bytes.append(contentsOf: Self.signature)
    append(Self.version)
    append(UInt32((keepsHistogram ? 1 : 0) | (sawNonFinite ? 2 : 0)))
    append(UInt32(binCounts.count))
    append(count)
    append(minimum.bitPattern)
    append(maximum.bitPattern)
    for amount in binCounts { append(amount) }
    return bytes
  }

  /// Reads what `serialized()` wrote, and checks that such a state can exist.
  ///
  /// - Throws: `HalfstepError.malformedFile` if the bytes are anything else; `.unsupportedVersion` for
  ///   another version of the layout.
  package init(serialized bytes: [UInt8]) throws(HalfstepError) {
    func fail(_ what: String) -> HalfstepError {
      HalfstepError(.malformedFile, "statistics: \(what)")
    }
    guard bytes.count >= Self.headerSize, Array(bytes[0..<4]) == Self.signature else {
      throw fail("expected a header of \(Self.headerSize) bytes")
    }
    func read<T: FixedWidthInteger>(_ offset: Int, as type: T.Type) -> T {
      var value: T = 0
      withUnsafeMutableBytes(of: &value) {
        $0.copyBytes(from: bytes[offset..<offset + MemoryLayout<T>.size])
      }
      return T(littleEndian: value)
    }
    let version = read(4, as: UInt32.self)
    guard version == Self.version else {
      throw HalfstepError(
        .unsupportedVersion, "statistics: expected version \(Self.version), got \(version)")
    }
    let flags = read(8, as: UInt32.self)
    guard flags < 4 else { throw fail("unknown flags \(flags)") }
    self.init(keepsHistogram: flags & 1 != 0)
    sawNonFinite = flags & 2 != 0
    let bins = Int(read(12, as: UInt32.self))
    count = read(16, as: UInt64.self)
    minimum = Float(bitPattern: read(24, as: UInt32.self))
    maximum = Float(bitPattern: read(28, as: UInt32.self))
    guard bins <= 2 * Self.binsPerSide, bytes.count == Self.headerSize + 8 * bins else {
      throw fail("\(bytes.count) bytes for \(bins) bins")
    }
    guard count <= Self.countLimit else { throw fail("\(count) values") }
    if isEmpty {
      guard minimum == .infinity, maximum == -.infinity, bins == 0 else {
        throw fail("a range without values")
      }
      return
    }
    guard minimum.isFinite, maximum.isFinite, minimum <= maximum,
      !(minimum == 0 && minimum.sign == .minus), !(maximum == 0 && maximum.sign == .minus)
    else { throw fail("range \(minimum)...\(maximum)") }
    guard keepsHistogram else {
      guard bins == 0 else { throw fail("bins without a histogram") }
      return
    }
    let last = Self.binIndex(maximum, exponent: binExponent)
    guard bins == last - firstBin + 1 else { throw fail("\(bins) bins do not fit the range") }
    var sum: UInt64 = 0
    binCounts.reserveCapacity(bins)
    for bin in 0..<bins {
      let amount = read(Self.headerSize + 8 * bin, as: UInt64.self)
      let (next, overflow) = sum.addingReportingOverflow(amount)
      guard !overflow else { throw fail("bins hold more than \(count) values") }
      sum = next
      binCounts.append(amount)
    }
    guard sum == count, binCounts[0] > 0, binCounts[bins - 1] > 0 else {
      throw fail("bins hold \(sum) of \(count) values")
    }
  }

  private static let signature: [UInt8] = [0x48, 0x53, 0x52, 0x53]
  private static let version: UInt32 = 1
  private static let headerSize = 32
}
