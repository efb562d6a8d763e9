#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds and runs the examples in C, C++ and Swift (and Python, if PYTHON can import halfstep) on one
# model and one set of data, and compares what they write, byte for byte.
set -eu
cd "$(dirname "$0")/../.."
root=$PWD
stage=${STAGE:-$root/.build/stage}
out=$root/.build/examples
model=${MODEL:-$root/Tests/CABITests/Fixtures/small.onnx}
data=${DATA:-$root/Tests/CABITests/Fixtures/small.npy}
export PKG_CONFIG_PATH="$stage/lib/pkgconfig" LD_LIBRARY_PATH="$stage/lib"
mkdir -p "$out"
written=

# run NAME COMMAND...: runs an example and remembers where it wrote.
run() {
  name=$1
  shift
  rm -rf "$out/$name"
  mkdir -p "$out/$name"
  "$@" "$model" "$data" "$out/$name" > "$out/$name.log" 2>&1 \
    || { echo "examples: $name failed:" >&2; cat "$out/$name.log" >&2; exit 1; }
  written="$written $name"
}

cc -std=c11 -Wall -Wextra -Werror examples/c/main.c -o "$out/quantize-c" \
  $(pkg-config --cflags --libs halfstep)
run c "$out/quantize-c"
cc -std=c11 -Wall -Wextra -Werror examples/c/compress.c -o "$out/compressor-c" \
  $(pkg-config --cflags --libs halfstep)
run compress-c "$out/compressor-c"

if command -v cmake > /dev/null; then
  cmake -S examples/cpp -B "$out/cpp-build" -DCMAKE_PREFIX_PATH="$stage" > "$out/cmake.log" 2>&1 \
    && cmake --build "$out/cpp-build" >> "$out/cmake.log" 2>&1 \
    || { echo "examples: cmake failed:" >&2; cat "$out/cmake.log" >&2; exit 1; }
  run cpp "$out/cpp-build/quantize"
  run compress-cpp "$out/cpp-build/compress"
else
  echo "examples: no cmake here, C++ is built with pkg-config alone"
  c++ -std=c++17 -Wall -Wextra -Werror examples/cpp/main.cpp -o "$out/quantize-cpp" \
    $(pkg-config --cflags --libs halfstep)
  run cpp "$out/quantize-cpp"
  c++ -std=c++17 -Wall -Wextra -Werror examples/cpp/compress.cpp -o "$out/compressor-cpp" \
    $(pkg-config --cflags --libs halfstep)
  run compress-cpp "$out/compressor-cpp"
fi

swift build -c release -j 2 --package-path examples/swift --scratch-path .build/examples-swift > "$out/swift.log" 2>&1 \
  || { echo "examples: swift build failed:" >&2; tail -n 40 "$out/swift.log" >&2; exit 1; }
run swift .build/examples-swift/release/quantize
run compress-swift .build/examples-swift/release/compress

python=${PYTHON:-}
if [ -n "$python" ] && [ -f examples/python/quantize.py ]; then
  run python "$python" examples/python/quantize.py
  # With data, again from what the first run kept, and without data.
  rm -rf "$out/rounding"
  mkdir -p "$out/rounding"
  for given in "$data" "$data" ""; do
    "$python" examples/python/round_weights.py "$model" "$out/rounding" ${given:+"$given"} \
      > "$out/rounding.log" 2>&1 \
      || { echo "examples: round_weights failed:" >&2; cat "$out/rounding.log" >&2; exit 1; }
  done
else
  echo "examples: Python is skipped: PYTHON does not name an interpreter that has halfstep"
fi

for name in $written; do
  case $name in
    compress-*) first=compress-c files="smaller.onnx smaller.encodings" ;;
    *) first=c files="model.onnx model.encodings model_qdq.onnx" ;;
  esac
  for file in $files; do
    cmp "$out/$first/$file" "$out/$name/$file" \
      || { echo "examples: $file differs between $first and $name" >&2; exit 1; }
  done
done
echo "examples:$written wrote the same bytes: $(sha256sum "$out/c/model.encodings" | cut -c1-16)"
