// SPDX-License-Identifier: Apache-2.0
// Runs that go on where others ended.

import Foundation
import HalfstepAlgorithms
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics
import TestSupport
import Testing

@Suite struct RoundingCacheTests {
  /// Gram rounding that counts the layers it works on.
  final class Counting: LayerRounder {
    let method: GramRounding
    private(set) var layers: [String] = []

    init(_ options: GramRounding.Options = GramRounding.Options()) {
      method = GramRounding(options: options)
    }

    var identity: String? { method.identity }
    func round(_ problem: LayerProblem) throws(HalfstepError) -> LayerRounding {
      layers.append(problem.node.label)
      return try method.round(problem)
    }
  }

  private func folder() -> String {
    FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString).path
  }

  private func run(
    _ graph: Graph, _ folder: String?, _ rounder: Counting = Counting(),
    limit: Int = .max, change: (inout LayerReconstruction.Options) -> Void = { _ in }
  ) throws -> (layers: [String], graph: Graph, report: LayerReconstruction.Report) {
    var options = try LayerWalkTests.options()
    options.cacheFolder = folder
    change(&options)
    var result = graph
    let report = try LayerReconstruction(options: options).apply(
      to: &result, batches: [["x": try LayerWalkTests.data(20)]], rounder: rounder
    ) { $0.completed < limit }
    return (rounder.layers, result, report)
  }

  private func expectSame(_ a: Graph, _ b: Graph) throws {
    #expect(a.initializers.keys == b.initializers.keys)
    for (name, value) in a.initializers {
      #expect(try b.initializers[name]!.floats() == value.floats(), "\(name)")
    }
    #expect(a.weightEncodings == b.weightEncodings)
  }

  @Test func aCancelledRunGoesOnWhereItEnded() throws {
    let folder = folder()
    defer { try? FileManager.default.removeItem(atPath: folder) }
    let graph = try LayerWalkTests.graph()
    let plain = try run(graph, nil)
    let first = Counting()
    expectError(.cancelled) { try run(graph, folder, first, limit: 3) }
    #expect(first.layers == ["n0", "n2", "n3"])
    let second = try run(graph, folder)
    #expect(second.layers == ["n6", "n9", "n10"])
    try expectSame(second.graph, plain.graph)
    #expect(second.report.layers.map(\.kept) == plain.report.layers.map(\.kept))
    #expect(second.report.layers.map(\.after) == plain.report.layers.map(\.after))
    let third = try run(graph, folder)
    #expect(third.layers.isEmpty)
    try expectSame(third.graph, plain.graph)
  }

  @Test func onlyWhatChangedIsDoneAnew() throws {
    let folder = folder()
    defer { try? FileManager.default.removeItem(atPath: folder) }
    let graph = try LayerWalkTests.graph()
    let all = try run(graph, folder).layers
    // Memory, other files and the number of threads decide nothing.
    #expect(try run(graph, folder, change: { $0.maximumBytes = 0 }).layers.isEmpty)
    // The last layer's weight: the layers before it are as they were.
    var other = graph
    let weight = try #require(graph.initializers["wm"])
    other.initializers["wm"] = try Tensor(
      try weight.floats().map { $0 * 1.5 }, shape: weight.shape.dimensions)
    #expect(try run(other, folder).layers == ["n10"])
    // Options and data change everything; what was kept before stays usable.
    #expect(try run(graph, folder, change: { $0.seed = 1 }).layers == all)
    #expect(try run(graph, folder, change: { $0.parameterBits = 3 }).layers == all)
    var options = GramRounding.Options()
    options.isFloorOrCeil = true
    #expect(try run(graph, folder, Counting(options)).layers == all)
    #expect(try run(graph, folder).layers.isEmpty)
  }

  @Test func damagedFilesAreDoneAnewAndForeignOnesLeftAlone() throws {
    let folder = folder()
    defer { try? FileManager.default.removeItem(atPath: folder) }
    let graph = try LayerWalkTests.graph()
    let plain = try run(graph, folder)
    let manager = FileManager.default
    let names = try manager.contentsOfDirectory(atPath: folder).sorted()
    #expect(names.count == 6 && names.allSatisfy { $0.hasSuffix(".layer") })
    for (number, name) in names.enumerated() {
      let path = "\(folder)/\(name)"
      var bytes = try Data(contentsOf: URL(fileURLWithPath: path))
      switch number {
      case 0: bytes = Data()
      case 1: bytes.removeLast(5)
      case 2: bytes.append(contentsOf: [1, 2, 3])
      case 3: bytes[60] ^= 0x40
      case 4: bytes = Data(repeating: 0xff, count: 1 << 22)
      default: bytes[24] ^= 0xff
      }
      try bytes.write(to: URL(fileURLWithPath: path))
    }
    try "mine".write(toFile: "\(folder)/notes.txt", atomically: true, encoding: .utf8)
    let again = try run(graph, folder)
    #expect(again.layers == plain.layers)
    try expectSame(again.graph, plain.graph)
    #expect(try String(contentsOfFile: "\(folder)/notes.txt", encoding: .utf8) == "mine")
  }

  /// A bias whose choice depends on the whole network is not taken over when something behind it changes.
  @Test func whatIsComparedWithBelongsToTheKey() throws {
    let folder = folder()
    defer { try? FileManager.default.removeItem(atPath: folder) }
    let graph = try LayerWalkTests.graph()
    func files() throws -> Int { try FileManager.default.contentsOfDirectory(atPath: folder).count }
    func correct(_ graph: Graph) throws -> Graph {
      var options = try LayerWalkTests.options()
      options.cacheFolder = folder
      options.validation = .outputs(isQuantized: true)
      options.writesWeights = false
      var result = graph
      try LayerReconstruction(options: options).apply(
        to: &result, batches: [["x": try LayerWalkTests.data(20)]],
        rounder: EmpiricalBiasCorrection())
      return result
    }
    let first = try correct(graph)
    #expect(try files() == 6)
    try expectSame(try correct(graph), first)
    #expect(try files() == 6)
    var other = graph
    let weight = try #require(graph.initializers["wm"])
    other.initializers["wm"] = try Tensor(
      try weight.floats().map { $0 * 1.5 }, shape: weight.shape.dimensions)
    _ = try correct(other)
    #expect(try files() == 12)
  }

  @Test func aFolderThatCannotBeMadeIsNamed() throws {
    let graph = try LayerWalkTests.graph()
    expectError(.fileAccess) {
      try run(graph, "/proc/nobody/cache")
    }
  }
}
