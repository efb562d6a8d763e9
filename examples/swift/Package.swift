// swift-tools-version: 6.1
// SPDX-License-Identifier: Apache-2.0
// An application that depends on Halfstep.

import PackageDescription

let package = Package(
  name: "quantize",
  dependencies: [.package(name: "halfstep", path: "../..")],
  targets: [
    .executableTarget(
      name: "quantize", dependencies: [.product(name: "Halfstep", package: "halfstep")])
  ]
)
