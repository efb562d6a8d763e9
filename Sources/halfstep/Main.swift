// SPDX-License-Identifier: Apache-2.0
// The command-line tool.

import ArgumentParser
import Halfstep

@main
struct HalfstepCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "halfstep",
    abstract: "Makes trained networks fit for integer hardware.",
    discussion: """
      Examples:
        halfstep inspect net.onnx
        halfstep quantize net.onnx --calibration images.npy --scheme sqnr --qdq -o out
        halfstep evaluate out/net.onnx test.npz --encodings out/net.encodings --labels labels
        halfstep compress net.onnx --target 0.5 -o smaller.onnx

      Results go to standard output, everything else to standard error.

      Exit codes:
        0    done
        64   wrong usage: an option, a name or a combination of them
        65   bad data: a file that is damaged, does not fit the network, or holds NaN
        66   no input: a file that cannot be read
        70   a defect of this program, or no memory
        73   a result that cannot be written
        130  cancelled with Ctrl-C; nothing is left half written
      """,
    version: halfstepVersion,
    subcommands: [
      QuantizeCommand.self, EvaluateCommand.self, InspectCommand.self, CompressCommand.self,
    ])
}
