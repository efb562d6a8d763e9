// SPDX-License-Identifier: Apache-2.0
// Finds the factors that balance weight ranges; tensor math without a graph.

import HalfstepGraph
import HalfstepNumerics

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// Finds factors of channels that balance the weight ranges of the layers that write and read them.
struct EqualizationSolver {
  /// A layer as the solver sees it.
  struct Layer {
    let layout: WeightLayout
    /// For each kernel slice, in memory order, a value of its largest magnitude.
    let slices: Tensor
    /// The variable of each input channel; −1 where the factor is 1.
    let inputs: [Int]
    /// The variable of each output channel; −1 where the factor is 1.
    let outputs: [Int]
  }

  /// The range that each variable's values are expected to have, where they are written; 0 if unknown.
  let activations: [Double]

  /// Variables that are updated together.
  private struct Group {
    let variables: [Int]
    let producers: [Int]
    let consumers: [Int]
  }

  let layers: [Layer]
  private(set) var factors: [Double]
  private(set) var iterations = 0
  private(set) var isConverged = false
  private let groups: [Group]
  /// The group of each variable, and its place there.
  private let home: [(group: Int, slot: Int)]
  /// Ranges by layer, until a factor on the layer's other side moves.
  private var outputCache: [[Double]?]
  private var inputCache: [[Double]?]

  /// Prepares layers, in graph order, over variables `0..<variableCount`.
  init(layers: [Layer], variableCount: Int, activations: [Double]? = nil) {
    self.layers = layers
    self.activations = activations ?? [Double](repeating: 0, count: variableCount)
    factors = [Double](repeating: 1, count: variableCount)
    outputCache = [[Double]?](repeating: nil, count: layers.count)
    inputCache = outputCache
    var home = [(group: Int, slot: Int)](repeating: (-1, 0), count: variableCount)
    var variables: [[Int]] = []
    for layer in layers {
      var members: [Int] = []
      for variable in layer.outputs where variable >= 0 && home[variable].group < 0 {
        home[variable] = (variables.count, members.count)
        members.append(variable)
      }
      if !members.isEmpty { variables.append(members) }
    }
    var producers = [[Int]](repeating: [], count: variables.count)
    var consumers = [[Int]](repeating: [], count: variables.count)
    for (position, layer) in layers.enumerated() {
      for variable in layer.outputs where variable >= 0 {
        if producers[home[variable].group].last != position {
          producers[home[variable].group].append(position)
        }
      }
      for variable in layer.inputs where variable >= 0 {
        if consumers[home[variable].group].last != position {
          consumers[home[variable].group].append(position)
        }
      }
    }
    self.home = home
    // A layer that reads a Concat lists a group once for each stretch of its channels.
    groups = variables.indices.map {
      Group(
        variables: variables[$0], producers: Array(Set(producers[$0])).sorted(),
        consumers: Array(Set(consumers[$0])).sorted())
    }
  }

  /// A channel whose largest weight is this much smaller than the tensor's is dead.
  static let deadRatio = 0x1p-20

  /// Updates one tensor's factors after another until none moves by more than the tolerance against
  /// the others of its tensor.
  ///
  /// A move that all factors of a tensor have in common changes no ratio of ranges within any weight,
  /// and such moves wander along a chain of n layers for about n² rounds.
  ///
  /// - Parameter progress: Told how many rounds are done after each; false cancels.
  /// - Throws: `HalfstepError.cancelled` if `progress` returned false.
  mutating func solve(
    maximumIterations: Int, tolerance: Double, largestFactor: Double,
    progress: ((_ completed: Int) -> Bool)? = nil
  ) throws(HalfstepError) {
    let limit = largestFactor
    isConverged = groups.isEmpty
    while !isConverged, iterations < maximumIterations {
      iterations += 1
      var movement = 1.0
      for (position, group) in groups.enumerated() {
        let written = largestWeights(position, group.producers, isOutput: true)
        let read = largestWeights(position, group.consumers, isOutput: false)
        let activationScale = activationScale(group, written.values, written.isLive)
        var (smallest, largest) = (Double.infinity, 0.0)
        for (slot, variable) in group.variables.enumerated() {
          var factor = 1.0
          if written.isLive[slot], read.isLive[slot] {
            let range = max(written.values[slot], activationScale * activations[variable])
            factor = (range / read.values[slot]).squareRoot()
            factor = min(max(factor, 1 / limit), limit)
            smallest = min(smallest, factor / factors[variable])
            largest = max(largest, factor / factors[variable])
          }
          factors[variable] = factor
        }
        movement = max(movement, largest / smallest)
        for producer in group.producers { inputCache[producer] = nil }
        for consumer in group.consumers { outputCache[consumer] = nil }
      }
      isConverged = movement <= 1 + tolerance
      if let progress, !progress(iterations) {
        throw HalfstepError(.cancelled, "equalization was cancelled after round \(iterations)")
      }
    }
  }

  /// What to multiply expected ranges with so that the largest of a tensor counts as much as the
  /// largest weight that writes it, both with the factors as they are; 0 if nothing is known.
  private func activationScale(_ group: Group, _ written: [Double], _ isLive: [Bool]) -> Double {
    var (weight, activation) = (0.0, 0.0)
    for (slot, variable) in group.variables.enumerated() where isLive[slot] {
      weight = max(weight, written[slot] / factors[variable])
      activation = max(activation, activations[variable] / factors[variable])
    }
    return activation > 0 ? weight / activation : 0
  }

  /// The largest weights that write or read each variable of a group, its own factor left out.
  ///
  /// With several layers on one side, a weight counts relative to its own layer's largest.
  private mutating func largestWeights(
    _ group: Int, _ members: [Int], isOutput: Bool
  ) -> (values: [Double], isLive: [Bool]) {
    let count = groups[group].variables.count
    var values = [Double](repeating: 0, count: count)
    var isLive = [Bool](repeating: false, count: count)
    var meanLogarithm = 0.0
    for member in members {
      let layer = layers[member]
      let ranges = isOutput ? outputRanges(member) : inputRanges(member)
      let ids = isOutput ? layer.outputs : layer.inputs
      var (largest, largestUnscaled) = (0.0, 0.0)
      for (channel, range) in ranges.enumerated() {
        largest = max(largest, range * ownFactor(ids[channel], isOutput))
        largestUnscaled = max(largestUnscaled, range)
      }
      guard largest > 0, largest.isFinite else { continue }
      let scale = members.count == 1 ? 1 : largest
      if members.count > 1 { meanLogarithm += log(largest) / Double(members.count) }
      for (channel, range) in ranges.enumerated() {
        let variable = ids[channel]
        guard variable >= 0, home[variable].group == group else { continue }
        let slot = home[variable].slot
        values[slot] = max(values[slot], range / scale)
        // Own factors left out: they must not decide whether there will be one.
        if range > Self.deadRatio * largestUnscaled { isLive[slot] = true }
      }
    }
    if members.count > 1 {
      let mean = exp(meanLogarithm)
      for slot in values.indices { values[slot] *= mean }
    }
    return (values, isLive)
  }

  private func ownFactor(_ variable: Int, _ isOutput: Bool) -> Double {
    guard variable >= 0 else { return 1 }
    return isOutput ? 1 / factors[variable] : factors[variable]
  }

  /// Largest weight that writes each output channel, with the factors of the inputs: `[K]`.
  private mutating func outputRanges(_ member: Int) -> [Double] {
    if let known = outputCache[member] { return known }
    let layer = layers[member]
    let input = layer.inputs.map { Float(ownFactor($0, false)) }
    let result =
      layer.layout.outputIsOuter ? Self.rowMaxima(layer, input) : Self.columnMaxima(layer, input)
    outputCache[member] = result
    return result
  }

  /// Largest weight that reads each input channel, with the factors of the outputs: `[C]`.
  private mutating func inputRanges(_ member: Int) -> [Double] {
    if let known = inputCache[member] { return known }
    let layer = layers[member]
    let output = layer.outputs.map { Float(ownFactor($0, true)) }
    let result =
      layer.layout.outputIsOuter ? Self.columnMaxima(layer, output) : Self.rowMaxima(layer, output)
    inputCache[member] = result
    return result
  }

  // Ranges only steer the choice of factors, so single precision is enough for them; the weights are
  // scaled in double precision.

  /// For each outer channel the largest of its slices times the inner channel's factor.
  private static func rowMaxima(_ layer: Layer, _ inner: [Float]) -> [Double] {
    let (outerCount, innerCount) = (layer.layout.outer, layer.layout.inner)
    return withSlices(layer) { slices in
      inner.withUnsafeBufferPointer { inner in
        (0..<layer.layout.groups * outerCount).map { row in
          let source = slices + row * innerCount
          let factors = inner.baseAddress! + row / outerCount * innerCount
          // Bit patterns of numbers that are not negative are ordered like the numbers, and their
          // maximum vectorizes.
          var bits: UInt32 = 0
          for column in 0..<innerCount {
            bits = max(bits, (source[column] * factors[column]).bitPattern & 0x7FFF_FFFF)
          }
          return Double(Float(bitPattern: bits))
        }
      }
    } ?? []
  }

  /// For each inner channel the largest of its slices times the outer channel's factor.
  private static func columnMaxima(_ layer: Layer, _ outer: [Float]) -> [Double] {
    let (outerCount, innerCount) = (layer.layout.outer, layer.layout.inner)
    var result = [Float](repeating: 0, count: layer.layout.groups * innerCount)
    withSlices(layer) { slices in
      result.withUnsafeMutableBufferPointer { result in
        for row in 0..<layer.layout.groups * outerCount {
          let source = slices + row * innerCount
          let target = result.baseAddress! + row / outerCount * innerCount
          let factor = outer[row]
          for column in 0..<innerCount {
            let value = abs(source[column]) * factor
            target[column] = value > target[column] ? value : target[column]
          }
        }
      }
    }
    return result.map(Double.init)
  }

  /// Calls `body` with the layer's slices; nil if there are none.
  @discardableResult
  private static func withSlices<R>(
    _ layer: Layer, _ body: (UnsafePointer<Float>) -> R
  ) -> R? {
    guard layer.slices.count > 0 else { return nil }
    defer { withExtendedLifetime(layer.slices) {} }
    return body(UnsafePointer(layer.slices.storage.baseAddress.assumingMemoryBound(to: Float.self)))
  }
}
