// quantize of int8: scale[b] = max |w| of block b / 127; byte = nearest even of w * (1 / max(max |w|, 2^-126)) * 127.
//
// Work split   As quantize.h.
// Inner loop   Two passes over 1024 weights, as there: a block alone waits for its own maximum and division. L weights
//              are two products and a conversion that rounds.
// Bytes        Reads 2 (bf16) and writes 1 + 4/block_size a weight: 3.06 B at block size 64.
// Needs        Nothing.
#pragma once

#include "decode_int8.h"

namespace nf4::cpu {
namespace {

constexpr float kInt8Most = 127.f;

// `count` weights, a multiple of L, whose largest magnitude is absmax.
template <class T>
void encode_int8(const T* w, int count, float absmax, uint8_t* packed) {
  if (absmax != absmax) {
    std::memset(packed, 0, size_t(count));
    return;
  }
  const Isa::F inverse = Isa::set1(1.f / (absmax > 0x1p-126f ? absmax : 0x1p-126f)), most = Isa::set1(kInt8Most);
  for (int i = 0; i < count; i += Isa::L)
    Isa::store_int8(packed + i, Isa::mul(Isa::mul(Isa::load(w + i), inverse), most));
}

// max |w| of `count` weights, a multiple of 2L; NaN if one of them is not finite.
template <class T>
float absmax_int8(const T* w, int count) {
  const float absmax = Isa::max_abs(w, count);
  return absmax < float_of(0x7f800000u) ? absmax : float_of(0x7fc00000u);
}

// Blocks of `count` weights each, padded with zeros: short ones, or the last one.
template <class T>
void quantize_padded_int8(const QuantizeArgs& args, int64_t block) {
  T padded[kMaxBlockSize];
  uint8_t bytes[kMaxBlockSize];
  const int64_t begin = block * args.block_size, left = args.numel - begin;
  const int64_t count = left < args.block_size ? left : args.block_size;
  const int whole = int(ceil_div(count, 2 * Isa::L) * 2 * Isa::L);
  std::memset(static_cast<void*>(padded + count), 0, size_t(whole - count) * sizeof(T));
  std::memcpy(static_cast<void*>(padded), static_cast<const T*>(args.weight) + begin, size_t(count) * sizeof(T));
  const float absmax = absmax_int8(padded, whole);
  encode_int8(padded, whole, absmax, bytes);
  args.absmax[block] = absmax / kInt8Most;
  std::memcpy(args.packed + begin, bytes, size_t(count));
}

// QuantizeFn.
void quantize_int8(const QuantizeArgs& args, int64_t block_begin, int64_t block_end) {
  constexpr int64_t kGroup = 1024;
  with_type(args.dtype, [&](auto t) {
    using T = decltype(t);
    const T* weight = static_cast<const T*>(args.weight);
    const int size = args.block_size;
    const int64_t whole_blocks = args.numel / size;  // of all
    const int64_t whole_end = size % (2 * Isa::L) != 0   ? block_begin
                              : block_end < whole_blocks ? block_end
                                                         : whole_blocks;
    const int64_t group = size < kGroup ? kGroup / size : 1;
    for (int64_t begin = block_begin; begin < whole_end; begin += group) {
      const int64_t end = begin + group < whole_end ? begin + group : whole_end;
      for (int64_t b = begin; b < end; ++b) args.absmax[b] = absmax_int8(weight + b * size, size);
      for (int64_t b = begin; b < end; ++b) {
        encode_int8(weight + b * size, size, args.absmax[b], args.packed + b * size);
        args.absmax[b] = args.absmax[b] / kInt8Most;
      }
    }
    for (int64_t b = whole_end > block_begin ? whole_end : block_begin; b < block_end; ++b)
      quantize_padded_int8<T>(args, b);
  });
}

}  // namespace
}  // namespace nf4::cpu
