// SPDX-License-Identifier: Apache-2.0
// AdaRound's soft rounding: AIMET's numbers, the definition in double, Adam by hand.

import Foundation
import HalfstepNumerics
import TestSupport
import Testing

@Suite struct SoftRoundingTests {
  @Test func heightAndVariableAreInverse() {
    for height in stride(from: Float(0), through: 1, by: 0.01) {
      let variable = SoftRounding.variable(height: height)
      expectClose(SoftRounding.height(variable: variable), height, absolute: 4e-7)
    }
    // h = 1/2 at V = 0 by symmetry; 1.2·σ − 0.1 passes 0 and 1 at ∓ln 11.
    #expect(SoftRounding.height(variable: 0) == 0.5)
    #expect(SoftRounding.height(variable: 2.4) == 1 && SoftRounding.height(variable: -2.4) == 0)
    expectClose(SoftRounding.variable(height: 0), -Float(log(11.0)), ulps: 4)
  }

  @Test(.enabled(if: Golden.isPresent)) func regularizerAndGradientAreAIMETs() throws {
    let arrays = try Golden.arrays("torch_adaround_loss.npz")
    let rows = try #require(try Golden.json("torch_adaround_loss.json") as? [[String: Any]])
    let alpha = try #require(arrays["alpha"]).floats()
    let zeros = [Float](repeating: 0, count: alpha.count)
    // Heights reproduce the variables up to rounding: 2⁻²⁴ over the slope of the sigmoid.
    let soft = try SoftRounding(
      start: zeros, step: zeros, height: alpha.map { SoftRounding.height(variable: $0) })
    var checked = 0
    for row in rows {
      guard let iteration = row["it"] as? Int else { continue }
      let beta = SoftRounding.beta(
        iteration: iteration, of: 1000, range: .init(start: 20, end: 2), warmStart: 0.2)
      guard let expected = row["beta"] as? Double else {
        #expect(beta == nil)
        continue
      }
      #expect(abs(try #require(beta) - expected) < 1e-12)
      let sum = 0.01 * soft.regularizer(beta: expected)
      // AIMET sums 216 floats: 2⁻²⁴ of the sum for each, at worst.
      #expect(abs(sum - (row["round_loss"] as? Double ?? 0)) < 216 * 0x1p-24 * 2)
      guard let gradient = try arrays["grad_it\(iteration)"]?.floats() else { continue }
      let ours = try soft.gradient(upstream: zeros, regularization: 0.01, beta: expected)
      // Beyond the edges heights do not tell variables: `whereTheSigmoidIsCutOffNothingMoves`.
      for (index, (left, right)) in zip(ours, gradient).enumerated() where abs(alpha[index]) < 2.39
      {
        // |2h − 1| is known to 2⁻²³ and is raised to 19: 20 · 2⁻²³ where it is near 1.
        expectClose(left, right, absolute: 1e-6, relative: 2e-5)
      }
      checked += 1
    }
    #expect(checked == 5)
  }

  /// On a processor without AVX-512 both sides run the same code.
  @Test(arguments: [nil, 2.0, 20.0]) func processorsAgreeToTheBit(beta: Double?) throws {
    var random = SeededGenerator(seed: 11)
    let count = 16 * 40 + 5
    let (start, step) = (random.floats(count), random.floats(count, in: 0...0.5))
    let height = random.floats(count, in: -0.3...1.3)
    let sides = try [false, true].map { isPortable in
      let soft = try SoftRounding(start: start, step: step, height: height)
      var random = SeededGenerator(seed: 12)
      for number in 1...40 {
        let upstream = random.floats(soft.paddedCount, in: -3...3)
        let parameters = SoftRounding.Step(
          number: number, rate: 0.05, regularization: 0.3, beta: beta)
        upstream.withUnsafeBufferPointer {
          soft.update(upstream: $0.baseAddress!, parameters, isPortable: isPortable)
        }
      }
      return (0..<count).map { soft.weights[$0].bitPattern }
    }
    #expect(sides[0] == sides[1])
    // Weights moved, and some came to an end.
    #expect((0..<count).count { Float(bitPattern: sides[0][$0]) != start[$0] } > count / 2)
  }

  @Test(arguments: [nil, 2.0, 7.3, 20.0])
  func gradientFollowsFiniteDifferences(beta: Double?) throws {
    var random = SeededGenerator(seed: 3)
    let count = 37
    let heights = random.floats(count, in: 0.03...0.97)
    let step = random.floats(count, in: 0.1...1)
    let upstream = random.floats(count)
    let soft = try SoftRounding(
      start: random.floats(count), step: step, height: heights)
    let gradient = try soft.gradient(upstream: upstream, regularization: 0.3, beta: beta)
    func objective(_ variable: Double, _ index: Int) -> Double {
      let height = min(max(1.2 / (1 + exp(-variable)) - 0.1, 0), 1)
      let push = beta.map { 0.3 * (1 - pow(abs(2 * height - 1), $0)) } ?? 0
      return Double(upstream[index]) * Double(step[index]) * height + push
    }
    for index in 0..<count {
      let variable = Double(SoftRounding.variable(height: heights[index]))
      let slope =
        (objective(variable + 1e-5, index) - objective(variable - 1e-5, index)) / 2e-5
      // Central differences err by 10⁻¹⁰ · f‴ ≤ 10⁻⁶ for β of 20; floats by 2⁻²⁰ of the terms.
      expectClose(gradient[index], Float(slope), absolute: 4e-6, relative: 2e-5)
    }
  }

  @Test func whereTheSigmoidIsCutOffNothingMoves() throws {
    // Heights of exactly 0 and 1 sit on the edges; one step outward leaves them flat for good.
    let soft = try SoftRounding(
      start: [0, 0], step: [1, 1], height: [0, 1])
    var out = [Float](repeating: 0, count: 16)
    out[0] = 1
    out[1] = -1
    for number in 1...3 {
      out.withUnsafeBufferPointer {
        soft.update(
          upstream: $0.baseAddress!,
          .init(number: number, rate: 0.1, regularization: 0, beta: nil))
      }
    }
    #expect(soft.heights == [0, 1])
    #expect(try soft.gradient(upstream: [-1, 1], regularization: 1, beta: 2) == [0, 0])
  }

  @Test func adamByHand() throws {
    // Adam's first step is the learning rate against the gradient's sign, whatever its size.
    let soft = try SoftRounding(start: [2, 2, 5], step: [1, 1, 0], height: [0.5, 0.5, 0.5])
    var gradients = [Float](repeating: 0, count: 16)
    gradients.replaceSubrange(0..<3, with: [0.25, -8, 3])
    gradients.withUnsafeBufferPointer {
      soft.update(
        upstream: $0.baseAddress!, .init(number: 1, rate: 0.01, regularization: 0, beta: nil))
    }
    // h(∓0.01) = 1.2·σ(∓0.01) − 0.1 = 0.5 ∓ 0.003.
    expectClose(soft.heights[0], 0.497, absolute: 1e-6)
    expectClose(soft.heights[1], 0.503, absolute: 1e-6)
    expectClose(soft.weights[0], 2.497, absolute: 1e-6)
    // A weight at the grid's end has nowhere to go.
    #expect(soft.weights[2] == 5 && soft.heights[2] == 0.5)
    #expect(!soft.isUp(0) && soft.isUp(1))
  }

  @Test func adamFollowsTheDefinitionOverManySteps() throws {
    var random = SeededGenerator(seed: 9)
    let count = 50
    let heights = random.floats(count, in: 0.1...0.9)
    let step = random.floats(count, in: 0.5...1)
    let soft = try SoftRounding(
      start: [Float](repeating: 0, count: count), step: step, height: heights)
    var variables = heights.map { Double(SoftRounding.variable(height: $0)) }
    var first = [Double](repeating: 0, count: count)
    var second = first
    for number in 1...200 {
      let beta: Double? = number > 50 ? 20 - Double(number) / 12 : nil
      let upstream = random.floats(count) + [Float](repeating: 0, count: 14)
      upstream.withUnsafeBufferPointer {
        soft.update(
          upstream: $0.baseAddress!,
          .init(number: number, rate: 1e-2, regularization: 0.05, beta: beta))
      }
      for index in 0..<count {
        let logistic = 1 / (1 + exp(-variables[index]))
        let open = 1.2 * logistic - 0.1
        var gradient = Double(upstream[index]) * Double(step[index])
        if let beta {
          let centered = 2 * min(max(open, 0), 1) - 1
          gradient -= 0.1 * beta * pow(abs(centered), beta - 1) * (centered < 0 ? -1 : 1)
        }
        gradient *= open > 0 && open < 1 ? 1.2 * logistic * (1 - logistic) : 0
        first[index] = 0.9 * first[index] + 0.1 * gradient
        second[index] = 0.999 * second[index] + 0.001 * gradient * gradient
        let root = (second[index] / (1 - pow(0.999, Double(number)))).squareRoot()
        variables[index] -=
          0.01 * first[index] / (1 - pow(0.9, Double(number))) / (root + 1e-8)
      }
    }
    for index in 0..<count {
      let height = min(max(1.2 / (1 + exp(-variables[index])) - 0.1, 0), 1)
      // 200 steps of 0.01, each with the relative error of a few dozen float operations.
      expectClose(soft.heights[index], Float(height), absolute: 2e-4)
    }
  }

  @Test func wrongCountsThrow() throws {
    #expect(throws: HalfstepError.self) {
      try SoftRounding(start: [1], step: [1, 2], height: [0])
    }
    let soft = try SoftRounding(start: [1], step: [1], height: [0])
    #expect(throws: HalfstepError.self) {
      try soft.gradient(upstream: [], regularization: 1, beta: 2)
    }
  }
}

@Suite struct ReconstructionLossTests {
  static let activations: [FollowingActivation] = [
    .identity, .relu, .clip(low: 0, high: 6), .clip(low: -1, high: 0.5),
    .slopes((0..<21).map { 0.05 * Float($0) }), .sigmoid, .tanh, .hardSwish,
    .hardSigmoid(slope: 0.2, shift: 0.5),
  ]

  static func value(_ x: Double, _ function: FollowingActivation, _ channel: Int) -> Double {
    switch function {
    case .identity: x
    case .clip(let low, let high): min(max(x, Double(low)), Double(high))
    case .slopes(let slopes): x > 0 ? x : x * Double(slopes[channel])
    case .sigmoid: 1 / (1 + exp(-x))
    case .tanh: Foundation.tanh(x)
    case .hardSwish: x * min(max(x / 6 + 0.5, 0), 1)
    case .hardSigmoid(let slope, let shift): min(max(Double(slope) * x + Double(shift), 0), 1)
    }
  }

  @Test(arguments: activations)
  func lossAndGradientFollowTheDefinition(function: FollowingActivation) throws {
    var random = SeededGenerator(seed: 7)
    let (rows, channels) = (5, 21)
    let bias = random.floats(channels)
    let loss = try ReconstructionLoss(bias: bias, activation: function)
    #expect(loss.rowStride == 32)
    let raw = random.floats(rows * channels, in: -4...4)
    let wanted = random.floats(rows * channels, in: -4...4)
    var products = [Float](repeating: 0, count: rows * 32)
    var targets = products
    for index in 0..<rows * channels {
      products[index / channels * 32 + index % channels] = raw[index]
      targets[index / channels * 32 + index % channels] = wanted[index]
    }
    targets.withUnsafeMutableBufferPointer { buffer in
      for row in 0..<rows { loss.activate(buffer.baseAddress! + row * 32) }
    }
    for index in 0..<rows * channels {
      expectClose(
        targets[index / channels * 32 + index % channels],
        Float(Self.value(Double(wanted[index]), function, index % channels)), absolute: 2e-6)
    }
    let sum = products.withUnsafeMutableBufferPointer { products in
      loss.evaluate(
        products.baseAddress!, targets: targets, targetStride: 32, rows: rows, gradient: true)
    }
    func term(_ index: Int, _ shift: Double) -> Double {
      let channel = index % channels
      let product = Double(raw[index]) + Double(bias[channel]) + shift
      let difference =
        Self.value(product, function, channel)
        - Self.value(Double(wanted[index]), function, channel)
      return difference * difference
    }
    let expected = (0..<rows * channels).reduce(0.0) { $0 + term($1, 0) }
    // Each term has a relative error of a few 2⁻²².
    #expect(abs(sum - expected) <= expected * 1e-5)
    for index in 0..<rows * channels {
      let slope = (term(index, 1e-6) - term(index, -1e-6)) / 2e-6 / Double(rows)
      // Differences of 10⁻⁶ in double: 10⁻⁹ of terms up to 60.
      expectClose(
        products[index / channels * 32 + index % channels], Float(slope), absolute: 4e-6,
        relative: 1e-5)
    }
  }

  @Test(.enabled(if: Golden.isPresent)) func reconstructionLossIsAIMETs() throws {
    let arrays = try Golden.arrays("torch_adaround_loss.npz")
    let rows = try #require(try Golden.json("torch_adaround_loss.json") as? [[String: Any]])
    let expected = try #require(rows.last?["recon_loss_conv"] as? Double)
    let prediction = try #require(arrays["pred"]).floats()
    let target = try #require(arrays["target"]).floats()
    let loss = try ReconstructionLoss(
      bias: [Float](repeating: 0, count: 6), activation: .identity)
    // [4, 6, 5, 5] seen as 100 rows of 6 channels.
    func asRows(_ values: [Float]) -> [Float] {
      var result = [Float](repeating: 0, count: 100 * 16)
      for index in values.indices {
        let (picture, rest) = index.quotientAndRemainder(dividingBy: 150)
        result[(picture * 25 + rest % 25) * 16 + rest / 25] = values[index]
      }
      return result
    }
    var products = asRows(prediction)
    let sum = products.withUnsafeMutableBufferPointer {
      loss.evaluate(
        $0.baseAddress!, targets: asRows(target), targetStride: 16, rows: 100, gradient: false)
    }
    // AIMET adds up 600 floats.
    #expect(abs(sum / 100 - expected) < expected * 600 * 0x1p-24)
  }

  @Test func slopesOfAnotherCountThrow() {
    #expect(throws: HalfstepError.self) {
      try ReconstructionLoss(bias: [0, 0], activation: .slopes([1]))
    }
  }
}
