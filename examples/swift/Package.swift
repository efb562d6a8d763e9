// swift-tools-version: 6.1
// SPDX-License-Identifier: Apache-2.0
// Applications that depend on Halfstep.

import PackageDescription

let package = Package(
  name: "quantize",
  dependencies: [.package(name: "halfstep", path: "../..")],
  targets: [
    .executableTarget(
      name: "quantize", dependencies: [.product(name: "Halfstep", package: "halfstep")]),
    .executableTarget(
      name: "compress", dependencies: [.product(name: "Halfstep", package: "halfstep")]),
  ]
)
