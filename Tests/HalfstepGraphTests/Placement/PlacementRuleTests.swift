// SPDX-License-Identifier: Apache-2.0
import HalfstepGraph
import HalfstepNumerics
import TestSupport
import Testing

/// The sections of a configuration one by one, and what no configuration says.
@Suite struct PlacementRuleTests {
  /// Everything on, nothing special.
  private var plain: RuntimeConfiguration {
    var it = RuntimeConfiguration()
    it.outputsQuantized = true
    it.parametersQuantized = true
    it.parametersSymmetric = true
    it.modelInputQuantized = true
    return it
  }

  private func place(
    _ lines: [String], _ configuration: RuntimeConfiguration, excluding: Set<String> = []
  ) throws -> Placement {
    try Placement.make(
      for: TextGraph.make(lines), configuration: configuration, parameterBits: 8,
      activationBits: 8, excluding: excluding)
  }

  private let convRelu = ["c = Conv(x, w[4,3,1,1], b[4])", "y = Relu(c)"]
  private let convSigmoid = ["c = Conv(x, w[4,3,1,1], b[4])", "y = Sigmoid(c)"]

  // MARK: Sections

  @Test func emptyConfigurationPlacesNothing() throws {
    #expect(try place(convRelu, RuntimeConfiguration()).sites.isEmpty)
  }

  @Test func defaultsTurnOutputsAndParametersOn() throws {
    var configuration = plain
    configuration.modelInputQuantized = false
    let sites = try place(convSigmoid, configuration).sites
    #expect(Array(sites.keys) == ["w", "b", "c", "y"])
    #expect(sites["w"]?.spec == QuantizerSpec(bits: 8, isSymmetric: true))
    #expect(sites["c"]?.spec == QuantizerSpec(bits: 8, isSymmetric: false))
    #expect(sites["w"]?.role == .parameter && sites["c"]?.role == .activation)
  }

  @Test func defaultsSetSymmetryStrictnessAndSign() throws {
    var configuration = plain
    configuration.outputsSymmetric = true
    configuration.isStrictSymmetric = true
    configuration.isUnsignedSymmetric = true
    let wanted = QuantizerSpec(bits: 8, isSymmetric: true, isStrict: true, allowsUnsigned: true)
    for (_, site) in try place(convSigmoid, configuration).sites { #expect(site.spec == wanted) }
  }

  @Test func parameterKindsOverrideDefaults() throws {
    var configuration = plain
    configuration.parameters["bias"] = .init(isQuantized: false)
    configuration.parameters["weight"] = .init(isSymmetric: false)
    let sites = try place(convSigmoid, configuration).sites
    #expect(sites["b"] == nil)
    #expect(sites["w"]?.spec.isSymmetric == false)
  }

  @Test func operatorTypesOverrideParameterKinds() throws {
    var configuration = plain
    configuration.parameters["bias"] = .init(isQuantized: false)
    var conv = RuntimeConfiguration.Operator()
    conv.parameters["bias"] = .init(isQuantized: true, isSymmetric: true)
    conv.isOutputQuantized = false
    configuration.operators["Conv"] = conv
    let sites = try place(convSigmoid, configuration).sites
    #expect(sites["b"] != nil)
    #expect(sites["c"] == nil && sites["y"] != nil)
  }

  @Test func operatorSymmetryReachesInputsAndOutputs() throws {
    var configuration = plain
    configuration.operators["Conv"] = .init()
    configuration.operators["Conv"]?.isSymmetric = true
    let sites = try place(convSigmoid, configuration).sites
    #expect(sites["x"]?.spec.isSymmetric == true && sites["c"]?.spec.isSymmetric == true)
    #expect(sites["y"]?.spec.isSymmetric == false)
  }

  @Test func operatorInputsCanBeTurnedOn() throws {
    var configuration = plain
    configuration.modelInputQuantized = false
    configuration.operators["Conv"] = .init()
    configuration.operators["Conv"]?.isInputQuantized = true
    #expect(try place(convSigmoid, configuration).sites["x"] != nil)
  }

  @Test func contradictionBetweenOperatorsIsNamed() throws {
    var configuration = plain
    configuration.operators["Conv"] = .init()
    configuration.operators["Conv"]?.isSymmetric = true
    configuration.operators["Sigmoid"] = .init()
    configuration.operators["Sigmoid"]?.isSymmetric = false
    let error = #expect(throws: HalfstepError.self) { _ = try place(convSigmoid, configuration) }
    #expect(error?.code == .invalidConfiguration)
    #expect(error?.message.contains("'c'") == true && error?.message.contains("'n1'") == true)
  }

  @Test func constraintsHoldOutputsAndForceSymmetry() throws {
    var configuration = plain
    configuration.operators["Sigmoid"] = .init()
    configuration.operators["Sigmoid"]?.constraintMinimum = -1
    configuration.operators["Sigmoid"]?.constraintMaximum = 1
    let site = try #require(try place(convSigmoid, configuration).sites["y"])
    #expect(site.fixedMinimum == -1 && site.fixedMaximum == 1 && site.spec.isSymmetric)
  }

  @Test func modelOutputComesLast() throws {
    var configuration = plain
    configuration.operators["MaxPool"] = .init()
    configuration.operators["MaxPool"]?.isOutputQuantized = false
    let net = ["c = Conv(x, w[4,3,1,1])", "y = MaxPool(c) kernel_shape=2,2"]
    #expect(try place(net, configuration).sites["y"] == nil)
    configuration.modelOutputQuantized = true
    #expect(try place(net, configuration).sites["y"] != nil)
  }

  @Test func unreadInputGetsNoQuantizer() throws {
    let graph = try TextGraph.make(convRelu, inputs: [("x", [1, 3, 8, 8]), ("unread", [1])])
    let placement = try Placement.make(
      for: graph, configuration: plain, parameterBits: 8, activationBits: 8)
    #expect(placement.sites["x"] != nil && placement.sites["unread"] == nil)
  }

  // MARK: Supergroups

  @Test func supergroupTurnsInnerOutputsOff() throws {
    var configuration = plain
    configuration.supergroups = [["Conv", "Relu"]]
    #expect(try place(convRelu, configuration).sites["c"] == nil)
  }

  @Test func branchBreaksSupergroup() throws {
    var configuration = plain
    configuration.supergroups = [["Conv", "Relu"]]
    let net = ["c = Conv(x, w[3,3,1,1])", "r = Relu(c)", "y = Add(c, r)"]
    #expect(try place(net, configuration).sites["c"] != nil)
  }

  @Test func graphOutputBreaksSupergroup() throws {
    var configuration = plain
    configuration.supergroups = [["Conv", "Relu"]]
    let net = ["y = Conv(x, w[3,3,1,1])", "y2 = Relu(y)"]
    #expect(try place(net, configuration).sites["y"] != nil)
  }

  @Test func longerSupergroupWinsAndMatchesAreDisjoint() throws {
    var configuration = plain
    configuration.supergroups = [["Add", "Relu"], ["Conv", "Add", "Relu"], ["Relu", "Conv"]]
    let net = [
      "c = Conv(x, w[3,3,1,1])", "a = Add(c, x)", "r = Relu(a)", "y = Conv(r, v[2,3,1,1])",
    ]
    let sites = try place(net, configuration).sites
    // Relu belongs to the first chain, so that Relu and Conv do not match again.
    #expect(sites["c"] == nil && sites["a"] == nil && sites["r"] != nil)
  }

  @Test func boundedReluCountsAsClip() throws {
    var configuration = plain
    configuration.supergroups = [["Conv", "Clip"]]
    let net = [
      "c = Conv(x, w[4,3,1,1])", "r = Relu(c)", "k = Min(r, u[1,4,1,1])",
      "d = Conv(k, v[4,1,1,1]) group=4", "s = Relu(d)", "y = Min(s, u)",
    ]
    let sites = try place(net, configuration).sites
    // A depthwise convolution starts no supergroup, as with Clip itself.
    #expect(Array(sites.keys) == ["x", "w", "k", "v", "d", "y"])
  }

  @Test func reluReadTwiceIsNoBoundedRelu() throws {
    let net = ["r = Relu(x)", "k = Min(r, u[3,1,1])", "y = Add(r, k)"]
    let sites = try place(net, plain).sites
    #expect(sites["r"] != nil && sites["u"] != nil)
  }

  // MARK: Granularity

  @Test(arguments: [
    ("c = Conv(x, w[4,3,1,1])", 0), ("c = ConvTranspose(x, w[3,4,1,1])", 1),
    ("c = MatMul(x, w[8,5])", 1),
  ])
  func channelAxisFollowsOperator(_ line: String, _ axis: Int) throws {
    var configuration = plain
    configuration.isPerChannel = true
    let sites = try place([line, "y = Relu(c)"], configuration).sites
    #expect(sites["w"]?.spec.granularity == .perChannel(axis: axis))
  }

  @Test func operatorGranularityOverridesDefault() throws {
    var configuration = plain
    configuration.isPerChannel = true
    configuration.operators["Conv"] = .init()
    configuration.operators["Conv"]?.isPerChannel = false
    #expect(try place(convRelu, configuration).sites["w"]?.spec.granularity == .perTensor)
  }

  // MARK: What is not data

  @Test(arguments: [
    ["y = Clip(x, k~0, j~6)"], ["y = Resize(x, , k:f1,1,2,2)"],
    ["y = Upsample(x, k:f1,1,2,2)"], ["y = Pad(x, q:0,0,1,1,0,0,1,1, k~0)"],
    ["y = Dropout(x, k~0.5)"],
  ])
  func settingsGetNoQuantizer(_ net: [String]) throws {
    let sites = try place(net, plain).sites
    #expect(sites["k"] == nil && sites["j"] == nil && sites["x"] != nil)
  }

  @Test func constantDataGetsQuantizerOnce() throws {
    let sites = try place(["a = Add(x, k~6)", "c = Clip(a, l~0, k)", "y = Mul(c, k)"], plain).sites
    #expect(Array(sites.keys) == ["x", "k", "a", "c", "y"])
    #expect(sites["k"]?.role == .activation)
  }

  @Test func integersGetNoQuantizer() throws {
    let net = [
      "s = Shape(x)", "i = Cast(x) to=7", "a = ArgMax(x)", "e = Equal(x, x)", "n = Not(e)",
      "v, p = TopK(x, k:1)", "y = Cast(p) to=1",
    ]
    let sites = try place(net, plain).sites
    // `v` lies on the grid of `x`.
    #expect(Set(sites.keys) == ["x", "y"])
  }

  @Test func unknownTypesGetNoQuantizer() throws {
    var graph = try TextGraph.make(["y = Relu(x)"])
    graph.insert(Node(opType: "Mystery", domain: "some.where", inputs: ["y"], outputs: ["z"]))
    graph.insert(Node(opType: "Relu", inputs: ["z"], outputs: ["q"]))
    let placement = try Placement.make(
      for: graph, configuration: plain, parameterBits: 8, activationBits: 8)
    #expect(placement.sites["z"] == nil && placement.sites["q"] == nil)
  }

  // MARK: Shared grids and grids handed on

  @Test func propagatedTensorsNameTheirSource() throws {
    let net = [
      "m = MaxPool(x) kernel_shape=2,2", "f = Flatten(m)", "s = Sigmoid(f)",
      "t = Reshape(s, q:1,-1)",
      "y = Concat(t, t) axis=0",
    ]
    var configuration = plain
    configuration.operators["Concat"] = .init()
    configuration.operators["Concat"]?.isOutputQuantized = false
    let placement = try place(net, configuration)
    #expect(Array(placement.sites.keys) == ["x", "s"])
    #expect(placement.propagated == ["m": "x", "f": "x", "t": "s", "y": "s"])
  }

  @Test func inputOfClipIsNotOnItsGrid() throws {
    var configuration = plain
    configuration.supergroups = [["Conv", "Clip"]]
    let placement = try place(
      ["c = Conv(x, w[4,3,1,1])", "k = Clip(c, l~0, h~6)", "y = Pad(k, q:0,0,1,1,0,0,1,1)"],
      configuration)
    #expect(placement.propagated == ["y": "k"])
  }

  @Test func reluSharesItsInputsGridUnlessOthersNeedIt() throws {
    var configuration = plain
    configuration.operators["Relu"] = .init()
    configuration.operators["Relu"]?.constraintMinimum = 0
    #expect(try place(convRelu, configuration).sites["y"]?.tieLeader == "c")
    let branched = ["c = Conv(x, w[3,3,1,1])", "r = Relu(c)", "y = Add(c, r)"]
    #expect(try place(branched, configuration).sites["r"]?.tieLeader == "r")
    #expect(try place(branched, plain).sites["r"]?.tieLeader == "c")
  }

  // MARK: Excluded nodes and errors

  @Test func excludedNodesLoseOutputsParametersAndOwnInputs() throws {
    let net = ["c = Conv(x, w[4,3,1,1])", "s = Sigmoid(c)", "y = Mul(s, k~2)"]
    let sites = try place(net, plain, excluding: ["n0", "n2"]).sites
    #expect(Array(sites.keys) == ["s"])
  }

  @Test func excludedRecurrentLayerLeavesItsInputAGrid() throws {
    let net = [
      "s = Sigmoid(x)", "h, g = GRU(s, w[1,12,8], r[1,12,4]) hidden_size=4", "t = Tanh(s)",
      "y = Mul(g, g)", "y2 = Mul(t, t)",
    ]
    let all = try place(net, plain).sites
    #expect(all["s"]?.tieLeader == "h" && all["g"]?.tieLeader == "h")
    let sites = try place(net, plain, excluding: ["n1"]).sites
    #expect(sites["s"]?.tieLeader == "s" && sites["h"] == nil && sites["g"] == nil)
  }

  @Test func unknownExcludedNodeIsNamed() throws {
    let error = #expect(throws: HalfstepError.self) {
      _ = try place(convRelu, plain, excluding: ["n0", "nowhere"])
    }
    #expect(error?.code == .unknownName && error?.message.contains("'nowhere'") == true)
  }

  // MARK: Blocks

  @Test func weightsPerChannelAreCutIntoBlocks() throws {
    var configuration = plain
    configuration.isPerChannel = true
    let lines = [
      "c = Conv(x, w[4,6,1,1], b[4])", "d = Conv(c, k[4,1,3,3]) group=4",
      "m = MatMul(d, p[5,9])", "y = Gemm(m, q[3,8]) transB=1",
    ]
    let sites = try Placement.make(
      for: TextGraph.make(lines), configuration: configuration, parameterBits: 4,
      activationBits: 8, parameterBlockSize: 4
    ).sites
    #expect(sites["w"]?.spec.granularity == .perBlock(channelAxis: 0, axis: 1, size: 4))
    #expect(sites["p"]?.spec.granularity == .perBlock(channelAxis: 1, axis: 0, size: 4))
    #expect(sites["q"]?.spec.granularity == .perBlock(channelAxis: 0, axis: 1, size: 4))
    // One input channel a kernel leaves nothing to cut, and a bias has none.
    #expect(sites["k"]?.spec.granularity == .perChannel(axis: 0))
    #expect(sites["b"]?.spec.granularity == .perChannel(axis: 0))
  }

  @Test func weightsPerTensorAreNotCutIntoBlocks() throws {
    let sites = try Placement.make(
      for: TextGraph.make(convRelu), configuration: plain, parameterBits: 4, activationBits: 8,
      parameterBlockSize: 2
    ).sites
    #expect(sites["w"]?.spec.granularity == .perTensor)
  }

  @Test(arguments: [0, -3]) func blockSizesOutOfRangeAreRefused(_ size: Int) throws {
    let error = #expect(throws: HalfstepError.self) {
      _ = try Placement.make(
        for: TextGraph.make(convRelu), configuration: plain, parameterBits: 8, activationBits: 8,
        parameterBlockSize: size)
    }
    #expect(error?.code == .invalidArgument && error?.message.contains("block size") == true)
  }

  // MARK: Arguments

  @Test(arguments: [(1, 8), (17, 8), (8, 1), (8, 32)])
  func widthsOutOfRangeAreRefused(_ parameterBits: Int, _ activationBits: Int) throws {
    let graph = try TextGraph.make(convRelu)
    let error = #expect(throws: HalfstepError.self) {
      _ = try Placement.make(
        for: graph, configuration: plain, parameterBits: parameterBits,
        activationBits: activationBits)
    }
    #expect(error?.code == .invalidArgument)
  }

  @Test(arguments: 2...16) func everyWidthIsPlaced(_ bits: Int) throws {
    let placement = try Placement.make(
      for: TextGraph.make(convSigmoid), configuration: plain, parameterBits: bits,
      activationBits: 18 - bits)
    #expect(placement.sites["w"]?.spec.bits == bits)
    #expect(placement.sites["c"]?.spec.bits == 18 - bits)
  }

  @Test func unknownPatternNameIsRefused() throws {
    var configuration = plain
    configuration.supergroupPasses = ["MatmulAdd", "Nonsense"]
    let error = #expect(throws: HalfstepError.self) { _ = try place(convRelu, configuration) }
    #expect(error?.message.contains("'Nonsense'") == true)
  }
}
