// SPDX-License-Identifier: Apache-2.0
// Divergence between a histogram and its quantized version.

#if canImport(Glibc)
  import Glibc
#elseif canImport(Darwin)
  import Darwin
#endif

/// Kullback-Leibler divergence of a histogram from what a grid leaves of it.
///
/// The data's distribution P has the clipped values added to the bins at the grid's ends. Q spreads the
/// unclipped count of each grid cell evenly over the bins of the cell that hold values. A share of
/// 10⁻⁴ of Q is spread over all bins in range, so that the divergence stays finite.
///
/// - Reference: S. Migacz, "8-bit Inference with TensorRT", GTC 2017.
struct HistogramEntropy {
  private let binWidth: Double
  private let first: Int
  private let total: Double
  /// Sums over the bins before each index of: P, P·ln P, and bins that hold values.
  private var mass: [Double] = [0]
  private var negentropy: [Double] = [0]
  private var occupied: [Double] = [0]

  /// - Parameter statistics: Keeps a histogram and is not empty.
  init(_ statistics: RangeStatistics) {
    binWidth = statistics.binWidth
    first = statistics.firstBin
    total = Double(statistics.count)
    for count in statistics.binCounts {
      let share = Double(count) / total
      mass.append(mass[mass.count - 1] + share)
      negentropy.append(negentropy[negentropy.count - 1] + (share > 0 ? share * log(share) : 0))
      occupied.append(occupied[occupied.count - 1] + (share > 0 ? 1 : 0))
    }
  }

  /// Divergence in nats; infinite for a grid that holds none of the values.
  func callAsFunction(_ choice: GridChoice, fit: GridFit) -> RangeCost {
    let step = choice.scale / binWidth
    let lowest = Double(fit.minimumCode - choice.zeroPoint)
    let highest = Double(fit.maximumCode - choice.zeroPoint)
    let bins = mass.count - 1
    // Bins belong to the cell of their midpoint.
    func index(of position: Double) -> Int {
      Int(min(max((position - 0.5).rounded(.up) - Double(first), 0), Double(bins)))
    }
    let start = index(of: (lowest - 0.5) * step)
    let end = index(of: (highest + 0.5) * step)
    let inside = mass[end] - mass[start]
    let places = occupied[end] - occupied[start]
    guard start < end, inside > 0 else { return RangeCost(total: .infinity, clipping: 0) }
    let floor = Self.smoothing / places
    func logQ(_ share: Double, _ places: Double) -> Double {
      log((1 - Self.smoothing) * share / inside / places + floor)
    }
    // Σ P ln P over the range, then −Σ P ln Q cell by cell.
    var divergence = negentropy[end] - negentropy[start]
    var code = max(lowest, (Double(first + start) / step).rounded(.down))
    var left = start
    var firstLogQ: Double?
    var lastLogQ = 0.0
    while left < end {
      let right = code >= highest ? end : min(max(index(of: (code + 0.5) * step), left), end)
      code += 1
      if right == left { continue }
      let share = mass[right] - mass[left]
      lastLogQ = logQ(share, max(occupied[right] - occupied[left], 1))
      firstLogQ = firstLogQ ?? lastLogQ
      divergence -= share * lastLogQ
      left = right
    }
    // Clipped values move into the outermost bins.
    divergence += clipped(mass[start], into: start, firstLogQ ?? lastLogQ)
    divergence += clipped(mass[bins] - mass[end], into: end - 1, lastLogQ)
    return RangeCost(total: divergence, clipping: 0)
  }

  private static let smoothing = 1e-4

  /// Change of Σ P ln(P/Q) when values are moved into a bin.
  private func clipped(_ amount: Double, into bin: Int, _ logQ: Double) -> Double {
    guard amount > 0 else { return 0 }
    let share = mass[bin + 1] - mass[bin]
    let sum = share + amount
    return sum * log(sum) - (share > 0 ? share * log(share) : 0) - amount * logQ
  }
}
