// SPDX-License-Identifier: Apache-2.0
// oneDNN's CPU engine and stream, and the one place where its status codes become errors.

import CDNNL
import HalfstepNumerics

/// oneDNN's CPU engine and an in-order stream, created once for the process.
final class Engine: @unchecked Sendable {
  // Unchecked: both handles are immutable and oneDNN allows concurrent use of them on the CPU.
  let handle: OpaquePointer
  let stream: OpaquePointer

  private static let instance = Result<Engine, HalfstepError> { () throws(HalfstepError) in
    try Engine()
  }

  /// The process's engine.
  static func shared() throws(HalfstepError) -> Engine { try instance.get() }

  private init() throws(HalfstepError) {
    Parallel.prepareForForks()
    var engine: OpaquePointer?
    try Self.check(dnnl_engine_create(&engine, dnnl_cpu, 0), "creating an engine")
    guard let engine else { throw HalfstepError(.internalError, "oneDNN: no CPU engine") }
    var stream: OpaquePointer?
    let flags = UInt32(dnnl_stream_default_flags.rawValue)
    try Self.check(dnnl_stream_create(&stream, engine, flags), "creating a stream")
    guard let stream else { throw HalfstepError(.internalError, "oneDNN: no stream") }
    self.handle = engine
    self.stream = stream
  }

  /// Throws unless oneDNN reported success.
  ///
  /// - Throws: `HalfstepError.outOfMemory`, or `.internalError` naming what was attempted: the
  ///   compiler validates shapes before it calls oneDNN, so a refusal is a defect or a limit there.
  static func check(
    _ status: dnnl_status_t, _ action: @autoclosure () -> String
  ) throws(HalfstepError) {
    if status == dnnl_success { return }
    if status == dnnl_out_of_memory {
      throw HalfstepError(.outOfMemory, "oneDNN: out of memory while \(action())")
    }
    throw HalfstepError(.internalError, "oneDNN: status \(status.rawValue) while \(action())")
  }
}

extension Result where Failure == HalfstepError {
  /// Runs a body and keeps what it returns or throws.
  init(_ body: () throws(HalfstepError) -> Success) {
    do { self = .success(try body()) } catch { self = .failure(error) }
  }
}
