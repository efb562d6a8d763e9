// SPDX-License-Identifier: Apache-2.0
// Turns the JSON tree of an encodings file into a table.

import HalfstepGraph
import HalfstepNumerics
import OrderedCollections

/// Turns the JSON tree of an encodings file into a table.
struct EncodingsReader {
  /// What was read so far.
  private(set) var table = EncodingTable()

  /// Reads a whole document.
  mutating func read(_ root: JSONCursor) throws(HalfstepError) {
    let members = try root.members()
    guard let version = try members.first(where: { $0.key == "version" })?.value.string() else {
      return try readUnversioned(root)
    }
    switch version {
    case "2.0.0", "2.1.0":
      let keys = try root.members(
        known: ["version", "producer", "encodings", "excluded_layers", "quantizer_args"],
        required: ["encodings"])
      try readHeader(keys)
      for entry in try keys["encodings"]!.elements() { try readOperatorStyle(entry) }
    case "1.0.0", "0.4.0", "0.5.0", "0.6.0", "0.6.1":
      try readSections(root)
    default:
      throw HalfstepError(
        .unsupportedVersion,
        "encodings version '\(version)': expected 0.4 to 0.6.1, 1.0.0, 2.0.0 or 2.1.0")
    }
  }

  /// Files from before versions, and files that hold nothing but constants by name.
  private mutating func readUnversioned(_ root: JSONCursor) throws(HalfstepError) {
    let members = try root.members()
    if members.contains(where: { $0.key == "activation_encodings" || $0.key == "param_encodings" })
    {
      return try readSections(root)
    }
    for (name, entry) in members {
      guard case .array = entry.value else { throw entry.failure("this key is not known") }
      try readLegacy(name, entry, isParameter: true)
    }
  }

  private mutating func readSections(_ root: JSONCursor) throws(HalfstepError) {
    let keys = try root.members(known: [
      "version", "producer", "activation_encodings", "param_encodings", "excluded_layers",
      "quantizer_args",
    ])
    try readHeader(keys)
    for (key, isParameter) in [("activation_encodings", false), ("param_encodings", true)] {
      guard let section = keys[key] else { continue }
      if case .array = section.value {
        for entry in try section.elements() { try readListed(entry, isParameter: isParameter) }
        continue
      }
      for (name, entry) in try section.members() {
        if case .object = entry.value {
          try readModule(name, entry, isParameter: isParameter)
        } else {
          try readLegacy(name, entry, isParameter: isParameter)
        }
      }
    }
  }

  private mutating func readHeader(_ keys: [String: JSONCursor]) throws(HalfstepError) {
    if let producer = try keys["producer"]?.members() {
      for (_, value) in producer { _ = try value.string() }
    }
    for layer in try keys["excluded_layers"]?.elements() ?? [] {
      table.excludedLayers.append(try layer.string())
    }
    guard
      let arguments = try keys["quantizer_args"]?.members(known: [
        "activation_bitwidth", "param_bitwidth", "dtype", "is_symmetric",
        "per_channel_quantization", "quant_scheme",
      ])
    else { return }
    _ = try arguments["dtype"]?.string()
    table.arguments = QuantizerArguments(
      activationBits: try arguments["activation_bitwidth"]?.integer() ?? 8,
      parameterBits: try arguments["param_bitwidth"]?.integer() ?? 8,
      isSymmetric: try arguments["is_symmetric"]?.boolean() ?? true,
      isPerChannel: try arguments["per_channel_quantization"]?.boolean() ?? false,
      scheme: try arguments["quant_scheme"]?.string() ?? "min_max")
  }

  // MARK: 0.4 to 0.6.1

  private mutating func readLegacy(
    _ name: String, _ cursor: JSONCursor, isParameter: Bool
  ) throws(HalfstepError) {
    let entries = try cursor.elements()
    guard !entries.isEmpty else { throw cursor.failure("expected an entry or more") }
    var numbers = OffsetForm(at: cursor)
    for (index, entry) in entries.enumerated() {
      let keys = try entry.members(
        known: ["bitwidth", "dtype", "is_symmetric", "max", "min", "offset", "scale"],
        required: ["bitwidth"])
      let bits = try keys["bitwidth"]!.integer()
      if let dtype = try keys["dtype"]?.string(), dtype != "int" {
        guard dtype == "float", entries.count == 1 else {
          throw keys["dtype"]!.failure("expected \"int\" or \"float\", got \"\(dtype)\"")
        }
        return try add(name, floatBits: bits, entry)
      }
      guard let scale = keys["scale"], let offset = keys["offset"] else {
        throw entry.failure("key 'scale' or 'offset' is missing")
      }
      let isSymmetric = try keys["is_symmetric"].map(Self.flag) ?? false
      guard index == 0 || (bits == numbers.bits && isSymmetric == numbers.isSymmetric) else {
        throw entry.failure("bitwidth or is_symmetric differs from the first channel's")
      }
      for bound in [keys["min"], keys["max"]] { _ = try bound?.number() }
      numbers.bits = bits
      numbers.isSymmetric = isSymmetric
      numbers.scales.append(try Self.scale(scale))
      numbers.offsets.append(try offset.number())
    }
    try add(
      name,
      try numbers.encoding(entries.count == 1 ? .perTensor : .perChannel(axis: 0)),
      isParameter: isParameter, cursor)
  }

  /// Entries of a module by direction and position, as the PyTorch-names file has them.
  private mutating func readModule(
    _ module: String, _ cursor: JSONCursor, isParameter: Bool
  ) throws(HalfstepError) {
    for (direction, positions) in try cursor.members() {
      for (position, entry) in try positions.members() {
        let list = JSONCursor(
          root: .array([entry.value]), path: entry.path, entry.code)
        try readLegacy("\(module).\(direction).\(position)", list, isParameter: isParameter)
      }
    }
  }

  /// A boolean, which versions spell as a string or as JSON's own.
  private static func flag(_ cursor: JSONCursor) throws(HalfstepError) -> Bool {
    if case .boolean(let flag) = cursor.value { return flag }
    return try cursor.spelledBoolean()
  }

  // MARK: 1.0.0

  private mutating func readListed(
    _ cursor: JSONCursor, isParameter: Bool
  ) throws(HalfstepError) {
    let keys = try cursor.members(
      known: [
        "name", "enc_type", "dtype", "bw", "is_sym", "scale", "offset", "block_size",
        "compressed_bw", "per_block_int_scale", "zero_point_shift",
      ], required: ["name", "enc_type", "dtype", "bw"])
    let name = try keys["name"]!.string()
    let type = try keys["dtype"]!.string()
    var numbers = OffsetForm(at: cursor)
    numbers.bits = try keys["bw"]!.integer()
    if type == "FLOAT" { return try add(name, floatBits: numbers.bits, cursor) }
    guard type == "INT" else {
      throw keys["dtype"]!.failure("expected \"INT\" or \"FLOAT\", got \"\(type)\"")
    }
    for shift in try keys["zero_point_shift"]?.elements() ?? [] where try shift.number() != 0 {
      throw shift.failure("grids with a shifted zero point are not supported")
    }
    guard let scale = keys["scale"] else { throw cursor.failure("key 'scale' is missing") }
    numbers.isSymmetric = try keys["is_sym"].map(Self.flag) ?? false
    for element in try scale.elements() { numbers.scales.append(try Self.scale(element)) }
    for element in try keys["offset"]?.elements() ?? [] {
      numbers.offsets.append(try element.number())
    }
    let granularity: Granularity
    let kind = try keys["enc_type"]!.string()
    switch kind {
    case "PER_TENSOR":
      guard numbers.scales.count == 1 else { throw scale.failure("expected 1 number") }
      granularity = .perTensor
    case "PER_CHANNEL":
      granularity = .perChannel(axis: 0)
    case "PER_BLOCK", "LPBQ":
      let size = try blockSize(keys["block_size"], cursor)
      granularity = .perBlock(channelAxis: 0, axis: 1, size: size)
      if kind == "LPBQ" { try expandBlocks(keys, cursor, &numbers) }
    default:
      throw keys["enc_type"]!.failure("type \"\(kind)\" is not supported")
    }
    try add(name, try numbers.encoding(granularity), isParameter: isParameter, cursor)
  }

  private func blockSize(
    _ size: JSONCursor?, _ entry: JSONCursor
  ) throws(HalfstepError) -> Int {
    guard let size else { throw entry.failure("key 'block_size' is missing") }
    let value = try size.integer()
    guard value > 0 else { throw size.failure("expected a positive number, got \(value)") }
    return value
  }

  /// Multiplies the integer scale of each block with the float scale of its channel.
  private func expandBlocks(
    _ keys: [String: JSONCursor], _ entry: JSONCursor, _ numbers: inout OffsetForm
  ) throws(HalfstepError) {
    guard let compressed = keys["compressed_bw"], let integers = keys["per_block_int_scale"] else {
      throw entry.failure("key 'compressed_bw' or 'per_block_int_scale' is missing")
    }
    numbers.bits = try compressed.integer()
    guard (2...16).contains(numbers.bits) else {
      throw compressed.failure("expected 2...16, got \(numbers.bits)")
    }
    let factors = try integers.elements()
    let channels = numbers.scales.count
    guard channels > 0, !factors.isEmpty, factors.count % channels == 0 else {
      throw integers.failure("\(factors.count) blocks do not divide among \(channels) channels")
    }
    let blocks = factors.count / channels
    var scales: [Float] = []
    for (index, factor) in factors.enumerated() {
      scales.append(numbers.scales[index / blocks] * Float(try factor.number()))
    }
    numbers.scales = scales
    numbers.isSymmetric = true
    numbers.offsets = [Double](
      repeating: -Double(1 << (numbers.bits - 1)), count: scales.count)
  }

  // MARK: 2.0.0 and 2.1.0

  private mutating func readOperatorStyle(_ cursor: JSONCursor) throws(HalfstepError) {
    let keys = try cursor.members(
      known: [
        "name", "output_dtype", "y_scale", "y_zero_point", "axis", "block_size",
        "per_block_int_scale", "per_channel_float_scale",
      ], required: ["name", "output_dtype"])
    let name = try keys["name"]!.string()
    let type = try keys["output_dtype"]!.string()
    if type.hasPrefix("float") || type == "bfloat16" {
      guard let bits = ["float16": 16, "bfloat16": 16, "float32": 32][type] else {
        throw keys["output_dtype"]!.failure("type \"\(type)\" is not supported")
      }
      return try add(name, floatBits: bits, cursor)
    }
    let isSigned = type.hasPrefix("int")
    guard isSigned || type.hasPrefix("uint"), let bits = Int(type.dropFirst(isSigned ? 3 : 4))
    else {
      throw keys["output_dtype"]!.failure("type \"\(type)\" is not supported")
    }
    let scales = try NestedNumbers.scales(of: cursor, keys)
    var zeroPoints = [Int32](repeating: 0, count: scales.values.count)
    if let cursor = keys["y_zero_point"] {
      let read = try NestedNumbers(cursor)
      guard read.shape == scales.shape else {
        throw cursor.failure("its shape \(read.shape) is not that of y_scale, \(scales.shape)")
      }
      for (index, value) in read.values.enumerated() {
        guard let zero = Int32(exactly: value) else {
          throw cursor.failure("expected integers, got \(value)")
        }
        zeroPoints[index] = zero
      }
    }
    let granularity = try granularity(keys, scales.shape, cursor)
    var values = scales.values
    if case .perBlock(let channelAxis, let axis, _) = granularity, axis < channelAxis {
      // Here channels come first, whatever the order of the axes.
      let channels = scales.shape[channelAxis]
      let order = (0..<channels).flatMap { channel in
        stride(from: channel, to: values.count, by: channels)
      }
      values = order.map { values[$0] }
      zeroPoints = order.map { zeroPoints[$0] }
    }
    let isSymmetric = isSigned && zeroPoints.allSatisfy { $0 == 0 }
    let encoding: Encoding
    do throws(HalfstepError) {
      encoding = try Encoding(
        bits: bits, isSigned: isSigned, isSymmetric: isSymmetric, granularity: granularity,
        scales: values.map { Float($0) }, zeroPoints: zeroPoints)
    } catch {
      throw cursor.failure(error.message)
    }
    try add(name, encoding, isParameter: granularity != .perTensor || bits == 32, cursor)
  }

  private func granularity(
    _ keys: [String: JSONCursor], _ shape: [Int], _ cursor: JSONCursor
  ) throws(HalfstepError) -> Granularity {
    guard let axisCursor = keys["axis"] else {
      guard shape.isEmpty else { throw cursor.failure("key 'axis' is missing") }
      return .perTensor
    }
    let axis = try axisCursor.integer()
    guard let sizeCursor = keys["block_size"] else {
      guard shape.count == 1, axis >= 0, axis < Shape.maximumRank else {
        throw axisCursor.failure("axis \(axis) does not fit scales of shape \(shape)")
      }
      return .perChannel(axis: axis)
    }
    let size = try blockSize(sizeCursor, cursor)
    let rank = shape.count
    guard rank >= 2, rank <= Shape.maximumRank, axis >= -rank, axis < rank else {
      throw axisCursor.failure("axis \(axis) does not fit scales of shape \(shape)")
    }
    let blockAxis = axis < 0 ? axis + rank : axis
    let others = (0..<rank).filter { $0 != blockAxis && shape[$0] != 1 }
    guard others.count <= 1 else {
      throw cursor.failure("blocks along one axis and channels along one other are supported")
    }
    let channelAxis = others.first ?? (blockAxis == 0 ? 1 : 0)
    return .perBlock(channelAxis: channelAxis, axis: blockAxis, size: size)
  }

  // MARK: Results

  private mutating func add(
    _ name: String, _ encoding: Encoding, isParameter: Bool, _ cursor: JSONCursor
  ) throws(HalfstepError) {
    try checkNew(name, cursor)
    if isParameter {
      table.parameters[name] = encoding
    } else {
      table.activations[name] = encoding
    }
  }

  private mutating func add(
    _ name: String, floatBits bits: Int, _ cursor: JSONCursor
  ) throws(HalfstepError) {
    try checkNew(name, cursor)
    guard [8, 16, 32].contains(bits) else {
      throw cursor.failure("expected 8, 16 or 32 bits of a float, got \(bits)")
    }
    table.floatBits[name] = bits
  }

  private func checkNew(_ name: String, _ cursor: JSONCursor) throws(HalfstepError) {
    guard !name.isEmpty else { throw cursor.failure("the name is empty") }
    guard table[name] == nil, table.floatBits[name] == nil else {
      throw cursor.failure("tensor '\(name)' has two entries")
    }
  }

  private static func scale(_ cursor: JSONCursor) throws(HalfstepError) -> Float {
    let value = try cursor.number()
    guard value > 0, Float(value) > 0, Float(value).isFinite else {
      throw cursor.failure("scale \(value) is not a positive float")
    }
    return Float(value)
  }
}

/// Numbers of an entry in the form of versions before 2: codes count from 0 and offsets are negated
/// zero points.
private struct OffsetForm {
  let cursor: JSONCursor
  var bits = 0
  var isSymmetric = false
  var scales: [Float] = []
  var offsets: [Double] = []

  init(at cursor: JSONCursor) { self.cursor = cursor }

  /// The grid: signed where every offset is that of a symmetric signed grid, unsigned otherwise.
  func encoding(_ granularity: Granularity) throws(HalfstepError) -> Encoding {
    guard (2...16).contains(bits) || bits == 32 else {
      throw cursor.failure("expected 2...16 or 32 bits, got \(bits)")
    }
    guard offsets.count == scales.count else {
      throw cursor.failure("\(scales.count) scales and \(offsets.count) offsets")
    }
    let half = Double(1 << (bits - 1))
    let isFull = offsets.allSatisfy { $0 == -half }
    let isSigned = isSymmetric && (isFull || offsets.allSatisfy { $0 == 1 - half })
    var zeroPoints: [Int32] = []
    for offset in offsets {
      guard let zero = Int32(exactly: isSigned ? 0 : -offset) else {
        throw cursor.failure("expected an integer offset, got \(offset)")
      }
      zeroPoints.append(zero)
    }
    do throws(HalfstepError) {
      return try Encoding(
        bits: bits, isSigned: isSigned,
        isSymmetric: isSymmetric && zeroPoints.allSatisfy { $0 == 0 },
        isStrict: isSigned && !isFull, granularity: granularity, scales: scales,
        zeroPoints: zeroPoints)
    } catch {
      throw cursor.failure(error.message)
    }
  }
}
