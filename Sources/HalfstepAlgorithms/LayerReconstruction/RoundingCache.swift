// SPDX-License-Identifier: Apache-2.0
// Results of layers in a folder, so that a later run goes on where another ended.

import HalfstepGraph
import HalfstepNumerics

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// Results of layers in a folder, so that a later run goes on where another ended.
///
/// A file's name is a hash of all that its result depends on: weights, grids, inputs in both networks,
/// method and options. So what has changed is done anew, and what has not is read back to the last
/// bit. Files appear whole or not at all; damaged ones are done anew. Nothing is ever removed.
struct RoundingCache: Sendable {
  private let folder: String

  /// Changes whenever a method's results do.
  private static let revision: UInt64 = 2
  private static let signature: UInt64 = 0x6c61_7965_7268_7331

  /// - Throws: `HalfstepError.fileAccess` if the folder is not there and cannot be made.
  init(folder: String) throws(HalfstepError) {
    self.folder = folder
    if mkdir(folder, 0o777) != 0 && errno != EEXIST { throw Self.failure("creating", folder) }
  }

  /// What was made of a layer.
  struct Entry {
    var rounding: LayerRounding
    var before: Double
    var after: Double
  }

  // MARK: Keys

  /// The hash of all that a layer's result depends on.
  ///
  /// - Parameters:
  ///   - network: A hash of what candidates are compared with besides the layer; nil if nothing.
  static func key(
    _ problem: LayerProblem, method: String, network: String?
  ) throws(HalfstepError) -> String {
    var hash = ContentHash()
    hash.add(revision)
    hash.add(method)
    hash.add(network ?? "")
    let options = problem.options
    hash.add(
      "\(options.scheme) \(options.maximumRows) \(options.heldOutRows) \(options.keepsBetter) "
        + "\(options.seed) \(options.validation) \(options.targetsSums)")
    hash.add("\(problem.spec) \(problem.layer.layout) \(problem.following)")
    hash.add(
      "\(problem.position) \(problem.alpha) \(problem.canChangeBias) \(problem.node.opType)")
    for name in problem.node.attributes.keys.sorted() {
      hash.add("\(name) \(String(describing: problem.node.attributes[name]))")
    }
    for scale in problem.nearest.scales { hash.add(UInt64(scale.bitPattern)) }
    for point in problem.nearest.zeroPoints { hash.add(UInt64(bitPattern: Int64(point))) }
    hash.add(problem.weight)
    for value in problem.bias { hash.add(value.bitPattern) }
    hash.add(UInt64(problem.chunkCount))
    for chunk in 0..<problem.chunkCount {
      let inputs = try problem.inputs(chunk)
      hash.add(inputs.reference)
      hash.add(inputs.quantized)
    }
    return hash.text
  }

  // MARK: Files

  private func path(_ key: String) -> String { "\(folder)/\(key).layer" }

  /// Reads a result; nil if there is none, or none that fits and is undamaged.
  func load(_ key: String, for problem: LayerProblem) -> Entry? {
    let descriptor = open(path(key), O_RDONLY | O_CLOEXEC)
    guard descriptor >= 0 else { return nil }
    defer { close(descriptor) }
    var status = stat()
    let count = problem.weight.count
    // Weights, a scale and a zero point for each of them at most, a bias, and a little text.
    guard fstat(descriptor, &status) == 0, status.st_size <= 16 * count + 64 * 1024,
      status.st_size >= 16
    else { return nil }
    var bytes = [UInt8](repeating: 0, count: Int(status.st_size))
    var done = 0
    let isRead = bytes.withUnsafeMutableBytes { buffer in
      while done < buffer.count {
        guard let base = buffer.baseAddress else { return false }
        let part = read(descriptor, base + done, buffer.count - done)
        if part < 0 && errno == EINTR { continue }
        if part <= 0 { return false }
        done += part
      }
      return true
    }
    return isRead ? Self.decoded(bytes, problem) : nil
  }

  /// Writes a result aside, then gives it its name.
  ///
  /// - Throws: `HalfstepError.fileAccess`.
  func store(_ key: String, _ entry: Entry) throws(HalfstepError) {
    let bytes = try Self.encoded(entry)
    var name = Array("\(path(key)).XXXXXX".utf8CString)
    let descriptor = mkstemp(&name)
    guard descriptor >= 0 else { throw Self.failure("writing", folder) }
    var done = 0
    let isWritten = bytes.withUnsafeBytes { buffer in
      while done < buffer.count {
        guard let base = buffer.baseAddress else { return false }
        let part = write(descriptor, base + done, buffer.count - done)
        if part < 0 && errno == EINTR { continue }
        if part <= 0 { return false }
        done += part
      }
      return true
    }
    let isClosed = close(descriptor) == 0
    guard isWritten, isClosed, rename(name, path(key)) == 0 else {
      let failure = Self.failure("writing", path(key))
      unlink(name)
      throw failure
    }
  }

  private static func failure(_ action: String, _ path: String) -> HalfstepError {
    HalfstepError(
      .fileAccess, "rounding cache '\(path)': \(action): \(String(cString: strerror(errno)))")
  }

  // MARK: Bytes

  private static func encoded(_ entry: Entry) throws(HalfstepError) -> [UInt8] {
    var bytes: [UInt8] = []
    func append(_ word: UInt64) {
      withUnsafeBytes(of: word.littleEndian) { bytes.append(contentsOf: $0) }
    }
    func append(_ word: UInt32) {
      withUnsafeBytes(of: word.littleEndian) { bytes.append(contentsOf: $0) }
    }
    let (rounding, encoding) = (entry.rounding, entry.rounding.encoding)
    append(signature)
    append(entry.before.bitPattern)
    append(entry.after.bitPattern)
    append(UInt64(rounding.note.utf8.count))
    append(UInt64(rounding.weight.count))
    append(UInt64(encoding.scales.count))
    append(rounding.bias.map { UInt64($0.count) } ?? .max)
    for value in try rounding.weight.floats() { append(value.bitPattern) }
    for scale in encoding.scales { append(scale.bitPattern) }
    for point in encoding.zeroPoints { append(UInt32(bitPattern: Int32(clamping: point))) }
    for value in rounding.bias ?? [] { append(value.bitPattern) }
    bytes.append(contentsOf: rounding.note.utf8)
    append(_Hash.of(bytes))
    return bytes
  }

  private static func decoded(_ bytes: [UInt8], _ problem: LayerProblem) -> Entry? {
    let header = 7 * 8
    guard bytes.count >= header + 8 else { return nil }
    func word(_ offset: Int) -> UInt64 {
      bytes.withUnsafeBytes {
        UInt64(littleEndian: $0.loadUnaligned(fromByteOffset: offset, as: UInt64.self))
      }
    }
    guard word(bytes.count - 8) == _Hash.of(Array(bytes[..<(bytes.count - 8)])),
      word(0) == signature
    else { return nil }
    let nearest = problem.nearest
    let (count, groups) = (problem.weight.count, nearest.scales.count)
    let channels = word(48) == .max ? 0 : problem.bias.count
    guard let noteCount = Int(exactly: word(24)), word(32) == UInt64(count),
      word(40) == UInt64(groups), word(48) == .max || word(48) == UInt64(channels),
      bytes.count - header - 8 - 4 * (count + 2 * groups + channels) == noteCount
    else { return nil }
    var next = header
    func take(_ count: Int) -> [UInt32] {
      defer { next += 4 * count }
      return bytes.withUnsafeBytes { buffer in
        (0..<count).map {
          UInt32(littleEndian: buffer.loadUnaligned(fromByteOffset: next + 4 * $0, as: UInt32.self))
        }
      }
    }
    let values = take(count).map(Float.init(bitPattern:))
    let scales = take(groups).map(Float.init(bitPattern:))
    let points = take(groups).map { Int32(bitPattern: $0) }
    let bias = word(48) == .max ? nil : take(channels).map(Float.init(bitPattern:))
    let note = String(decoding: bytes[next..<next + noteCount], as: UTF8.self)
    guard let weight = try? Tensor(values, shape: problem.weight.shape.dimensions),
      let encoding = try? Encoding(
        bits: nearest.bits, isSigned: nearest.isSigned, isSymmetric: nearest.isSymmetric,
        isStrict: nearest.isStrict, granularity: nearest.granularity, scales: scales,
        zeroPoints: points)
    else { return nil }
    return Entry(
      rounding: LayerRounding(weight: weight, encoding: encoding, bias: bias, note: note),
      before: Double(bitPattern: word(8)), after: Double(bitPattern: word(16)))
  }
}
