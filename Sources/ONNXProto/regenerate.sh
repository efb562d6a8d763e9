#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Regenerates Generated/onnx.pb.swift from Protos/onnx.proto; see README.md for the pinned versions.
set -eu
cd "$(dirname "$0")"

plugin_version=1.39.0
protoc_version=3.21.12

found=$(protoc --version | sed 's/^libprotoc //')
[ "$found" = "$protoc_version" ] || { echo "protoc $found found, $protoc_version wanted" >&2; exit 1; }

# PROTOC_GEN_SWIFT names a ready plugin; otherwise it is built once from the pinned tag.
plugin=${PROTOC_GEN_SWIFT:-}
if [ -z "$plugin" ]; then
  source=${SWIFT_PROTOBUF_URL:-https://github.com/apple/swift-protobuf}
  build=${TMPDIR:-/tmp}/halfstep-swift-protobuf-$plugin_version
  [ -d "$build" ] || git clone -q --depth 1 --branch "$plugin_version" "$source" "$build"
  swift build --package-path "$build" -c release --product protoc-gen-swift
  plugin=$(swift build --package-path "$build" -c release --show-bin-path)/protoc-gen-swift
fi
found=$("$plugin" --version | sed 's/^protoc-gen-swift //')
[ "$found" = "$plugin_version" ] || { echo "plugin $found found, $plugin_version wanted" >&2; exit 1; }

protoc --plugin=protoc-gen-swift="$plugin" --swift_opt=Visibility=Package --swift_out=Generated \
  --proto_path=Protos Protos/onnx.proto
sha256sum Protos/onnx.proto Generated/onnx.pb.swift
