// SPDX-License-Identifier: Apache-2.0
// Counts and sums over the outputs of a network.

import Halfstep

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// The outputs of a batch as rows of scores.
struct Scores {
  let values: [Float]
  let rows: Int

  /// - Returns: nil without a tensor.
  init?(_ tensor: Tensor?) throws(HalfstepError) {
    guard let tensor else { return nil }
    rows = tensor.shape.dimensions.first ?? 1
    values = try tensor.floats()
  }

  /// Position of the largest score of each row; the first of equals, 0 if all are NaN.
  var winners: [Int] {
    guard rows > 0 else { return [] }
    let width = values.count / rows
    return (0..<rows).map { row in
      var best = 0
      for column in 0..<width
      where !(values[row * width + column] <= values[row * width + best])
        && !values[row * width + column].isNaN
      { best = column }
      return best
    }
  }
}

/// What `halfstep evaluate` finds.
struct Measurement {
  let rows: Int
  let isSimulated: Bool
  let hasLabels: Bool
  private var correct = 0
  private var floatCorrect = 0
  private var agreeing = 0
  private var signal = 0.0
  private var noise = 0.0

  init(rows: Int, isSimulated: Bool, hasLabels: Bool) {
    self.rows = rows
    self.isSimulated = isSimulated
    self.hasLabels = hasLabels
  }

  mutating func add(
    float: Scores?, simulated: Scores?, classes: ArraySlice<Int>?
  ) throws(HalfstepError) {
    guard let float else { return }
    let winners = float.winners
    if let classes {
      guard winners.count == classes.count else {
        throw HalfstepError(
          .shapeMismatch, "output: expected \(classes.count) rows, got \(winners.count)")
      }
      floatCorrect += zip(winners, classes).count { $0 == $1 }
    }
    guard let simulated else { return }
    let others = simulated.winners
    if let classes { correct += zip(others, classes).count { $0 == $1 } }
    agreeing += zip(winners, others).count { $0 == $1 }
    for (a, b) in zip(float.values, simulated.values) {
      signal += Double(a) * Double(a)
      let difference = Double(a) - Double(b)
      noise += difference * difference
    }
  }

  /// Results by name.
  var members: [(String, JSONValue)] {
    var members: [(String, JSONValue)] = [("rows", .integer(rows))]
    let count = Double(rows)
    if hasLabels {
      members.append(("top1", .number(Double(isSimulated ? correct : floatCorrect) / count)))
    }
    if isSimulated {
      if hasLabels { members.append(("float_top1", .number(Double(floatCorrect) / count))) }
      members.append(("agreement", .number(Double(agreeing) / count)))
      members.append(("sqnr_db", .number(noise > 0 ? 10 * log10(signal / noise) : .infinity)))
    }
    return members
  }
}

extension Tensor {
  /// The elements as whole numbers.
  ///
  /// - Throws: `HalfstepError.typeMismatch` for elements that are no integers.
  func wholeNumbers() throws(HalfstepError) -> [Int] {
    let start = storage.baseAddress
    defer { withExtendedLifetime(storage) {} }
    func values<Element: FixedWidthInteger>(_: Element.Type) -> [Int] {
      (0..<count).map {
        Int(
          clamping: start.loadUnaligned(
            fromByteOffset: $0 * MemoryLayout<Element>.size, as: Element.self))
      }
    }
    switch dataType {
    case .int8: return values(Int8.self)
    case .uint8: return values(UInt8.self)
    case .int16: return values(Int16.self)
    case .uint16: return values(UInt16.self)
    case .int32: return values(Int32.self)
    case .uint32: return values(UInt32.self)
    case .int64: return values(Int64.self)
    case .uint64: return values(UInt64.self)
    default: throw HalfstepError(.typeMismatch, "labels: expected integers, got \(dataType)")
    }
  }
}

/// A number with a fixed count of digits behind the point.
func fixed(_ value: Double, _ digits: Int) -> String {
  guard value.isFinite, abs(value) < 1e9 else { return String(value) }
  let scale = (0..<digits).reduce(1.0) { scale, _ in scale * 10 }
  let scaled = Int((abs(value) * scale).rounded(.toNearestOrEven))
  let whole = scaled / Int(scale)
  let fraction = String(scaled % Int(scale))
  let sign = value < 0 && scaled != 0 ? "-" : ""
  let zeros = String(repeating: "0", count: max(0, digits - fraction.count))
  return digits == 0 ? "\(sign)\(whole)" : "\(sign)\(whole).\(zeros)\(fraction)"
}

/// A text with spaces behind it.
func padded(_ text: String, _ width: Int) -> String {
  text + String(repeating: " ", count: max(1, width - text.count))
}
