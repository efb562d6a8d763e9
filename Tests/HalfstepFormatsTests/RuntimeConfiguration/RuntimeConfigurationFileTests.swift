// SPDX-License-Identifier: Apache-2.0
// Reading of runtime configurations.

import Foundation
import HalfstepFormats
import HalfstepGraph
import HalfstepNumerics
import Testing

@Suite struct RuntimeConfigurationFileTests {
  @Test(arguments: RuntimeConfigurationFile.builtInNames)
  func builtInsParse(name: String) throws {
    let configuration = try RuntimeConfigurationFile.load(nameOrPath: name)
    #expect(configuration.outputsQuantized == true)
    #expect(configuration.parametersQuantized == true)
    #expect(configuration.parametersSymmetric == true)
    #expect(configuration.parameters["bias"]?.isQuantized == false)
    #expect(configuration.modelInputQuantized)
    #expect(!configuration.modelOutputQuantized)
    #expect(configuration.supergroups.contains(["Add", "Relu"]))
    #expect(
      configuration.hardwareVersion
        == (name.hasPrefix("htp_") ? name.dropFirst(4).uppercased() : nil))
  }

  @Test func builtInsDifferWhereTargetsDo() throws {
    func load(_ name: String) throws -> RuntimeConfiguration {
      try RuntimeConfigurationFile.load(nameOrPath: name)
    }
    #expect(try load("default").operators["Conv"]?.isPerChannel == nil)
    #expect(try load("default_per_channel").operators["MatMul"]?.isPerChannel == true)
    #expect(try load("htp_v66").operators["Conv"]?.isPerChannel == nil)
    #expect(try load("htp_v68").operators["Conv"]?.isPerChannel == true)
    #expect(try load("htp_v68").operators["Gemm"]?.isPerChannel == nil)
    #expect(try load("htp_v81").operators["Softmax"]?.constraintMaximum == 1)
    #expect(try load("htp_v81").operators["Relu"]?.constraintMaximum == nil)
    #expect(try load("htp_v81").supergroups.count == 14)
    #expect(try load("default").supergroups.count == 5)
    #expect(
      try load("htp_v73").supergroupPasses
        == ["LayerNormalization", "RMSNormalization", "MatmulAdd"])
  }

  @Test func everyKeyIsRead() throws {
    let configuration = try parse(
      defaults: #"""
        "ops": {"is_output_quantized": "True", "is_symmetric": "False"},
        "params": {"is_quantized": "True", "is_symmetric": "True"}, "strict_symmetric": "True",
        "unsigned_symmetric": "True", "per_channel_quantization": "True", "hw_version": "V99",
        "supported_kernels": [{"activation": {"bitwidth": 16, "dtype": "int"},
          "param": {"bitwidth": 32, "dtype": "float"}}]
        """#,
      operators: #"""
        "Conv": {"is_input_quantized": "True", "is_output_quantized": "False",
          "is_symmetric": "True", "per_channel_quantization": "False",
          "params": {"weight": {"is_quantized": "True", "is_symmetric": "False"}},
          "supported_kernels": [{"activation": {"bitwidth": 4, "dtype": "int"}}],
          "encoding_constraints": {"min": -1.5, "max": 2}}
        """#)
    #expect(configuration.outputsSymmetric == false)
    #expect(configuration.isStrictSymmetric && configuration.isUnsignedSymmetric)
    #expect(configuration.isPerChannel)
    #expect(configuration.hardwareVersion == "V99")
    #expect(
      configuration.supportedKernels == [
        .init(
          activation: .init(bits: 16, isFloat: false), parameter: .init(bits: 32, isFloat: true))
      ])
    let conv = try #require(configuration.operators["Conv"])
    #expect(conv.isInputQuantized == true && conv.isOutputQuantized == false)
    #expect(conv.isSymmetric == true && conv.isPerChannel == false)
    #expect(conv.parameters["weight"] == .init(isQuantized: true, isSymmetric: false))
    #expect(
      conv.supportedKernels == [.init(activation: .init(bits: 4, isFloat: false), parameter: nil)])
    #expect(conv.constraintMinimum == -1.5 && conv.constraintMaximum == 2)
  }

  @Test(arguments: [
    (#""strict": "True""#, "defaults.strict: this key is not known"),
    (#""strict_symmetric": true"#, "defaults.strict_symmetric"),
    (#""strict_symmetric": "true""#, "defaults.strict_symmetric"),
    (#""ops": {"is_output_quantized": "False"}"#, "defaults.ops.is_output_quantized"),
    (#""ops": {"is_input_quantized": "True"}"#, "defaults.ops.is_input_quantized"),
    (#""params": {"bitwidth": 8}"#, "defaults.params.bitwidth"),
    (#""hw_version": 81"#, "defaults.hw_version"),
    (
      #""supported_kernels": [{"activation": {"bitwidth": 8, "dtype": "int"}}]"#,
      "'param' is missing"
    ),
    (
      #""supported_kernels": [{"activation": {"bitwidth": 5, "dtype": "int"}, "param": {}}]"#,
      "defaults.supported_kernels[0].activation.bitwidth"
    ),
  ])
  func wrongDefaultsAreNamed(text: String, path: String) {
    expectFailure(.invalidConfiguration, path) { _ = try parse(defaults: text) }
  }

  @Test(arguments: [
    (#""Conv": {"is_input_quantized": "False"}"#, "op_type.Conv.is_input_quantized"),
    (#""Conv": {"encoding_constraints": {"max": 1}}"#, "'min' is missing"),
    (#""Conv": {"encoding_constraints": {"min": 2, "max": 1}}"#, "Conv.encoding_constraints"),
    (#""Conv": {"params": {"weight": {"is_quantized": 1}}}"#, "Conv.params.weight.is_quantized"),
    (#""Conv": []"#, "op_type.Conv"),
    (#""Conv": {}, "Conv": {}"#, "'Conv' is repeated"),
  ])
  func wrongOperatorsAreNamed(text: String, path: String) {
    expectFailure(.invalidConfiguration, path) { _ = try parse(operators: text) }
  }

  @Test(arguments: [
    (#""supergroups": [{"op_list": ["Conv"]}], "model_output": {}"#, "supergroups[0].op_list"),
    (#""supergroups": [], "model_output": {"is_output_quantized": "False"}"#, "model_output.is"),
    (
      #""supergroups": [], "model_output": {}, "supergroup_pass_list": ["X"]"#,
      "supergroup_pass_list[0]"
    ),
    (#""supergroups": []"#, "'model_output' is missing"),
  ])
  func wrongSectionsAreNamed(text: String, message: String) {
    let document = #"{"defaults": {}, "params": {}, "op_type": {}, "model_input": {}, \#(text)}"#
    expectFailure(.invalidConfiguration, message) {
      _ = try RuntimeConfigurationFile.parse(Array(document.utf8))
    }
  }

  @Test(arguments: [
    ("[]", "expected an object"), ("{", "line 1"), ("{}\n x", "line 2"), ("", "ends early"),
    (String(repeating: "[", count: 100_000), "nested too deeply"),
  ])
  func wrongDocumentsAreNamed(text: String, message: String) {
    expectFailure(.invalidConfiguration, message) {
      _ = try RuntimeConfigurationFile.parse(Array(text.utf8))
    }
  }

  @Test func unknownNameListsTheBuiltIns() {
    expectFailure(.unknownName, "htp", "default_per_channel") {
      _ = try RuntimeConfigurationFile.load(nameOrPath: "htp")
    }
    expectFailure(.fileAccess, "./none.json") {
      _ = try RuntimeConfigurationFile.load(nameOrPath: "./none.json")
    }
  }

  @Test func fileIsNamedInErrors() throws {
    try withTemporaryFolder { folder in
      try AtomicFile.write(Array("{}".utf8), to: "\(folder)/c.json")
      expectFailure(.invalidConfiguration, "\(folder)/c.json", "is missing") {
        _ = try RuntimeConfigurationFile.load(nameOrPath: "\(folder)/c.json")
      }
    }
  }

  private func parse(
    defaults: String = "", operators: String = ""
  ) throws -> RuntimeConfiguration {
    try RuntimeConfigurationFile.parse(
      Array(
        """
        {"defaults": {\(defaults)}, "params": {}, "op_type": {\(operators)}, "supergroups": [],
         "model_input": {}, "model_output": {}}
        """.utf8))
  }
}
