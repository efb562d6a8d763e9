// SPDX-License-Identifier: Apache-2.0
// The grid that covers a range of reals.

/// Scale and zero point of one group, before the scale is stored as a float.
struct GridChoice: Hashable {
  var scale: Double
  var zeroPoint: Int
}

/// Fits integer grids of one kind to ranges of reals.
///
/// Symmetric grids have `positive` codes above zero and `negative` codes below. Asymmetric grids have
/// `positive` steps in all, and the zero point lies anywhere among them.
struct GridFit {
  let spec: QuantizerSpec
  /// Whether codes start at 0: asymmetric, or symmetric for data without negative values.
  let isUnsigned: Bool

  /// A grid of the kind that a specification asks for.
  ///
  /// - Parameter minimum: Smallest value of all groups, which decides about unsigned symmetric codes.
  init(_ spec: QuantizerSpec, minimum: Double) {
    self.spec = spec
    isUnsigned = !spec.isSymmetric || (spec.allowsUnsigned && minimum >= 0)
  }

  /// Lowest code of the grid.
  var minimumCode: Int { isUnsigned ? 0 : -(1 << (spec.bits - 1)) + (spec.isStrict ? 1 : 0) }
  /// Highest code of the grid.
  var maximumCode: Int { isUnsigned ? (1 << spec.bits) - 1 : (1 << (spec.bits - 1)) - 1 }

  /// Steps that the positive part of a range is divided into.
  ///
  /// AIMET divides strict unsigned ranges by one step less, although the highest code remains, and
  /// lets 2-bit symmetric ranges end at code 2, which clips the positive side but fills the negative.
  private var positiveSteps: Double {
    if isUnsigned { return Double(maximumCode - (spec.isSymmetric && spec.isStrict ? 1 : 0)) }
    return Double(spec.bits == 2 && !spec.isStrict ? 2 : maximumCode)
  }

  /// The smallest scale of a grid: single precision's epsilon, and less for 32-bit grids.
  var smallestScale: Double {
    min(Double(Float.ulpOfOne), 0.01 / Double((1 << spec.bits) - 1))
  }

  /// The finest grid that covers a range and zero.
  ///
  /// Symmetric: the scale is `max(maximum/P, −minimum/N)`, so that an end that has more codes may
  /// reach further. Asymmetric: `(maximum − minimum)/(2^bits − 1)`, zero point rounded half to even.
  ///
  /// - Parameters:
  ///   - minimum: Lower end; values above 0 count as 0.
  ///   - maximum: Upper end; values below 0 count as 0.
  ///   - smallestScale: Least scale; by default AIMET's floor for min-max ranges.
  func covering(
    minimum: Double, maximum: Double, smallestScale: Double? = nil
  ) -> GridChoice {
    let low = min(minimum, 0)
    let high = max(maximum, 0)
    let smallestScale = smallestScale ?? self.smallestScale
    guard spec.isSymmetric else {
      let scale = max((high - low) / positiveSteps, smallestScale)
      return GridChoice(scale: scale, zeroPoint: zeroPoint(minimum: low, scale: scale))
    }
    var scale = high / positiveSteps
    if minimumCode < 0 { scale = max(scale, low / Double(minimumCode)) }
    return GridChoice(scale: max(scale, smallestScale), zeroPoint: 0)
  }

  /// The reals between the ends of a grid.
  func reach(of choice: GridChoice) -> ClosedRange<Double> {
    choice.scale * Double(minimumCode - choice.zeroPoint)...choice.scale
      * Double(maximumCode - choice.zeroPoint)
  }

  /// The code that stands for zero on an asymmetric grid that starts near `minimum`.
  func zeroPoint(minimum: Double, scale: Double) -> Int {
    let steps = (-minimum / scale).rounded(.toNearestOrEven)
    return Int(min(max(steps, 0), Double(maximumCode)))
  }

  /// Makes the encoding of groups whose grids were chosen.
  ///
  /// Scales below 2⁻²⁰ of the largest belong to numerically dead groups and are raised to that, so
  /// that products with their reciprocals stay in range; an asymmetric zero point moves along.
  ///
  /// - Throws: `HalfstepError.invalidArgument` if a scale does not fit a float.
  func encoding(
    _ choices: [GridChoice], granularity: Granularity
  ) throws(HalfstepError) -> Encoding {
    let floor = (choices.map(\.scale).max() ?? 0) * 0x1p-20
    var scales: [Float] = []
    var zeros: [Int32] = []
    scales.reserveCapacity(choices.count)
    zeros.reserveCapacity(choices.count)
    for choice in choices {
      let scale = max(choice.scale, floor)
      var zero = choice.zeroPoint
      if scale > choice.scale && !spec.isSymmetric {
        zero = zeroPoint(minimum: -choice.scale * Double(choice.zeroPoint), scale: scale)
      }
      scales.append(Float(scale))
      zeros.append(Int32(zero))
    }
    return try Encoding(
      bits: spec.bits, isSigned: !isUnsigned, isSymmetric: spec.isSymmetric,
      isStrict: spec.isStrict, granularity: granularity, scales: scales, zeroPoints: zeros)
  }
}

extension QuantizerSpec {
  /// Refuses widths that no grid has.
  ///
  /// - Throws: `HalfstepError.invalidArgument` for a width outside 2...16 and 32, or an asymmetric
  ///   32-bit grid.
  func validate() throws(HalfstepError) {
    guard Self.bitRange.contains(bits) || bits == 32 else {
      throw HalfstepError(.invalidArgument, "quantizer: expected 2...16 or 32 bits, got \(bits)")
    }
    guard bits != 32 || (isSymmetric && !allowsUnsigned) else {
      throw HalfstepError(.invalidArgument, "quantizer: 32 bits need signed symmetric codes")
    }
  }
}

extension RangeScheme {
  /// Refuses parameters outside their range.
  ///
  /// - Throws: `HalfstepError.invalidArgument` for a percentile outside 50...100.
  func validate() throws(HalfstepError) {
    if case .percentile(let value) = self, !(value >= 50 && value <= 100) {
      throw HalfstepError(.invalidArgument, "percentile: expected 50...100, got \(value)")
    }
  }
}
