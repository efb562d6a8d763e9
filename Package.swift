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
