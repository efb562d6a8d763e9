// SPDX-License-Identifier: Apache-2.0
// Seeded mutations of a byte string, the same everywhere.
#ifndef HALFSTEP_TESTS_MUTATE_H
#define HALFSTEP_TESTS_MUTATE_H

#include <stdint.h>
#include <string.h>

/// Bytes that a mutation may add.
enum { MUTATION_EXTRA = 4096 };

// Xorshift64*: the same mutations for the same seed everywhere.
static uint64_t state;
static uint64_t next(void) {
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545F4914F6CDD1Dull;
}
static size_t below(size_t bound) { return bound == 0 ? 0 : (size_t)(next() % bound); }

static size_t mutate_once(unsigned char *bytes, size_t size) {
  static const unsigned char interesting[] = {0, 1, 2, 3, 7, 8, 0x7F, 0x80, 0xFE, 0xFF};
  if (size == 0) return 0;
  size_t at = below(size);
  switch (below(10)) {
    case 0:
      bytes[at] ^= (unsigned char)(1u << below(8));
      break;
    case 1:
      bytes[at] = (unsigned char)next();
      break;
    case 2:
      bytes[at] = interesting[below(sizeof interesting)];
      break;
    case 3:  // Truncate.
      return at;
    case 4: {  // Remove a piece.
      size_t length = 1 + below(size - at < 64 ? size - at : 64);
      if (length > size - at) length = size - at;
      memmove(bytes + at, bytes + at + length, size - at - length);
      return size - length;
    }
    case 5: {  // Insert a piece from elsewhere.
      size_t length = 1 + below(64);
      size_t from = below(size);
      if (length > size - from) length = size - from;
      unsigned char piece[64];
      memcpy(piece, bytes + from, length);
      memmove(bytes + at + length, bytes + at, size - at);
      memcpy(bytes + at, piece, length);
      return size + length;
    }
    case 6: {  // Overwrite with a piece from elsewhere.
      size_t length = 1 + below(32);
      size_t from = below(size);
      if (length > size - from) length = size - from;
      if (length > size - at) length = size - at;
      memmove(bytes + at, bytes + from, length);
      break;
    }
    case 7: {  // A long varint: a length or a number that is far too large.
      size_t length = 1 + below(9);
      if (length > size - at) length = size - at;
      memset(bytes + at, 0xFF, length);
      bytes[at + length - 1] = 0x01;
      break;
    }
    case 8: {  // A float that is NaN, infinite, tiny or huge.
      static const uint32_t floats[] = {0x7FC00000, 0x7F800000, 0xFF800000, 0x00000001,
                                        0x7F7FFFFF, 0x00000000, 0x80000000};
      if (size - at >= 4) memcpy(bytes + at, &floats[below(7)], 4);
      break;
    }
    default:  // Count up or down.
      bytes[at] = (unsigned char)(bytes[at] + (below(2) ? 1 : -1));
  }
  return size;
}

/// Writes a mutation to `bytes`, which has room for MUTATION_EXTRA + 64 more than the original.
static size_t mutate(const unsigned char *original, size_t original_size, uint64_t seed, long index,
                     unsigned char *bytes) {
  state = seed * 0x9E3779B97F4A7C15ull + (uint64_t)index * 0xD1B54A32D192ED03ull + 1;
  for (int warm = 0; warm < 4; ++warm) next();
  memcpy(bytes, original, original_size);
  size_t size = original_size;
  // Mostly a single change: it leaves more of the original to work with.
  size_t changes = below(4) == 0 ? 1 + below(8) : 1;
  for (size_t change = 0; change < changes && size + 64 < original_size + MUTATION_EXTRA;
       ++change) {
    size = mutate_once(bytes, size);
  }
  return size;
}

#endif
