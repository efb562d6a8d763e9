// SPDX-License-Identifier: Apache-2.0
// How failures become messages and exit codes.

import ArgumentParser
import Halfstep

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// What the tool was doing when something failed; the same failure means different things.
enum Stage {
  /// Reading a file that the user named, or working on what was in it.
  case reading
  /// Doing what options say.
  case configuring
  /// Writing results.
  case writing

  func exitCode(for code: HalfstepError.Code) -> ExitCode {
    switch code {
    case .cancelled: ExitCode(130)
    case .internalError, .outOfMemory, .numericFailure: ExitCode(EX_SOFTWARE)
    case .fileAccess: ExitCode(self == .writing ? EX_CANTCREAT : EX_NOINPUT)
    case .invalidArgument, .unsupportedVersion, .unknownName:
      ExitCode(self == .configuring ? EX_USAGE : EX_DATAERR)
    default: ExitCode(EX_DATAERR)
    }
  }
}

/// Runs a step; a failure is told on standard error and becomes an exit code.
func attempt<Result>(
  _ stage: Stage, _ body: () throws(HalfstepError) -> Result
) throws -> Result {
  do throws(HalfstepError) {
    return try body()
  } catch {
    throw fail(stage.exitCode(for: error.code), error.message)
  }
}

/// Tells what went wrong, and gives what to throw.
func fail(_ code: ExitCode, _ message: String) -> ExitCode {
  Terminal.clearLine()
  Terminal.write("halfstep: error: \(message)\n", to: STDERR_FILENO)
  return code
}

/// What to throw for options that do not go together.
func usage(_ message: String) -> ExitCode { fail(ExitCode(EX_USAGE), message) }

/// What to throw for data that does not fit.
func badData(_ message: String) -> ExitCode { fail(ExitCode(EX_DATAERR), message) }
