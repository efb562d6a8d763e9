// SPDX-License-Identifier: Apache-2.0
// Constants of single methods of rounding.

import ArgumentParser
import Halfstep

/// Constants of AdaRound by gradient descent, and of sequential MSE.
struct RoundingConstants: ParsableArguments {
  @Option(
    name: .customLong("rounding-iterations"),
    help: ArgumentHelp(
      "Steps for each layer, with --round adaround; by default 10000, below 8 bits 15000.",
      valueName: "n"))
  var iterations: Int?

  @Option(
    name: .customLong("rounding-regularization"),
    help: ArgumentHelp(
      "Weight of the term that pushes weights to the grid, with --round adaround; by default 0.01.",
      valueName: "x"))
  var regularization: Double?

  @Option(
    name: .customLong("rounding-beta-start"),
    help: ArgumentHelp(
      "Exponent of that term when it sets in, 1 to 1000; by default 20.", valueName: "x"))
  var betaStart: Double?

  @Option(
    name: .customLong("rounding-beta-end"),
    help: ArgumentHelp(
      "Exponent of that term at the end, 1 to 1000; by default 2.", valueName: "x"))
  var betaEnd: Double?

  @Option(
    name: .customLong("rounding-warm-start"),
    help: ArgumentHelp(
      "Share of the steps without that term, less than 1; by default 0.2.", valueName: "share"))
  var warmStart: Double?

  @Option(
    name: .customLong("rounding-candidates"),
    help: ArgumentHelp(
      "Fractions of the range to try, 1 to 1000, with --round seq-mse; by default 20.",
      valueName: "n"))
  var candidates: Int?

  /// Refuses constants of another method.
  func check(for method: QuantizeCommand.Rounding) throws {
    if method != .adaround {
      for (isGiven, name) in [
        (iterations != nil, "iterations"), (regularization != nil, "regularization"),
        (betaStart != nil, "beta-start"), (betaEnd != nil, "beta-end"),
        (warmStart != nil, "warm-start"),
      ] where isGiven {
        throw usage("--rounding-\(name) is for --round adaround")
      }
    }
    if method != .seqMSE && candidates != nil {
      throw usage("--rounding-candidates is for --round seq-mse")
    }
  }

  /// Takes what is given over.
  func set(in options: inout RoundingOptions) {
    options.iterations = iterations
    if let regularization { options.regularization = regularization }
    if let betaStart { options.betaStart = betaStart }
    if let betaEnd { options.betaEnd = betaEnd }
    if let warmStart { options.warmStart = warmStart }
    if let candidates { options.candidates = candidates }
  }
}
