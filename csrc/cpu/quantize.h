// quantize: absmax[b] = max |w| over block b; code = rank of w * (1 / max(absmax, 2^-126)) among the levels' midpoints.
//
// Work split   one call does blocks [block_begin, block_end); the caller splits blocks over threads.
// Inner loop   two passes over a block, the second out of L1: max of the absolute bits, then a 4-step binary search.
// The trick    the maximum is taken over the bits as integers, where NaN > inf > every number: one compare a block finds
//              what is not finite. A rank is a code only if the levels ascend; FP4's permutation is one more lookup.
// Bytes        reads 2 (bf16) and writes 0.5 + 4/block_size a weight: 2.56 B at block size 64.
// Needs        code is a permutation of 16 ascending levels.
#pragma once

#include "kernels.h"

namespace nf4 {
namespace {

struct Levels {
  float midpoints[15];
  float code_of_rank[16];  // the codes' integer bits, so that the float lookup moves them
  bool ascending;
  uint8_t zero_code;

  explicit Levels(const float* code) : ascending(true) {
    int order[16];
    for (int i = 0; i < kLevels; ++i) {  // insertion sort by (level, code)
      int j = i;
      for (; j > 0 && code[order[j - 1]] > code[i]; --j) order[j] = order[j - 1];
      order[j] = i;
    }
    int zero_rank = 0;
    for (int i = 0; i < kLevels; ++i) {
      code_of_rank[i] = float_of(uint32_t(order[i]));
      ascending = ascending && order[i] == i;
      if (i < 15) {
        midpoints[i] = (code[order[i]] + code[order[i + 1]]) / 2;
        zero_rank += midpoints[i] < 0.f;
      }
    }
    zero_code = uint8_t(order[zero_rank]);
  }
};

// `count` weights, a multiple of L, with their scale's reciprocal, into count/2 bytes.
template <class T>
void encode(const T* w, int count, float reciprocal, const Levels& levels, const Isa::Ranker& ranker, uint8_t* packed) {
  const Isa::F scale = Isa::set1(reciprocal);
  const Isa::Table codes = Isa::load_table(levels.code_of_rank);
  for (int i = 0; i < count; i += Isa::L) {
    Isa::I rank = ranker.rank(Isa::mul(Isa::load(w + i), scale));
    if (!levels.ascending) rank = Isa::as_bits(Isa::lookup(codes, rank));
    Isa::store_nibbles(packed + i / 2, rank);
  }
}

// `count` weights, a multiple of L; returns absmax, NaN if one of them is not finite.
template <class T>
float encode_block(const T* w, int count, const Levels& levels, const Isa::Ranker& ranker, uint8_t* packed) {
  Isa::I bits = Isa::zero_bits();
  for (int i = 0; i < count; i += Isa::L) bits = Isa::max(bits, Isa::abs_bits(Isa::load(w + i)));
  const uint32_t max_bits = Isa::reduce_max(bits);
  if (max_bits >= 0x7f800000u) {
    std::memset(packed, levels.zero_code << 4 | levels.zero_code, size_t(count / 2));
    return float_of(0x7fc00000u);
  }
  const float absmax = float_of(max_bits);
  encode(w, count, 1.f / (absmax > 0x1p-126f ? absmax : 0x1p-126f), levels, ranker, packed);
  return absmax;
}

template <class T>
void quantize_blocks(const QuantizeArgs& args, int64_t block_begin, int64_t block_end) {
  const Levels levels(args.code);
  const Isa::Ranker ranker(levels.midpoints);
  const T* weight = static_cast<const T*>(args.weight);
  for (int64_t b = block_begin; b < block_end; ++b) {
    const int64_t begin = b * args.block_size;
    if (begin + args.block_size <= args.numel) {
      args.absmax[b] = encode_block(weight + begin, args.block_size, levels, ranker, args.packed + begin / 2);
      continue;
    }
    // The short last block: padded with zeros, whose code also fills an odd tail nibble.
    T padded[kMaxBlockSize];
    uint8_t bytes[kMaxBlockSize / 2];
    const int count = int(args.numel - begin);
    std::memset(static_cast<void*>(padded), 0, sizeof padded);
    std::memcpy(static_cast<void*>(padded), weight + begin, size_t(count) * sizeof(T));
    args.absmax[b] = encode_block(padded, args.block_size, levels, ranker, bytes);
    std::memcpy(args.packed + begin / 2, bytes, size_t((count + 1) / 2));
  }
}

void quantize_range(const QuantizeArgs& args, int64_t block_begin, int64_t block_end) {
  with_type(args.dtype, [&](auto t) { quantize_blocks<decltype(t)>(args, block_begin, block_end); });
}

}  // namespace
}  // namespace nf4
