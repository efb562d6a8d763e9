// swift-tools-version: 6.1
// SPDX-License-Identifier: Apache-2.0
// Package manifest: the Swift library, the C library and the command-line tool.

import PackageDescription

// What is installed carries the Swift runtime with it; the two libraries are parts of Foundation that
// its own modules name only when the whole program is compiled for static linking. SwiftPM refuses
// unsafe flags in what a remote package depends on: only products that nobody outside uses have them.
let staticRuntime: LinkerSetting = .unsafeFlags(
  ["-static-stdlib", "-use-ld=lld", "-l_FoundationCShims", "-l_FoundationCollections"],
  .when(platforms: [.linux]))

let package = Package(
  name: "halfstep",
  products: [
    .library(name: "Halfstep", targets: ["Halfstep"]),
    // Installed as libhalfstep.so by `make install`.
    .library(name: "HalfstepC", type: .dynamic, targets: ["HalfstepC"]),
    .executable(name: "halfstep", targets: ["halfstep"]),
  ],
  dependencies: [
    .package(url: "https://github.com/apple/swift-argument-parser", exact: "1.8.2"),
    .package(url: "https://github.com/apple/swift-collections", exact: "1.6.0"),
    // Without its traits, which would take all of Foundation (30 MB) into the library.
    .package(url: "https://github.com/apple/swift-protobuf", exact: "1.39.0", traits: []),
  ],
  targets: [
    // MARK: - System libraries
    .systemLibrary(name: "CHalfstep", path: "include"),
    .systemLibrary(name: "CLAPACK", providers: [.apt(["libopenblas-dev"])]),
    .systemLibrary(name: "CDNNL", providers: [.apt(["libdnnl-dev"])]),
    .systemLibrary(name: "COpenMP", providers: [.apt(["libgomp1"])]),
    .systemLibrary(name: "CZlib", providers: [.apt(["zlib1g-dev"])]),

    // MARK: - Engine, lowest layer first
    .target(name: "HalfstepNumerics", dependencies: ["CDNNL", "CLAPACK", "COpenMP"]),
    .target(
      name: "HalfstepGraph",
      dependencies: [
        "HalfstepNumerics",
        .product(name: "OrderedCollections", package: "swift-collections"),
      ]),
    .target(name: "HalfstepRuntime", dependencies: ["HalfstepGraph", "HalfstepNumerics", "CDNNL"]),
    .target(
      name: "ONNXProto",
      dependencies: [.product(name: "SwiftProtobuf", package: "swift-protobuf")],
      exclude: ["Protos", "regenerate.sh", "README.md"]),
    .target(
      name: "HalfstepFormats",
      dependencies: [
        "HalfstepRuntime", "HalfstepGraph", "HalfstepNumerics", "ONNXProto", "CZlib",
        .product(name: "SwiftProtobuf", package: "swift-protobuf"),
        .product(name: "OrderedCollections", package: "swift-collections"),
      ]),
    .target(
      name: "HalfstepAlgorithms",
      dependencies: ["HalfstepRuntime", "HalfstepGraph", "HalfstepNumerics"]),

    // MARK: - Faces
    .target(
      name: "Halfstep",
      dependencies: [
        "HalfstepAlgorithms", "HalfstepFormats", "HalfstepRuntime", "HalfstepGraph",
        "HalfstepNumerics",
      ]),
    .target(
      name: "HalfstepC", dependencies: ["Halfstep", "CHalfstep"],
      exclude: ["Packaging", "exports.map"],
      linkerSettings: [
        staticRuntime,
        .unsafeFlags(
          [
            "-Xlinker", "-soname=libhalfstep.so.0", "-Xlinker", "--no-undefined",
            "-Xlinker",
            "--version-script=\(Context.packageDirectory)/Sources/HalfstepC/exports.map",
          ], .when(platforms: [.linux])),
      ]),
    .executableTarget(
      name: "halfstep",
      dependencies: [
        "Halfstep",
        .product(name: "ArgumentParser", package: "swift-argument-parser"),
      ],
      // The tool runs where no Swift is installed.
      linkerSettings: [staticRuntime]),

    // MARK: - Tests
    .target(
      name: "TestSupport", dependencies: ["HalfstepGraph", "HalfstepNumerics"],
      path: "Tests/TestSupport"),
    .testTarget(
      name: "HalfstepNumericsTests",
      dependencies: ["HalfstepNumerics", "HalfstepFormats", "TestSupport"]),
    .testTarget(
      name: "HalfstepGraphTests", dependencies: ["HalfstepGraph", "TestSupport"],
      exclude: ["Fixtures"]),
    .testTarget(
      name: "HalfstepRuntimeTests",
      dependencies: ["HalfstepRuntime", "HalfstepFormats", "TestSupport"]),
    .testTarget(
      name: "HalfstepFormatsTests",
      dependencies: [
        "HalfstepFormats", "ONNXProto", "TestSupport",
        .product(name: "SwiftProtobuf", package: "swift-protobuf"),
      ]),
    .testTarget(
      name: "HalfstepAlgorithmsTests",
      dependencies: ["HalfstepAlgorithms", "HalfstepFormats", "TestSupport"]),
    .testTarget(name: "HalfstepTests", dependencies: ["Halfstep", "TestSupport"]),
  ],
  swiftLanguageModes: [.v6]
)
