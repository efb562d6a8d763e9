// SPDX-License-Identifier: Apache-2.0
// Channels from which any number can be taken.

/// Channels from which any number can be taken: those that some layers write, coupled or not.
///
/// A unit's channels are sets that go together. Layers whose outputs are added write the same sets, so
/// that they are one unit.
package struct ChannelUnit: Sendable {
  /// Representatives, in the order in which the first layer writes them.
  package let channels: [Int]
  /// Layers that write them: positions in `ChannelDependencies.layers`, ascending.
  package let writers: [Int]
  /// Layers whose weights have an input for some of them, ascending.
  package let readers: [Int]

  /// Finds the units of a network, in the order of their first writers.
  static func all(in dependencies: ChannelDependencies) -> [ChannelUnit] {
    var dependencies = dependencies
    // Sets of channels that one layer writes belong together.
    var families = ChannelSets()
    _ = families.add(dependencies.sets.count)
    for layer in dependencies.layers where !layer.losesGroups {
      let free = layer.outputs.filter { dependencies.isFree($0) }
      for id in free.dropFirst() { families.join(free[0], id) }
    }
    var places: [Int: Int] = [:]
    var channels: [[Int]] = []
    var writers: [[Int]] = []
    var known: Set<Int> = []
    for (position, layer) in dependencies.layers.enumerated() where !layer.losesGroups {
      for id in layer.outputs where dependencies.isFree(id) {
        let family = families.find(id)
        let place = places[family] ?? channels.count
        if place == channels.count {
          places[family] = place
          channels.append([])
          writers.append([])
        }
        if writers[place].last != position { writers[place].append(position) }
        if known.insert(id).inserted { channels[place].append(id) }
      }
    }
    var readers = [[Int]](repeating: [], count: channels.count)
    for (position, layer) in dependencies.layers.enumerated() where !layer.losesGroups {
      for id in layer.inputs ?? [] where dependencies.isFree(id) {
        guard let place = places[families.find(id)] else { continue }
        if readers[place].last != position, !readers[place].contains(position) {
          readers[place].append(position)
        }
      }
    }
    return channels.indices.map {
      ChannelUnit(channels: channels[$0], writers: writers[$0], readers: readers[$0])
    }
  }
}
