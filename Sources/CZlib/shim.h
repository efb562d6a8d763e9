// SPDX-License-Identifier: Apache-2.0
// Makes zlib importable from Swift: compressed NPZ archives are deflate streams.
#include <zlib.h>
