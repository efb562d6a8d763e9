// SPDX-License-Identifier: Apache-2.0
// Errors of candidate weights, from rows or from Gram matrices.

import HalfstepGraph
import HalfstepNumerics

/// Errors of candidate weights, from rows or from Gram matrices.
struct CandidateSearch {
  let layout: WeightLayout
  /// Columns of each block.
  let ranges: [Range<Int>]
  /// `[groups, outputsPerGroup, columns]` each.
  let float: [Float]
  let trials: [[Float]]
  let loss: SequentialMSERounder.Options.Loss

  private var columns: Int { layout.columns }
  private var outputs: Int { layout.outputsPerGroup }

  /// Elements of the Gram matrices of all groups and blocks.
  var gramCount: Int { layout.groups * ranges.reduce(0) { $0 + $1.count * $1.count } }

  /// Adds the Gram matrices of rows.
  ///
  /// - Parameters:
  ///   - panel: Rows, `[groups, columns, rows]`.
  ///   - grams: One matrix for each group and block.
  func addGrams(
    of panel: [Float], rows: Int, to grams: inout [Float]
  ) throws(HalfstepError) {
    var place = 0
    for group in 0..<layout.groups {
      for range in ranges {
        let start = (group * columns + range.lowerBound) * rows
        let size = range.count
        try panel.withUnsafeBufferPointer { (panel) throws(HalfstepError) in
          try grams.withUnsafeMutableBufferPointer { (grams) throws(HalfstepError) in
            guard let panel = panel.baseAddress, let grams = grams.baseAddress else { return }
            try MatrixProduct.multiply(
              rows: size, columns: size, inner: rows, .init(panel + start, stride: rows),
              .init(panel + start, stride: rows, isTransposed: true), keep: 1,
              into: grams + place, cStride: size)
          }
        }
        place += size * size
      }
    }
  }

  /// Computes squared errors from Gram matrices: `d·G·dᵀ` for differences d of weights.
  func evaluate(_ grams: [Float], _ sums: inout LossSums) throws(HalfstepError) {
    for candidate in trials.indices {
      var place = 0
      for group in 0..<layout.groups {
        let start = group * outputs * columns
        let difference = (0..<outputs * columns).map {
          float[start + $0] - trials[candidate][start + $0]
        }
        for (block, range) in ranges.enumerated() {
          let size = range.count
          var products = [Float](repeating: 0, count: outputs * size)
          try difference.withUnsafeBufferPointer { (difference) throws(HalfstepError) in
            try grams.withUnsafeBufferPointer { (grams) throws(HalfstepError) in
              try products.withUnsafeMutableBufferPointer { (products) throws(HalfstepError) in
                guard let difference = difference.baseAddress, let grams = grams.baseAddress,
                  let products = products.baseAddress
                else { return }
                try MatrixProduct.multiply(
                  rows: outputs, columns: size, inner: size,
                  .init(difference + range.lowerBound, stride: columns),
                  .init(grams + place, stride: size), into: products, cStride: size)
              }
            }
          }
          for output in 0..<outputs {
            var sum = 0.0
            for column in 0..<size {
              sum +=
                Double(products[output * size + column])
                * Double(difference[output * columns + range.lowerBound + column])
            }
            let part = (group * outputs + output) * ranges.count + block
            sums.errors[candidate][part] += max(sum, 0)
          }
          place += size * size
        }
      }
    }
  }

  /// Adds errors on rows.
  ///
  /// - Parameters:
  ///   - wanted: Inputs of the float layer, `[groups, columns, rows]`.
  ///   - tested: Inputs of the candidates, likewise.
  func add(
    wanted: [Float], tested: [Float], rows: Int, to sums: inout LossSums
  ) throws(HalfstepError) {
    sums.rows += rows
    for group in 0..<layout.groups {
      for (block, range) in ranges.enumerated() {
        let reference = try product(float, wanted, group, range, rows)
        for output in 0..<outputs {
          let part = (group * outputs + output) * ranges.count + block
          for value in reference[output * rows..<(output + 1) * rows] {
            sums.signal[part] += Double(value) * Double(value)
          }
        }
        for candidate in trials.indices {
          let trial = try product(trials[candidate], tested, group, range, rows)
          for output in 0..<outputs {
            let part = (group * outputs + output) * ranges.count + block
            var sum = 0.0
            for index in output * rows..<(output + 1) * rows {
              let error = Double(reference[index] - trial[index])
              sum += loss == .meanAbsolute ? abs(error) : error * error
            }
            sums.errors[candidate][part] += sum
          }
        }
      }
    }
  }

  /// Outputs of a group's weights in a block, `[outputs, rows]`.
  private func product(
    _ weight: [Float], _ panel: [Float], _ group: Int, _ range: Range<Int>, _ rows: Int
  ) throws(HalfstepError) -> [Float] {
    var result = [Float](repeating: 0, count: outputs * rows)
    try weight.withUnsafeBufferPointer { (weight) throws(HalfstepError) in
      try panel.withUnsafeBufferPointer { (panel) throws(HalfstepError) in
        try result.withUnsafeMutableBufferPointer { (result) throws(HalfstepError) in
          guard let weight = weight.baseAddress, let panel = panel.baseAddress,
            let result = result.baseAddress
          else { return }
          try MatrixProduct.multiply(
            rows: outputs, columns: rows, inner: range.count,
            .init(weight + group * outputs * columns + range.lowerBound, stride: columns),
            .init(panel + (group * columns + range.lowerBound) * rows, stride: rows),
            into: result, cStride: rows)
        }
      }
    }
    return result
  }
}
