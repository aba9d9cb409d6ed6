// Attention of one new query for each row of a batch over a long cache of keys: T is 1.
#pragma once
#include "attention.h"

// The keys of each head are divided over `splits` warps; each leaves its part of the answer in `room`,
// (splits, B, H, K + 2): the largest score, the sum of the weights, and the K sums.
struct AttentionDecode {
  Attention forward;
  float* room;
  int32_t splits;
};
