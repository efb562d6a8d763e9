// SPDX-License-Identifier: Apache-2.0
// The runtime configurations that come with the library, as JSON text.

import OrderedCollections

/// The runtime configurations that come with the library, as JSON text.
///
/// They restate which tensors AIMET 2.42's targets quantize; text instead of values, so that a user can
/// print one and change it.
enum BuiltInConfigurations {
  /// JSON text by name.
  static let texts: OrderedDictionary<String, String> = [
    "default": generic(isPerChannel: false),
    "default_per_channel": generic(isPerChannel: true),
    "htp_v66": hexagon("V66"),
    "htp_v68": hexagon("V68"),
    "htp_v69": hexagon("V69"),
    "htp_v73": hexagon("V73"),
    "htp_v75": hexagon("V75"),
    "htp_v79": hexagon("V79"),
    "htp_v81": hexagon("V81"),
    "htp_v85": hexagon("V85"),
  ]

  // MARK: Targets

  /// No particular target: every output and every weight is quantized.
  private static func generic(isPerChannel: Bool) -> String {
    document(
      defaults: #"""
        "strict_symmetric": "False",
            "per_channel_quantization": "False"
        """#,
      operators: perChannel(
        isPerChannel ? ["Conv", "ConvTranspose", "Gemm", "MatMul", "PRelu"] : [])
        + [
          #""BatchNormalization": { "params": { "running_mean": { "is_quantized": "False" }, "#
            + #""running_var": { "is_quantized": "False" } } }"#,
          output(off: "Cast"),
        ],
      passes: ["MatmulAdd"],
      supergroups: [
        ["Conv", "Relu"], ["ConvTranspose", "Relu"], ["Conv", "Clip"], ["Add", "Relu"],
        ["Gemm", "Relu"],
      ])
  }

  /// Qualcomm's Hexagon tensor processor of a given architecture.
  private static func hexagon(_ version: String) -> String {
    let number = Int(version.dropFirst()) ?? 0
    var operators: [String] = []
    // The oldest has no weights per channel, the next only for convolutions.
    switch number {
    case ...66: break
    case 68: operators += perChannel(["Conv", "ConvTranspose", "PRelu"])
    default: operators += perChannel(["Conv", "ConvTranspose", "Gemm", "MatMul", "PRelu"])
    }
    operators += ["Cast", "ChannelShuffle", "Gather", "NonMaxSuppression"].map { output(off: $0) }
    if number <= 66 { operators.append(output(off: "Flatten")) }
    if number >= 73 {
      operators.append(
        #""GroupNormalization": { "params": { "bias": { "is_quantized": "True" } } }"#)
    }
    operators.append(
      #""BatchNormalization": { "params": { "running_mean": { "is_quantized": "False" }, "#
        + #""running_var": { "is_quantized": "False" } } }"#)
    operators.append(asymmetricWeight("LayerNormalization"))
    if number >= 68 {
      operators.append(asymmetricWeight("InstanceNormalization"))
      operators.append(asymmetricWeight("RMSNormalization"))
    }
    operators.append(#""Relu": { "encoding_constraints": { "min": 0.0 } }"#)
    if number >= 73 {
      operators += [constraint("Sigmoid", 0, 1), constraint("Softmax", 0, 1)]
    }
    operators += ["Sin", "Cos", "Tanh"].map { constraint($0, -1, 1) }

    var supergroups = [["Add", "Relu"]]
    if number >= 73 {
      let activations = ["PRelu", "LeakyRelu", "Relu"]
      supergroups += (["HardSwish"] + activations).map { ["Conv", "BatchNormalization", $0] }
      supergroups += activations.map { ["Conv", "Transpose", $0] }
      supergroups += (["Clip"] + activations).map { ["Conv", $0] }
    }
    supergroups += [["ConvTranspose", "Relu"], ["Gemm", "Relu"]]
    return document(
      defaults: """
        "hw_version": "\(version)",
            "strict_symmetric": "False",
            "unsigned_symmetric": "False",
            "per_channel_quantization": "False"
        """,
      operators: operators,
      passes: number <= 66 ? [] : ["LayerNormalization", "RMSNormalization", "MatmulAdd"],
      supergroups: supergroups)
  }

  // MARK: Pieces of text

  private static func perChannel(_ types: [String]) -> [String] {
    types.map { "\"\($0)\": { \"per_channel_quantization\": \"True\" }" }
  }

  private static func output(off type: String) -> String {
    "\"\(type)\": { \"is_output_quantized\": \"False\" }"
  }

  private static func asymmetricWeight(_ type: String) -> String {
    "\"\(type)\": { \"params\": { \"weight\": { \"is_symmetric\": \"False\" } } }"
  }

  private static func constraint(_ type: String, _ low: Double, _ high: Double) -> String {
    "\"\(type)\": { \"encoding_constraints\": { \"min\": \(low), \"max\": \(high) } }"
  }

  private static func document(
    defaults: String, operators: [String], passes: [String], supergroups: [[String]]
  ) -> String {
    let groups = supergroups.map { group in
      "{ \"op_list\": [" + group.map { "\"\($0)\"" }.joined(separator: ", ") + "] }"
    }
    let passLine =
      passes.isEmpty
      ? ""
      : "\n  \"supergroup_pass_list\": ["
        + passes.map { "\"\($0)\"" }.joined(separator: ", ") + "],"
    return """
      {
        "defaults": {
          "ops": { "is_output_quantized": "True" },
          "params": { "is_quantized": "True", "is_symmetric": "True" },
          \(defaults)
        },
        "params": { "bias": { "is_quantized": "False" } },
        "op_type": {
          \(operators.joined(separator: ",\n    "))
        },\(passLine)
        "supergroups": [
          \(groups.joined(separator: ",\n    "))
        ],
        "model_input": { "is_input_quantized": "True" },
        "model_output": {}
      }

      """
  }
}
