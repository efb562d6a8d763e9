#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The library exports what the header declares and nothing else, and needs no Swift at run time.
set -eu
stage=$1
library=$stage/lib/libhalfstep.so

# Declarations: names before "(", outside comments and typedefs of callbacks.
declared=$(sed -e 's|//.*||' "$stage/include/halfstep.h" | grep -oE '\bhs_[a-z0-9_]+\(' | tr -d '(' | sort -u)
exported=$(nm -D --defined-only "$library" | awk '{ print $3 }' | sort -u)
if [ "$declared" != "$exported" ]; then
  echo "exports differ from the header:" >&2
  printf '%s\n' "$declared" > /tmp/declared.$$
  printf '%s\n' "$exported" > /tmp/exported.$$
  diff /tmp/declared.$$ /tmp/exported.$$ >&2 || true
  rm -f /tmp/declared.$$ /tmp/exported.$$
  exit 1
fi

for name in $declared; do
  # CHECK_INIT(hs_x_options) calls hs_x_options_init.
  grep -qw "${name%_init}" "$(dirname "$0")"/*.c || { echo "no test calls $name" >&2; exit 1; }
done

unknown=$(ldd -r "$library" 2>&1 | grep -E 'undefined symbol|not found' || true)
[ -z "$unknown" ] || { echo "does not load: $unknown" >&2; exit 1; }

needed=$(readelf -d "$library" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
if echo "$needed" | grep -qiE 'swift|foundation|dispatch'; then
  echo "the library needs the Swift runtime: $needed" >&2
  exit 1
fi
readelf -d "$library" | grep -q 'SONAME.*\[libhalfstep.so.0\]' || { echo "wrong soname" >&2; exit 1; }

echo "exports: $(echo "$exported" | wc -l) names, as declared; needs" $needed
echo "exports: library of $(stat -Lc %s "$library") bytes"
