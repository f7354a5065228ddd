// quantize: absmax[b] = max |w| over block b; code = rank of w * (1 / max(absmax, 2^-126)) among the levels' midpoints.
//
// Work split   One call does blocks [block_begin, block_end). The caller splits blocks over threads.
// Inner loop   Two passes over 1024 weights, the second out of L1: the absmax of each block, then the codes.
// The trick    The bucket round(15 a) of a normalised weight holds at most one midpoint, so two lookups by the bucket
//              number give the rank: the midpoint to compare with, and the rank below it (BucketRanker, AVX-512).
//              Levels too close for that take the binary search of the other instruction sets: 4.2 instead of 2.5 ms.
//              Even and odd weights go apart, so that a byte needs no shuffle. The maximum is taken over the bits as
//              integers, where NaN > inf > every number: one compare a block finds what is not finite. A rank is a
//              code only if the levels ascend; FP4's permutation is one more lookup.
// Rejected     One block at a time waits for its own maximum and division: 3.5 instead of 2.5 ms (4096 x 4096 bf16 at
//              block size 64, AVX-512 on one core of a Zen 4 EPYC).
// Bytes        Reads 2 (bf16) and writes 0.5 + 4/block_size a weight: 2.56 B at block size 64, 1.0 ms at the 42 GB/s of
//              copy_; the arithmetic, 38 instructions of 512 bits for 64 weights, takes twice that.
// Needs        code is a permutation of 16 ascending levels.
#pragma once

#include "kernels.h"

namespace nf4::cpu {
namespace {

constexpr int kGroup = 1024;  // weights in one pass: all their absmax, then all their codes

struct Levels {
  float midpoints[15];
  float code_of_rank[16];  // the bits of integers, so that the lookup of floats can move them
  bool is_ascending;
  uint8_t zero_code;

  explicit Levels(const float* code) : is_ascending(true) {
    int order[16];
    for (int i = 0; i < kLevels; ++i) {  // insertion sort by (level, code)
      int j = i;
      for (; j > 0 && code[order[j - 1]] > code[i]; --j) order[j] = order[j - 1];
      order[j] = i;
    }
    int zero_rank = 0;
    for (int i = 0; i < kLevels; ++i) {
      code_of_rank[i] = float_of(uint32_t(order[i]));
      is_ascending = is_ascending && order[i] == i;
      if (i < 15) {
        midpoints[i] = (code[order[i]] + code[order[i + 1]]) / 2;
        zero_rank += midpoints[i] < 0.f;
      }
    }
    zero_code = uint8_t(order[zero_rank]);
  }
};

// `count` weights, a multiple of 2L, with their absmax, into count/2 bytes.
template <class T, class Ranker>
void encode_block(const T* w, int count, float absmax, const Levels& levels, Ranker ranker, uint8_t* packed) {
  if (absmax != absmax) {
    std::memset(packed, levels.zero_code << 4 | levels.zero_code, size_t(count / 2));
    return;
  }
  const Isa::F scale = Isa::set1(1.f / (absmax > 0x1p-126f ? absmax : 0x1p-126f));
  const Isa::Table codes = Isa::load_table(levels.code_of_rank);
  for (int i = 0; i < count; i += 2 * Isa::L) {
    Isa::F even, odd;
    Isa::load_pairs(w + i, even, odd);
    Isa::I even_code = ranker.rank(Isa::mul(even, scale)), odd_code = ranker.rank(Isa::mul(odd, scale));
    if (!levels.is_ascending) {
      even_code = Isa::as_bits(Isa::lookup(codes, even_code));
      odd_code = Isa::as_bits(Isa::lookup(codes, odd_code));
    }
    Isa::store_nibbles(packed + i / 2, even_code, odd_code);
  }
}

// max |w| of `count` weights, a multiple of 2L; NaN if one of them is not finite.
template <class T>
float block_absmax(const T* w, int count) {
  const float absmax = Isa::max_abs(w, count);
  return absmax < float_of(0x7f800000u) ? absmax : float_of(0x7fc00000u);
}

// Whole blocks shorter than 2L, each padded with zeros.
template <class T, class Ranker>
void quantize_short_blocks(const QuantizeArgs& args, const Levels& levels, Ranker ranker, int64_t block_begin,
                           int64_t block_end) {
  const T* weight = static_cast<const T*>(args.weight);
  T padded[2 * Isa::L] = {};
  uint8_t bytes[Isa::L];
  for (int64_t b = block_begin; b < block_end; ++b) {
    std::memcpy(static_cast<void*>(padded), weight + b * args.block_size, size_t(args.block_size) * sizeof(T));
    args.absmax[b] = block_absmax(padded, 2 * Isa::L);
    encode_block(padded, 2 * Isa::L, args.absmax[b], levels, ranker, bytes);
    std::memcpy(args.packed + b * args.block_size / 2, bytes, size_t(args.block_size / 2));
  }
}

// Whole blocks. `ranker` by value: its tables stay in registers, where a reference could alias what is stored.
template <class T, class Ranker>
void quantize_blocks(const QuantizeArgs& args, const Levels& levels, Ranker ranker, int64_t block_begin,
                     int64_t block_end) {
  const T* weight = static_cast<const T*>(args.weight);
  const int size = args.block_size;
  if (size < 2 * Isa::L) return quantize_short_blocks<T>(args, levels, ranker, block_begin, block_end);
  const int64_t group = size < kGroup ? kGroup / size : 1;
  for (int64_t begin = block_begin; begin < block_end; begin += group) {
    const int64_t end = begin + group < block_end ? begin + group : block_end;
    for (int64_t b = begin; b < end; ++b) args.absmax[b] = block_absmax(weight + b * size, size);
    for (int64_t b = begin; b < end; ++b)
      encode_block(weight + b * size, size, args.absmax[b], levels, ranker, args.packed + b * size / 2);
  }
}

// The short last block, padded with zeros; the code of zero also fills an odd tail nibble.
template <class T, class Ranker>
void quantize_tail(const QuantizeArgs& args, const Levels& levels, Ranker ranker) {
  T padded[kMaxBlockSize];
  uint8_t bytes[kMaxBlockSize / 2];
  const int64_t block = args.numel / args.block_size, begin = block * args.block_size, count = args.numel - begin;
  std::memset(static_cast<void*>(padded), 0, sizeof padded);
  std::memcpy(static_cast<void*>(padded), static_cast<const T*>(args.weight) + begin, size_t(count) * sizeof(T));
  QuantizeArgs tail = args;
  tail.weight = padded;
  tail.packed = bytes;
  tail.absmax = args.absmax + block;
  quantize_blocks<T>(tail, levels, ranker, 0, 1);
  std::memcpy(args.packed + begin / 2, bytes, size_t((count + 1) / 2));
}

void quantize_range(const QuantizeArgs& args, int64_t block_begin, int64_t block_end) {
  const Levels levels(args.code);
  const bool has_short_last = block_end * args.block_size > args.numel;
  Isa::with_ranker(levels.midpoints, [&](const auto& ranker) {
    with_type(args.dtype, [&](auto t) {
      quantize_blocks<decltype(t)>(args, levels, ranker, block_begin, block_end - has_short_last);
      if (has_short_last) quantize_tail<decltype(t)>(args, levels, ranker);
    });
  });
}

}  // namespace
}  // namespace nf4::cpu
