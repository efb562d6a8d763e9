// SPDX-License-Identifier: Apache-2.0
// Statistics of a calibration as bytes, to be merged in another process.

import HalfstepGraph
import HalfstepNumerics
import OrderedCollections

extension QuantizationSimulation {
  /// Everything observed so far, to be merged elsewhere.
  ///
  /// Equal observations give equal bytes. Little-endian: "HSCS", version (4 bytes), fingerprint of
  /// the network with its quantized weights (8), number of tensors (4), then for each tensor in
  /// graph order the length of its name (4), the name in UTF-8, the length of its statistics (4) and
  /// the statistics; at the end a hash of all bytes before it (8).
  package func serializedStatistics() throws(HalfstepError) -> [UInt8] {
    var bytes = Self.signature
    func append<T: FixedWidthInteger>(_ value: T) {
      withUnsafeBytes(of: value.littleEndian) { bytes.append(contentsOf: $0) }
    }
    append(Self.version)
    append(fingerprint())
    append(UInt32(statistics.count))
    for (name, seen) in statistics {
      let title = Array(name.utf8)
      let content = seen.serialized()
      append(UInt32(title.count))
      bytes.append(contentsOf: title)
      append(UInt32(content.count))
      bytes.append(contentsOf: content)
    }
    append(_Hash.of(bytes))
    return bytes
  }

  /// Adds statistics that another simulation of the same network serialized.
  ///
  /// Merging is commutative and associative: the order and the split of the data do not show.
  ///
  /// - Throws: `HalfstepError.malformedFile` or `.unsupportedVersion` if the bytes are not what
  ///   `serializedStatistics` writes; `.encodingMismatch` if they come from another network, other
  ///   weights or another configuration. Nothing changes then.
  package func mergeStatistics(_ bytes: [UInt8]) throws(HalfstepError) {
    var reader = ByteReader(bytes)
    guard reader.take(4) == Self.signature else {
      throw HalfstepError(.malformedFile, "statistics: expected the signature HSCS")
    }
    let version = try reader.integer(UInt32.self)
    guard version == Self.version else {
      throw HalfstepError(
        .unsupportedVersion, "statistics: expected version \(Self.version), got \(version)")
    }
    guard bytes.count >= 8, _Hash.of(Array(bytes.dropLast(8))) == reader.trailer() else {
      throw HalfstepError(.malformedFile, "statistics: the bytes are damaged or cut short")
    }
    guard try reader.integer(UInt64.self) == fingerprint() else {
      throw HalfstepError(
        .encodingMismatch,
        "statistics: they come from another network, other weights or another configuration")
    }
    guard try reader.integer(UInt32.self) == statistics.count else {
      throw HalfstepError(.encodingMismatch, "statistics: another number of tensors")
    }
    var merged = statistics
    for name in statistics.keys {
      let title = reader.take(Int(try reader.integer(UInt32.self)))
      guard title == Array(name.utf8) else {
        throw HalfstepError(.encodingMismatch, "statistics: expected tensor '\(name)'")
      }
      guard let content = reader.take(Int(try reader.integer(UInt32.self))) else {
        throw HalfstepError(.malformedFile, "statistics: the bytes are cut short")
      }
      let seen: RangeStatistics
      do {
        seen = try RangeStatistics(serialized: content)
        try merged[name]?.merge(seen)
      } catch {
        throw HalfstepError(error.code, "tensor '\(name)': \(error.message)")
      }
    }
    guard reader.remaining == 8 else {
      throw HalfstepError(.malformedFile, "statistics: bytes left over at the end")
    }
    statistics = merged
  }

  private static let signature: [UInt8] = Array("HSCS".utf8)
  private static let version: UInt32 = 1

  /// A hash of everything that the observed values depend on beside the data.
  private func fingerprint() -> UInt64 {
    var hash = _Hash()
    for input in graph.inputs { hash.add(input.name) }
    for node in graph.nodes {
      hash.add(node.opType)
      hash.add(node.domain)
      for name in node.inputs + ["|"] + node.outputs { hash.add(name) }
      for (key, value) in node.attributes {
        hash.add(key)
        hash.add(value)
      }
    }
    for (name, tensor) in graph.initializers {
      hash.add(name)
      hash.add(tensor)
    }
    for (name, quantizer) in quantizers where quantizer.site.role == .parameter {
      guard quantizer.isEnabled, let encoding = quantizer.encoding else { continue }
      hash.add(name)
      hash.add(UInt64(encoding.bits))
      for scale in encoding.scales { hash.add(UInt64(scale.bitPattern)) }
      for zero in encoding.zeroPoints { hash.add(UInt64(bitPattern: Int64(zero))) }
    }
    for (name, seen) in statistics {
      hash.add(name)
      hash.add(seen.keepsHistogram ? 1 : 0)
    }
    return hash.value
  }
}

/// Reads integers and runs of bytes without ever leaving the array.
private struct ByteReader {
  private let bytes: [UInt8]
  private var offset = 0

  init(_ bytes: [UInt8]) { self.bytes = bytes }

  var remaining: Int { bytes.count - offset }

  mutating func take(_ count: Int) -> [UInt8]? {
    guard count >= 0, count <= remaining else { return nil }
    defer { offset += count }
    return Array(bytes[offset..<offset + count])
  }

  mutating func integer<T: FixedWidthInteger>(_ type: T.Type) throws(HalfstepError) -> T {
    guard let field = take(MemoryLayout<T>.size) else {
      throw HalfstepError(.malformedFile, "statistics: the bytes are cut short")
    }
    return field.reversed().reduce(0) { $0 << 8 | T(truncatingIfNeeded: $1) }
  }

  /// The last 8 bytes as an integer.
  func trailer() -> UInt64 {
    bytes.suffix(8).reversed().reduce(0) { $0 << 8 | UInt64($1) }
  }
}
