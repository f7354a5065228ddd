// grouped_linear for experts with few rows each: y[M, N] = x[M, K] @ W[N, K]^T, tiles of 8 or 16 rows, on tensor cores
// straight from the packed bytes. Read first: linear.cuh (how a warp multiplies).
//
// Who: a block of 8 warps owns all of M by kTileN = 32 of y and one of `splits` parts of K. Its warps take turns at
//   chunks of 128 k, and their sums are added in order.
// Trick: W goes from memory to registers, 8 bytes a lane and load, a chunk ahead (2 KB a warp, 32 KB an SM in flight);
//   x comes through the L1. Only the table is in shared memory, and the loop has no barrier. Rejected: FMAs without
//   tensor cores (an H200 has 3.2 issue slots a weight at memory speed; decode, convert and FMA take 5); 16 bytes of W
//   a load, which would bring two blocks of one row, with two scales, into one mma.
// Bytes: 0.516 N K, and x from the L2 for each thread block: an H200 (4.3 TB/s) does 4096 x 4096 in 2.0 us.
// Needs: bf16 or fp16, K % 64 == 0, all pointers aligned to 16 bytes.
#pragma once

#include "choose.h"
#include "linear.cuh"

namespace nf4::cuda::small {

constexpr int kWarps = 8;
constexpr int kTileN = kWarpTileN;
constexpr int kChunk = 2;  // blocks of 64 k a warp takes at a time

template <class Scaled>
struct Chunk {
  uint2 words[kChunk][kSlots];
  typename RowScales<Scaled>::Stored scales[kChunk];
};

// A lane's rows of W and x, and its scales. Rows past N and M repeat the last one: their results are not stored. Offsets
// have 32 bits (K < 2^26) and take two registers less a row than pointers.
template <class T, int kTilesM, class Scaled>
struct Lines {
  Lane lane;
  RowScales<Scaled> scales;
  int blocks;  // of 64 k in K
  const uint8_t* packed;
  const uint8_t* x;
  uint32_t w_rows[kSlots], x_rows[kTilesM];  // byte offsets from packed and x

  template <class Work>
  NF4_DEVICE Lines(const ProductArgs& args, const Work& work, int64_t n_begin)
      : scales(work.weight, n_begin, n_begin, lane), blocks(int(work.weight.K / kBlockK)) {
    const int K = int(work.weight.K);
    packed = work.weight.packed + n_begin * (K / 2);
    x = static_cast<const uint8_t*>(args.x) + int64_t(work.m_begin) * K * 2;
    row_offsets(w_rows, work.weight, n_begin, n_begin, lane);
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
      x_rows[m] = (uint32_t(min(8 * m + lane.g, int(work.m_end - work.m_begin) - 1)) * K + 16 * lane.t) * 2;
  }

  // A chunk that reaches past last_block holds it twice; the second copy is not multiplied.
  NF4_DEVICE void load(Chunk<Scaled>& chunk, int first_block, int last_block) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int block = min(first_block + i, last_block);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot)
        chunk.words[i][slot] =
            load_streamed(reinterpret_cast<const uint2*>(packed + (w_rows[slot] + uint32_t(block) * 32)));
      chunk.scales[i] = scales.stored(block, w_rows);
    }
  }

  // The lane's first or second 8 k of a block, in row 8m + g of x.
  NF4_DEVICE uint4 load_x(int block, int m, int half) const {
    return load_cached(reinterpret_cast<const uint4*>(x + (x_rows[m] + uint32_t(block) * kBlockK * 2 + 16 * half)));
  }
};

// What only the epilogue needs waits in shared memory, behind the table, because registers are few.
struct Kept {
  int64_t m_begin, m_end, n_begin;
  int split, expert;
};
constexpr int kSharedBytes = kPairTableBytes + sizeof(Kept);
NF4_DEVICE Kept& kept() { return *reinterpret_cast<Kept*>(shared_memory<unsigned char>() + kPairTableBytes); }

// The epilogue: adds the warps' sums in order and stores y. `scratch` is [kWarps, 8 kTilesM, kTileN]. Lane 4g + t has
// rows 2t and columns g: a shift of 8t puts what a warp stores in 32 banks.
template <class T, int kTilesM, class Work>
NF4_DEVICE void finish(const Sums<kTilesM>& sums, const ProductArgs& args, const Work& work, float* scratch) {
  constexpr int kTileM = 8 * kTilesM;
  const unsigned thread = thread_again();
  const Lane lane(thread);
  float* own = scratch + int(thread) / kWarp * kTileM * kTileN;
  for (int tile = 0; tile < kTilesN; ++tile)
    for (int m = 0; m < kTilesM; ++m)
      for (int i = 0; i < 4; ++i)
        own[(8 * m + 2 * lane.t + i % 2) * kTileN + ((16 * tile + lane.g + 8 * (i / 2)) ^ (8 * lane.t))] =
            sums[tile][m][i];
  sync_block();
  Work own_part = work;
  own_part.split = kept().split;
  own_part.expert = kept().expert;
  const Store<T> store(args, work.weight.N, own_part);
  for (int i = int(threadIdx.x); i < kTileM * kTileN; i += kWarps * kWarp) {
    const int64_t m = kept().m_begin + i / kTileN, n = kept().n_begin + i % kTileN;
    const int at = i ^ i / kTileN / 2 % 4 * 8;
    float total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += scratch[warp * kTileM * kTileN + at];
    if (m < kept().m_end && n < work.weight.N) store.one(m, n, total);
  }
}

// The work of a thread block.
template <class T, int kTilesM, class Scaled, class Work>
NF4_DEVICE void linear_small_block(const ProductArgs& args, const Work& work) {
  const int64_t n_begin = int64_t(work.tile) * kTileN;
  const int warp = int(threadIdx.x) / kWarp;
  const Lines<T, kTilesM, Scaled> lines(args, work, n_begin);
  const Lane& lane = lines.lane;
  const SplitRange chunks(ceil_div(lines.blocks, kChunk), work.split, args.splits);
  constexpr int kStep = kWarps * kChunk;
  const int end = min(int(chunks.end) * kChunk, lines.blocks);
  int first = (int(chunks.begin) + warp) * kChunk;  // the chunk's first block of 64 k
  Chunk<Scaled> next;
  if (first < end) lines.load(next, first, end - 1);

  uint32_t* words = shared_memory<uint32_t>();
  const float factor = build_pair_table<T>(words, args);
  if (threadIdx.x == 0) kept() = {work.m_begin, work.m_end, n_begin, int(work.split), int(work.expert)};
  sync_block();
  const PairTable table(words, lane.index);

  Sums<kTilesM> sums = {};
  if (args.rank > 0 && work.is_first_split() && warp == kWarps - 1)
    add_lora_term<T, kTilesM>(sums, args, work, n_begin, work.m_begin, lane);
  for (; first < end; first += kStep) {
    const Chunk<Scaled> now = next;
    if (first + kStep < end) lines.load(next, first + kStep, end - 1);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int block = first + i;
      if (block >= end) break;
      lines.scales.template multiply<T, kTilesM>(sums, block, now.scales[i], lines.w_rows, now.words[i], table, factor,
                                                 [&](int m, int half) { return lines.load_x(block, m, half); });
    }
  }
  sync_block();  // all have read the table, which the sums overlay
  finish<T, kTilesM>(sums, args, work, shared_memory<float>());
}

static_assert(kGroupedSmallTile.N == kTileN && kGroupedSmallTile.K == kWarps * kChunk * kBlockK, "as chosen");
static_assert(kWarps * kSmallM * kTileN * 4 <= kPairTableBytes, "the warps' sums fit where the table was");

}  // namespace nf4::cuda::small
