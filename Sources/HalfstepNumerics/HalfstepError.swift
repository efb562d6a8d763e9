// SPDX-License-Identifier: Apache-2.0
// The one error type that every module throws.

/// A failure that names what went wrong and where.
///
/// The message says what, where, expected and got, without a final period:
/// `node 'conv1' weight [64, 3, 7, 7]: expected rank 2, got 4`.
public struct HalfstepError: Error, Hashable, Sendable, CustomStringConvertible {
  /// The kind of failure; its raw value is the `hs_status` of the C interface.
  public let code: Code
  /// What happened, in words.
  public let message: String
  /// The graph node concerned, if there is one.
  public let node: String?

  /// Creates an error.
  ///
  /// - Parameters:
  ///   - code: The kind of failure.
  ///   - message: What, where, expected, got.
  ///   - node: Name of the graph node concerned.
  public init(_ code: Code, _ message: String, node: String? = nil) {
    self.code = code
    self.message = message
    self.node = node
  }

  public var description: String { message }

  /// Kinds of failure. Numbers are frozen: 1-19 argument, 20-39 file or format, 40-59 graph,
  /// 60-79 numeric, 80-99 system.
  public enum Code: Int32, Hashable, Sendable, CaseIterable {
    /// An argument is outside its documented range.
    case invalidArgument = 1
    /// A tensor's shape is not the expected one.
    case shapeMismatch = 2
    /// A tensor's element type is not the expected one.
    case typeMismatch = 3
    /// A name (tensor, node, scheme, configuration) is not known.
    case unknownName = 4
    /// A call came too early, such as exporting before encodings were computed.
    case invalidState = 5

    /// A file could not be opened, read or written.
    case fileAccess = 20
    /// A file's bytes do not follow its format.
    case malformedFile = 21
    /// A file follows a version of its format that is not supported.
    case unsupportedVersion = 22
    /// An external-data path leaves the model's folder.
    case unsafePath = 23
    /// A runtime configuration is wrong; the message gives the key.
    case invalidConfiguration = 24
    /// Encodings do not fit the model they are loaded into.
    case encodingMismatch = 25

    /// A graph breaks a structural rule: cycle, duplicate name, missing tensor.
    case invalidGraph = 40
    /// The graph holds operators that the runtime cannot execute; the message names all of them.
    case unsupportedOperator = 41

    /// A value is NaN or infinite.
    case nonFiniteValue = 60
    /// A range cannot be chosen because no data was seen.
    case emptyStatistics = 61
    /// A numeric routine failed.
    case numericFailure = 62

    /// Memory could not be allocated.
    case outOfMemory = 80
    /// The caller's progress callback asked to stop.
    case cancelled = 81
    /// A defect in this library or one below it.
    case internalError = 82
  }
}
