// SPDX-License-Identifier: Apache-2.0
// The command-line tool.

import ArgumentParser

@main
struct HalfstepCommand: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "halfstep", abstract: "Makes trained networks fit for integer hardware.")
}
