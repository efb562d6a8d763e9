// SPDX-License-Identifier: Apache-2.0
import Foundation
import HalfstepGraph
import HalfstepNumerics
import TestSupport
import Testing

/// One net with what AIMET places in it; see Fixtures/placement/README.md.
struct PlacementCase: Decodable, Sendable, CustomTestStringConvertible {
  struct Run: Decodable, Sendable {
    let run: String
    let quantizers: [String: String]?
    let error: String?
  }
  let name: String
  let net: [String]
  let runs: [Run]

  var testDescription: String { name }

  static let all: [PlacementCase] = {
    let file = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
      .deletingLastPathComponent().appendingPathComponent("Fixtures/placement/placement.json")
    guard let data = try? Data(contentsOf: file) else { return [] }
    return (try? JSONDecoder().decode([PlacementCase].self, from: data)) ?? []
  }()
}

@Suite struct PlacementParityTests {
  @Test func fixturesAreThere() {
    #expect(PlacementCase.all.count == 55)
  }

  @Test(arguments: PlacementCase.all)
  func quantizersEqualAIMETs(_ test: PlacementCase) throws {
    var graph = try TextGraph.make(test.net, inputs: Self.inputs(of: test.name))
    if test.name.hasPrefix("masked_") { graph.inputs[1].dataType = .bool }
    for run in test.runs {
      let parts = run.run.split(separator: " ").map(String.init)
      let configuration = try #require(RuntimeConfiguration.named(parts[0]))
      let placement = try Placement.make(
        for: graph, configuration: configuration, parameterBits: try #require(Int(parts[1])),
        activationBits: try #require(Int(parts[2])))
      guard var expected = run.quantizers else {
        // AIMET refuses to merge the ranges of Tanh and Relu; we keep two quantizers.
        #expect(test.name == "tanh_relu")
        #expect(placement.sites["t"]?.tieLeader == "t" && placement.sites["y"]?.tieLeader == "y")
        continue
      }
      for (tensor, reason) in Self.unquantizedHere[test.name] ?? [:] {
        #expect(!reason.isEmpty)
        expected[tensor] = nil
      }
      // A group goes by its first member, as in the fixture.
      var groups: [String: String] = [:]
      for site in placement.sites.values where groups[site.tieLeader] == nil {
        groups[site.tieLeader] = site.tensor
      }
      let actual = placement.sites.mapValues { Self.describe($0, groups[$0.tieLeader]) }
      for name in Set(expected.keys).union(actual.keys).sorted() {
        #expect(
          actual[name] == expected[name], "\(test.name), \(run.run): tensor \(name)")
      }
    }
  }

  /// The inputs of a net, as in record.py.
  private static func inputs(of name: String) -> [(String, [Int])] {
    let square = ["attention", "layernorm", "layernorm_op", "rmsnorm"]
    switch name {
    case "dynamic_conv": return [("x", [1, 3, 8, 8]), ("z", [4, 3, 1, 1])]
    case "lstm_states", "gru": return [("x", [5, 1, 8]), ("z", [1, 1, 4])]
    case "lstm", "lstm_plain", "gru_shared", "rnn_fan": return [("x", [5, 1, 8])]
    case _ where name.hasPrefix("masked_"): return [("x", [1, 1, 8, 8]), ("z", [1, 1, 8, 8])]
    default: return [("x", square.contains(name) ? [1, 1, 8, 8] : [1, 3, 8, 8])]
    }
  }

  /// Tensors that AIMET quantizes and we do not.
  static let unquantizedHere: [String: [String: String]] = [
    "conv_clip_conv": ["lo": "bound of a Clip", "hi": "bound of a Clip"],
    "depthwise_clip": ["lo": "bound of a Clip", "hi": "bound of a Clip"],
  ]

  static func describe(_ site: QuantizerSite, _ group: String?) -> String {
    var text = (site.role == .parameter ? "p" : "a") + "\(site.spec.bits)"
    if site.spec.isSymmetric { text += "s" }
    if case .perChannel(let axis) = site.spec.granularity { text += "/\(axis)" }
    if let minimum = site.fixedMinimum {
      text += String(format: "[%g,", minimum)
      if let maximum = site.fixedMaximum { text += String(format: "%g", maximum) }
      text += "]"
    }
    return group == site.tensor ? text : text + "=\(group ?? "")"
  }
}

extension RuntimeConfiguration {
  /// The configurations of the fixtures, stated here so that the test needs no file format.
  static func named(_ name: String) -> RuntimeConfiguration? {
    var it = RuntimeConfiguration()
    it.outputsQuantized = true
    it.parametersQuantized = true
    it.parametersSymmetric = true
    it.parameters["bias"] = Parameter(isQuantized: false)
    it.modelInputQuantized = true
    func set(_ types: [String], _ change: (inout Operator) -> Void) {
      for type in types { change(&it.operators[type, default: Operator()]) }
    }
    set(["Cast"]) { $0.isOutputQuantized = false }
    set(["BatchNormalization"]) {
      $0.parameters = [
        "running_mean": Parameter(isQuantized: false), "running_var": Parameter(isQuantized: false),
      ]
    }
    let weighted = ["Conv", "ConvTranspose", "Gemm", "MatMul", "PRelu"]
    switch name {
    case "default", "default_per_channel":
      if name == "default_per_channel" { set(weighted) { $0.isPerChannel = true } }
      it.supergroupPasses = ["MatmulAdd"]
      it.supergroups = [
        ["Conv", "Relu"], ["ConvTranspose", "Relu"], ["Conv", "Clip"], ["Add", "Relu"],
        ["Gemm", "Relu"],
      ]
    case "htp_v73+MaskedSoftmax":
      guard var base = named("htp_v73") else { return nil }
      base.supergroupPasses.append("MaskedSoftmax")
      return base
    case "htp_v73", "htp_v66":
      it.hardwareVersion = name == "htp_v73" ? "V73" : "V66"
      set(["ChannelShuffle", "Gather", "NonMaxSuppression"]) { $0.isOutputQuantized = false }
      set(["LayerNormalization"]) { $0.parameters["weight"] = Parameter(isSymmetric: false) }
      set(["Relu"]) { $0.constraintMinimum = 0 }
      set(["Sin", "Cos", "Tanh"]) {
        $0.constraintMinimum = -1
        $0.constraintMaximum = 1
      }
      it.supergroups = [["ConvTranspose", "Relu"], ["Add", "Relu"], ["Gemm", "Relu"]]
      if name == "htp_v66" {
        set(["Flatten"]) { $0.isOutputQuantized = false }
        break
      }
      set(weighted) { $0.isPerChannel = true }
      set(["InstanceNormalization", "RMSNormalization"]) {
        $0.parameters["weight"] = Parameter(isSymmetric: false)
      }
      set(["GroupNormalization"]) { $0.parameters["bias"] = Parameter(isQuantized: true) }
      set(["Sigmoid", "Softmax"]) {
        $0.constraintMinimum = 0
        $0.constraintMaximum = 1
      }
      it.supergroupPasses = ["LayerNormalization", "RMSNormalization", "MatmulAdd"]
      for last in ["HardSwish", "PRelu", "LeakyRelu", "Relu"] {
        it.supergroups.append(["Conv", "BatchNormalization", last])
      }
      for last in ["Relu", "PRelu", "LeakyRelu"] {
        it.supergroups.append(["Conv", "Transpose", last])
      }
      for last in ["Clip", "PRelu", "LeakyRelu", "Relu"] { it.supergroups.append(["Conv", last]) }
    default: return nil
    }
    return it
  }
}
