// linear for few rows of x: y[M, N] = x[M, K] @ W[N, K]^T, M <= 16, on tensor cores straight from the packed bytes.
//
// Who: a block of 8 warps owns 32 rows of W and one of `splits` parts of K; its warps take turns at chunks of 128 k, and
//   their sums are added in order. How a warp multiplies: linear.cuh.
// Trick: W goes from memory to registers, 8 bytes a lane and load, a chunk ahead (2 KB a warp, 32 KB an SM on their way),
//   x comes through the L1: nothing but the table is in shared memory and no barrier is in the loop. Rejected: FMAs
//   without tensor cores (an H200 has 3.2 issue slots a weight at memory speed; decode, convert and FMA take 5); 16 bytes
//   of W a load, which would bring two blocks of one row, with two scales, into one mma.
// Bytes: 0.516 N K, and x from the L2 for each block of threads: an H200 (4.3 TB/s) does 4096 x 4096 in 2.0 us.
// Needs: bf16 or fp16, has_whole_codes(weight), all pointers aligned to 16 bytes.
#pragma once

#include "choose.h"
#include "linear.cuh"

namespace nf4::cuda::small {

constexpr int kWarps = 8;
constexpr int kChunk = 2;  // blocks of 64 k a warp takes at a time

struct Chunk {
  uint2 words[kChunk][kSlots];
  uint32_t scales[kChunk];  // as stored
};

// A lane's rows of W, tokens of x and scale. Rows beyond N and M are the last row's: what comes of them is not stored.
// Offsets have 32 bits (K < 2^26), two registers less a row than pointers.
template <class T, int kTokenTiles>
struct Lines {
  Lane lane;
  RowScale scale;
  int blocks;  // of 64 k in a row
  const uint8_t* packed;
  const uint8_t* x;
  uint32_t rows[kSlots], tokens[kTokenTiles];  // bytes from packed and x

  template <class Work>
  NF4_DEVICE Lines(const ProductArgs& args, const Work& work, int64_t first_row)
      : scale(work.weight, first_row, lane), blocks(int(work.weight.K / kBlockK)) {
    const int K = int(work.weight.K), last_row = int(smaller(work.weight.N - first_row, kWarpRows)) - 1;
    packed = work.weight.packed + first_row * (K / 2);
    x = static_cast<const uint8_t*>(args.x) + int64_t(work.row) * K * 2;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      rows[slot] = uint32_t(min(lane.g + 8 * slot, last_row)) * (K / 2) + 8 * lane.t;
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m)
      tokens[m] = (uint32_t(min(8 * m + lane.g, int(work.end - work.row) - 1)) * K + 16 * lane.t) * 2;
  }

  NF4_DEVICE void load(Chunk& chunk, int first_block, int last_block) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int block =
          min(first_block + i, last_block);  // an odd last chunk has the last block twice, and uses it once
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot)
        chunk.words[i][slot] =
            load_streamed(reinterpret_cast<const uint2*>(packed + (rows[slot] + uint32_t(block) * 32)));
      chunk.scales[i] = scale.stored(block);
    }
  }

  // Of token 8m + g, the lane's first or second 8 k of a block.
  NF4_DEVICE uint4 tokens_of(int block, int m, int half) const {
    return load_cached(reinterpret_cast<const uint4*>(x + (tokens[m] + uint32_t(block) * kBlockK * 2 + 16 * half)));
  }
};

// What only the end needs, where the sums do not reach: registers are few.
struct Kept {
  int64_t row, end;   // of x
  int64_t first_row;  // of W
};
constexpr int kSharedBytes = kPairTableBytes + sizeof(Kept);
NF4_DEVICE Kept& kept() { return *reinterpret_cast<Kept*>(shared_memory<unsigned char>() + kPairTableBytes); }

// Adds the warps' sums in order and stores them; `scratch` [kWarps, 8 kTokenTiles, kWarpRows].
template <class T, int kTokenTiles, class Work>
NF4_DEVICE void finish(const Sums<kTokenTiles>& sums, const ProductArgs& args, const Work& work, const Lane& lane,
                       float* scratch) {
  constexpr int kTokens = 8 * kTokenTiles;
  float* own = scratch + int(threadIdx.x) / kWarp * kTokens * kWarpRows;
  for (int tile = 0; tile < kRowTiles; ++tile)
    for (int m = 0; m < kTokenTiles; ++m)
      for (int i = 0; i < 4; ++i)
        own[(8 * m + 2 * lane.t + i % 2) * kWarpRows + 16 * tile + lane.g + 8 * (i / 2)] = sums[tile][m][i];
  sync_block();
  const Store<T> store(args, work.weight.N, work.split);
  for (int i = int(threadIdx.x); i < kTokens * kWarpRows; i += kWarps * kWarp) {
    const int64_t token = kept().row + i / kWarpRows, row = kept().first_row + i % kWarpRows;
    float total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += scratch[warp * kTokens * kWarpRows + i];
    if (token < kept().end && row < work.weight.N) store.one(token, row, total);
  }
}

// The work of a block of threads.
template <class T, int kTokenTiles, class Work>
NF4_DEVICE void linear_small_block(const ProductArgs& args, const Work& work) {
  const int64_t first_row = int64_t(work.column_tile) * kWarpRows;
  const int warp = int(threadIdx.x) / kWarp;
  const Lines<T, kTokenTiles> lines(args, work, first_row);
  const Lane& lane = lines.lane;
  const Part chunks(ceil_div(lines.blocks, kChunk), work.split, args.splits);
  constexpr int kStep = kWarps * kChunk;
  const int end = min(int(chunks.end) * kChunk, lines.blocks);
  int first = (int(chunks.begin) + warp) * kChunk;  // of the chunk's blocks
  Chunk next;
  if (first < end) lines.load(next, first, end - 1);

  uint32_t* words = shared_memory<uint32_t>();
  const float factor = build_pair_table<T>(words, args);
  if (threadIdx.x == 0) kept() = {work.row, work.end, first_row};
  sync_block();
  const PairTable table(words, lane.index);

  Sums<kTokenTiles> sums = {};
  if (work.rank > 0 && work.split == 0 && warp == kWarps - 1)
    add_low_rank<T, kTokenTiles>(sums, args, first_row, work.row, lane);
  for (; first < end; first += kStep) {
    const Chunk now = next;
    if (first + kStep < end) lines.load(next, first + kStep, end - 1);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int block = first + i;
      if (block >= end) break;
      const float scale = lines.scale.decode(block, now.scales[i], factor);
      multiply_block<T, kTokenTiles>(sums, now.words[i], scale, table,
                                     [&](int m, int half) { return lines.tokens_of(block, m, half); });
    }
  }
  sync_block();  // the last reader of the table, whose memory the sums take
  finish<T, kTokenTiles>(sums, args, work, lane, shared_memory<float>());
}

static_assert(kLinearSmallTile.columns == kWarpRows && kLinearSmallTile.step == kWarps * kChunk * kBlockK, "as chosen");
static_assert(kWarps * kSmallRows * kWarpRows * 4 <= kPairTableBytes, "the warps' sums fit where the table was");

}  // namespace nf4::cuda::small
