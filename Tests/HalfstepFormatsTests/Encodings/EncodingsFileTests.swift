// SPDX-License-Identifier: Apache-2.0
// Reading and writing of encodings files.

import Foundation
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics
import Testing

@Suite struct EncodingsFileTests {
  /// One entry of each kind whose meaning every version keeps.
  private static func table() throws -> EncodingTable {
    var table = EncodingTable()
    table.activations["x"] = try Encoding(
      bits: 8, isSigned: false, isSymmetric: false, scales: [0.022789521], zeroPoints: [119])
    table.activations["/act/Relu \"1\""] = try Encoding(
      bits: 16, isSigned: false, isSymmetric: false, scales: [1e-5], zeroPoints: [0])
    table.parameters["w"] = try Encoding(
      bits: 4, isSigned: true, isSymmetric: true, granularity: .perChannel(axis: 0),
      scales: [0.1, 3.5, 1e-9], zeroPoints: [0, 0, 0])
    table.parameters["b"] = try Encoding(
      bits: 32, isSigned: true, isSymmetric: true, granularity: .perChannel(axis: 0),
      scales: [2e-7, 1e-4], zeroPoints: [0, 0])
    return table
  }

  private static func withExtras(_ table: EncodingTable) -> EncodingTable {
    var table = table
    table.excludedLayers = ["fc"]
    table.floatBits["f"] = 16
    table.arguments = QuantizerArguments(
      activationBits: 8, parameterBits: 4, isSymmetric: true, isPerChannel: true, scheme: "min_max")
    return table
  }

  @Test(arguments: [EncodingsFile.Version.v0_6_1, .v1_0_0])
  func writtenTablesAreReadWhole(version: EncodingsFile.Version) throws {
    var table = Self.withExtras(try Self.table())
    table.parameters["strict"] = try Encoding(
      bits: 8, isSigned: true, isSymmetric: true, isStrict: true, scales: [0.5], zeroPoints: [0])
    table.activations["unsigned"] = try Encoding(
      bits: 8, isSigned: false, isSymmetric: true, scales: [0.5], zeroPoints: [0])
    #expect(try read(write(table, version)) == table)
  }

  @Test func writtenTablesOfVersion2AreRead() throws {
    var table = try Self.table()
    table.floatBits["f"] = 16
    table.activations["signed"] = try Encoding(
      bits: 8, isSigned: true, isSymmetric: false, scales: [0.5], zeroPoints: [-7])
    #expect(try read(write(table, .v2_0_0)) == table)
  }

  @Test(arguments: EncodingsFile.Version.allCases)
  func bytesDependOnTheTableOnly(version: EncodingsFile.Version) throws {
    let table = Self.withExtras(try Self.table())
    #expect(try write(table, version) == write(read(write(table, version)).merged(table), version))
    #expect(try write(table, version) == write(table, version))
  }

  @Test func numbersFollowAIMETsConventions() throws {
    var table = EncodingTable()
    table.activations["x"] = try Encoding(
      bits: 8, isSigned: true, isSymmetric: false, scales: [0.5], zeroPoints: [-28])
    table.parameters["w"] = try Encoding(
      bits: 8, isSigned: true, isSymmetric: true, isStrict: true, scales: [0.25], zeroPoints: [0])
    // Codes −128...127 with 0 at −28: as unsigned codes 0 lies at 100, reals are −50...77.5.
    let legacy = try text(write(table, .v0_6_1))
    #expect(legacy.contains("\"offset\": -100"))
    #expect(legacy.contains("\"min\": -50.0"))
    #expect(legacy.contains("\"max\": 77.5"))
    #expect(legacy.contains("\"is_symmetric\": \"True\""))
    // Codes −127...127.
    #expect(legacy.contains("\"offset\": -127"))
    #expect(legacy.contains("\"min\": -31.75"))
    let listed = try text(write(table, .v1_0_0))
    #expect(listed.contains("\"offset\": [-100]"))
    #expect(listed.contains("\"is_sym\": true"))
    let operators = try text(write(table, .v2_0_0))
    #expect(operators.contains("\"y_zero_point\": -28"))
    #expect(operators.contains("\"output_dtype\": \"int8\""))
  }

  // MARK: Blocks

  @Test(arguments: [(0, 1), (1, 0)])
  func blocksKeepTheirPlace(channelAxis: Int, axis: Int) throws {
    // 2 channels with 3 blocks each, of 2 indices but for the last; scales 1, 2, ... by channel.
    var extents = [3, 3, 1, 1]
    extents[channelAxis] = 2
    extents[axis] = 5
    var graph = Graph()
    graph.initializers["w"] = try Tensor([Float](repeating: 0, count: 10), shape: extents)
    var table = EncodingTable()
    table.parameters["w"] = try Encoding(
      bits: 4, isSigned: true, isSymmetric: true,
      granularity: .perBlock(channelAxis: channelAxis, axis: axis, size: 2),
      scales: [1, 2, 3, 4, 5, 6], zeroPoints: [Int32](repeating: 0, count: 6))
    let bytes = try EncodingsFile.serialize(table, version: .v2_0_0, graph: graph)
    #expect(try read(bytes) == table)
    #expect(try text(bytes).contains("\"block_size\": 2"))
    expectFailure(.invalidArgument, "'w'") { _ = try write(table, .v2_0_0) }
    expectFailure(.unsupportedVersion, "'w'") { _ = try write(table, .v0_6_1) }
    let listed = try read(write(table, .v1_0_0))
    #expect(listed.parameters["w"]?.scales == [1, 2, 3, 4, 5, 6])
    #expect(listed.parameters["w"]?.granularity == .perBlock(channelAxis: 0, axis: 1, size: 2))
  }

  // Channel scales 0.5 and 2 times block integers 12, 16 | 7, 16.
  @Test func groupedBlocksAreMultipliedOut() throws {
    let listed = try read(
      Array(
        """
        {"version": "1.0.0", "activation_encodings": [], "param_encodings": [{"name": "w",
         "enc_type": "LPBQ", "dtype": "INT", "bw": 8, "compressed_bw": 4, "block_size": 2,
         "is_sym": true, "scale": [0.5, 2], "offset": [-128, -128],
         "per_block_int_scale": [12, 16, 7, 16]}]}
        """.utf8))
    #expect(listed.parameters["w"]?.scales == [6, 8, 14, 32])
    #expect(listed.parameters["w"]?.bits == 4)
    let integers = "[[[[12]],[[16]]],[[[7]],[[16]]]]"
    for scales in [
      #""per_block_int_scale": \#(integers), "per_channel_float_scale": [[[[0.5]]],[[[2]]]]"#,
      #""y_scale": {"x": \#(integers), "x_scale": [0.5, 2], "axis": -4}"#,
    ] {
      let table = try read(
        Array(
          #"{"version": "2.1.0", "encodings": [{"name": "w", "output_dtype": "int4", "axis": 1, "#
            .utf8) + Array("\"block_size\": 2, \(scales)}]}".utf8))
      #expect(table.parameters["w"]?.scales == [6, 8, 14, 32])
      #expect(
        table.parameters["w"]?.granularity == .perBlock(channelAxis: 0, axis: 1, size: 2))
    }
  }

  // MARK: Files of others

  @Test(arguments: referenceFiles(".encodings"))
  func referenceFilesKeepEveryEntry(path: String) throws {
    let bytes = try AtomicFile.read(path)
    let table = try read(bytes)
    let count = try entryCount(bytes)
    #expect(count > 0)
    #expect(table.activations.count + table.parameters.count == count)
    for version in EncodingsFile.Version.allCases {
      let again = try read(write(table, version))
      #expect(again.activations.count + again.parameters.count == count)
      for (name, encoding) in table.activations { expectSameGrid(again[name], encoding) }
      for (name, encoding) in table.parameters { expectSameGrid(again[name], encoding) }
    }
  }

  @Test func olderFilesAreRead() throws {
    let entry =
      #"[{"bitwidth": 8, "is_symmetric": "False", "max": 1, "min": 0, "offset": -0.0, "#
      + #""scale": 0.5}]"#
    for text in [
      #"{"version": "0.4.0", "activation_encodings": {"x": \#(entry)}, "param_encodings": {}}"#,
      #"{"activation_encodings": {"x": \#(entry)}}"#, #"{"x": \#(entry)}"#,
    ] {
      let encoding = try #require(try read(Array(text.utf8))["x"])
      #expect(encoding.scales == [0.5] && encoding.zeroPoints == [0] && !encoding.isSigned)
    }
  }

  // MARK: Errors

  @Test func unknownVersionIsRefused() {
    expectFailure(.unsupportedVersion, "3.0.0") {
      _ = try read(Array(#"{"version": "3.0.0", "encodings": []}"#.utf8))
    }
  }

  @Test(arguments: [
    (#""output_dtype": "uint8", "y_scale": 0"#, "encodings[0]: "),
    (#""output_dtype": "uint8", "y_scale": "a""#, "[0].y_scale: expected a number, got a string"),
    (#""output_dtype": "uint8", "y_scale": [1, 2]"#, "'axis' is missing"),
    (#""output_dtype": "uint8", "y_scale": [1, 2], "axis": -1"#, "encodings[0].axis"),
    (#""output_dtype": "uint8", "axis": 0, "y_scale": [[1], [2, 3]]"#, "y_scale[1]: expected 1"),
    (#""output_dtype": "uint8", "axis": 0, "y_scale": []"#, "encodings[0].y_scale"),
    (#""output_dtype": "int4", "axis": 1, "block_size": 0, "y_scale": [[1]]"#, "block_size"),
    (#""output_dtype": "int4", "axis": 1, "block_size": 1, "y_scale": 1"#, "axis 1 does not fit"),
    (#""output_dtype": "int99", "y_scale": 1"#, "bits"),
    (#""output_dtype": "uint8", "y_scale": 1, "y_zero_point": 256"#, "zero point"),
    (#""output_dtype": "uint8", "y_scale": 1, "y_zero_point": 1e10"#, "y_zero_point"),
    (#""output_dtype": "uint8", "y_scale": 1, "y_zero_point": [1]"#, "y_zero_point: its shape"),
    (#""output_dtype": "uint8", "y_scale": 1e999"#, "too large"),
    (#""output_dtype": "text""#, "encodings[0].output_dtype"),
    (#""output_dtype": "uint8", "y_scale": 1, "z": 1"#, "encodings[0].z: this key is not known"),
  ])
  func wrongEntriesAreNamed(text: String, message: String) {
    let document = #"{"version": "2.0.0", "encodings": [{"name": "x", \#(text)}]}"#
    expectFailure(.malformedFile, message) { _ = try read(Array(document.utf8)) }
  }

  @Test(arguments: [
    (#""enc_type": "VECTOR", "scale": [1], "offset": [0]"#, "activation_encodings[0].enc_type"),
    (#""enc_type": "PER_TENSOR", "scale": [1], "offset": [0.5]"#, "expected an integer offset"),
    (#""enc_type": "PER_TENSOR", "scale": [1], "offset": [7]"#, "activation_encodings[0]"),
    (#""enc_type": "PER_TENSOR", "scale": [1], "offset": [0, 0]"#, "1 scales and 2 offsets"),
    (#""enc_type": "PER_TENSOR", "scale": [1, 2], "offset": [0, 0]"#, "[0].scale"),
    (#""enc_type": "PER_BLOCK", "scale": [1], "offset": [0]"#, "'block_size' is missing"),
    (#""enc_type": "LPBQ", "block_size": 2, "scale": [1]"#, "'compressed_bw'"),
  ])
  func wrongListedEntriesAreNamed(text: String, message: String) {
    let document =
      #"{"version": "1.0.0", "activation_encodings": [{"name": "x", "dtype": "INT", "bw": 8, "#
      + text + "}]}"
    expectFailure(.malformedFile, message) { _ = try read(Array(document.utf8)) }
  }

  @Test(arguments: [
    (#"{"version": "2.0.0"}"#, "'encodings' is missing"),
    (#"{"version": "2.0.0", "encodings": [], "more": 1}"#, "more: this key is not known"),
    (
      #"{"version": "0.6.1", "activation_encodings": {"x": [{"bitwidth": 8, "scale": -1}]}}"#,
      "activation_encodings.x[0]"
    ),
    (#"{"version": "0.6.1", "param_encodings": {"x": []}}"#, "param_encodings.x"),
    (#"{"version": "0.6.1", "quantizer_args": {"bits": 8}}"#, "quantizer_args.bits"),
    (#"{"version": 1}"#, "version"), ("[]", "expected an object"), ("", "ends early"),
  ])
  func wrongFilesAreNamed(text: String, message: String) {
    expectFailure(.malformedFile, message) { _ = try read(Array(text.utf8)) }
  }

  @Test func repeatedNamesAreRefused() {
    let entry = #"{"name": "x", "output_dtype": "uint8", "y_scale": 1}"#
    expectFailure(.malformedFile, "encodings[1]: tensor 'x' has two entries") {
      _ = try read(
        Array(#"{"version": "2.0.0", "encodings": [\#(entry), \#(entry)]}"#.utf8))
    }
  }

  // MARK: Helpers

  private func write(
    _ table: EncodingTable, _ version: EncodingsFile.Version
  ) throws -> [UInt8] { try EncodingsFile.serialize(table, version: version) }

  private func read(_ bytes: [UInt8]) throws -> EncodingTable { try EncodingsFile.parse(bytes) }

  private func text(_ bytes: [UInt8]) throws -> String { String(decoding: bytes, as: UTF8.self) }

  /// Entries of a file, counted with Foundation's parser.
  private func entryCount(_ bytes: [UInt8]) throws -> Int {
    let root = try JSONSerialization.jsonObject(with: Data(bytes)) as? [String: Any] ?? [:]
    var count = (root["encodings"] as? [Any])?.count ?? 0
    for key in ["activation_encodings", "param_encodings"] {
      if let list = root[key] as? [Any] { count += list.count }
      for value in (root[key] as? [String: Any] ?? [:]).values {
        guard let module = value as? [String: [String: Any]] else {
          count += 1
          continue
        }
        count += module.values.reduce(0) { $0 + $1.count }
      }
    }
    return count
  }

  /// Expects the same real numbers, whether codes count from 0 or from below.
  private func expectSameGrid(
    _ actual: Encoding?, _ expected: Encoding, sourceLocation: SourceLocation = #_sourceLocation
  ) {
    guard let actual else {
      Issue.record("an entry is missing", sourceLocation: sourceLocation)
      return
    }
    #expect(actual.bits == expected.bits, sourceLocation: sourceLocation)
    #expect(actual.scales == expected.scales, sourceLocation: sourceLocation)
    for group in expected.scales.indices where group < actual.scales.count {
      #expect(
        actual.minimum(group: group) == expected.minimum(group: group),
        sourceLocation: sourceLocation)
      #expect(
        actual.maximum(group: group) == expected.maximum(group: group),
        sourceLocation: sourceLocation)
    }
  }
}

extension EncodingTable {
  /// This table with what some versions cannot hold taken from `other`.
  fileprivate func merged(_ other: EncodingTable) -> EncodingTable {
    var result = self
    result.arguments = other.arguments
    result.excludedLayers = other.excludedLayers
    return result
  }
}
