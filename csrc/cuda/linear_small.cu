// linear for few rows of x: y[M, N] = x[M, K] @ W[N, K]^T, M <= 16, on tensor cores straight from the packed bytes.
// Read first: linear.cuh (how a warp multiplies), pair_table.cuh, arrivals.cuh.
//
// Who: one thread block a multiprocessor. The work is units of 32 n (M > 8: 64 n) by 128 k, one row of tiles after the
//   other:
//
//   units     | tile 0                  | tile 1                  | tile 2                  |
//   shares    | block 0          | block 1          | block 2         | block 3             |     equal to one unit
//
//   Unit u is of warp u % 16 of a block's 16, or with M > 8 of the warps u % 8, each of which has 32 n (half so many
//   warps where a block has 99 KB). A tile that ends in one share is y; of a cut tile each block stores its part, and
//   the last one to arrive adds the parts in the order of blocks. Without counters a second launch does so, with the
//   same bits.
// Trick: each warp has a ring of copies to shared memory, which runs through the ends of tiles: 64 KB in flight (16 KB
//   with 99 KB) from before the table is built until the share ends. Only the end of a tile has barriers. 2.5 (M <= 8)
//   to 2.8 instructions a weight. Rejected: FMAs without tensor cores (an H200 has 3.2 issue slots a weight at memory
//   speed; decode, convert and FMA take 5); a thread block a tile of 32 n and split, with loads to registers (2.8 to
//   3.3 instructions, a wait for memory a chunk of 128 k, two launches at 4096 x 4096, 344 tiles on 264 resident blocks
//   at 11008 x 4096, and 16 rows of x from the L2 for every 32 n); 64 k a unit (2.9: the ring and the walk take 60
//   instructions a unit); 16 bytes of W a lane from shared memory, which would bring two blocks of one row, with two
//   scales, into one mma.
// Bytes: 0.516 N K; from the L2 x once a tile, and 4 bytes, written and read, for each part of an element of y in a cut
//   tile: an H200 (4.3 TB/s) does 4096 x 4096 in 2.0 us.
// Needs: bf16 or fp16, K % 64 == 0, all pointers aligned to 16 bytes.
#include "arrivals.cuh"
#include "choose.h"
#include "linear.cuh"

namespace nf4::cuda {
namespace {

constexpr int kUnitBlocks = kSmallUnitK / kBlockK;     // of 64 k
constexpr int kStageBlock = kWarpTileN * kBlockK / 2;  // a warp's bytes of one of them
constexpr int kStageBytes = kUnitBlocks * kStageBlock;

// A thread block: warps along k, and stages of each warp's ring. Shared memory holds the table, in whose gaps of 128
// bytes each warp keeps its sums, then the rings, then a word.
template <int kAcrossN, int kAlongK, int kRingStages>
struct Shape {
  static constexpr int kWarpsN = kAcrossN, kWarpsK = kAlongK, kStages = kRingStages, kTileN = kWarpsN * kWarpTileN;
  static constexpr int kWarps = kWarpsN * kWarpsK, kThreads = kWarps * kWarp;
  static constexpr int kWord = kWidePairTableBytes + kWarps * kStages * kStageBytes, kSharedBytes = kWord + 16;
  static_assert(kWarps * kSmallM <= 256, "every warp's sums have a gap for each row of x");
};
template <int kTilesM>
using Deep = Shape<kTilesM, 16 / kTilesM, 3>;
template <int kTilesM>
using Shallow = Shape<kTilesM, 8 / kTilesM, 2>;  // for 99 KB

// The units of a launch, and which block has them.
struct Shares {
  int blocks;  // that share the units out
  int depth;   // units a tile
  int tile_n;
  uint32_t units;
  NF4_HOST_DEVICE explicit Shares(const ProductArgs& args)
      : blocks(args.blocks),
        depth(int(ceil_div(args.weight.K, kSmallUnitK))),
        tile_n(small_tile_n(args.M)),
        units(uint32_t(ceil_div(args.weight.N, tile_n)) * uint32_t(depth)) {}

  NF4_HOST_DEVICE int begin(int block) const { return int(uint64_t(units) * unsigned(block) / unsigned(blocks)); }
  NF4_HOST_DEVICE int block_of(int unit) const { return int((uint64_t(unit + 1) * unsigned(blocks) - 1) / units); }
};

// How a warp goes through its units. Blocks of 64 k are numbered through W; those of rows past N are past `last`.
template <class S>
struct Walk {
  int at, depth;       // the unit, of its tile's
  uint32_t next_tile;  // from a tile's end to the same row of the next one, in blocks
  NF4_DEVICE Walk(const Weight& w, int unit, int depth)
      : at(unit % depth),
        depth(depth),
        next_tile(uint32_t(w.K / kBlockK) * S::kTileN - uint32_t(depth * kUnitBlocks)) {}
  // To the next unit; how many blocks that is away.
  NF4_DEVICE uint32_t advance() {
    uint32_t away = S::kWarpsK * kUnitBlocks;
    for (at += S::kWarpsK; at >= depth; at -= depth) away += next_tile;
    return away;
  }
};
// The first block of a unit in row `row` of its tile.
template <class S>
NF4_DEVICE uint32_t first_block_of(const Weight& w, int unit, int depth, int row) {
  return (uint32_t(unit / depth) * S::kTileN + uint32_t(row)) * uint32_t(w.K / kBlockK) +
         uint32_t(unit % depth * kUnitBlocks);
}
NF4_DEVICE uint32_t last_block(const Weight& w) { return uint32_t(w.N * (w.K / kBlockK)) - 1; }

// The place of a warp's sum in the gaps. Lane 4g + t has m = 2t and n = g: the shift by t puts its sums in 32 banks.
template <int kTilesM>
NF4_DEVICE float& kept_sum(int warp, int m, int n) {
  return shared_memory<float>()[(warp * 8 * kTilesM + m) * kWidePairTableRow + 32 + (n ^ (m / 2 % 4 * 8))];
}

// Stores a warp's sums, or adds them to what is there, and sets them to 0.
template <int kTilesM>
NF4_DEVICE void keep(Sums<kTilesM>& sums, bool adds) {
  const unsigned thread = thread_again();
  const Lane lane(thread);
  const int warp = int(thread) / kWarp;
#pragma unroll
  for (int n = 0; n < kTilesN; ++n)
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& kept = kept_sum<kTilesM>(warp, 8 * m + 2 * lane.t + i % 2, 16 * n + lane.g + 8 * (i / 2));
        kept = adds ? kept + sums[n][m][i] : sums[n][m][i];
        sums[n][m][i] = 0;
      }
}

// A warp's copies of W, kStages - 1 units ahead: of each block of 64 k 32 rows of 32 bytes, 16 bytes a lane and copy.
template <class S>
struct Ring {
  Walk<S> walk;            // is at the next unit to copy
  int left;                // units to copy, the other warps' between them too
  int blocks;              // of 64 k in K
  uint32_t last, rows[2];  // the unit's first block in the two rows of the lane
  const uint8_t* packed;
  unsigned char* stages;
  int slot = 0;  // of the unit that is multiplied

  NF4_DEVICE Ring(const Weight& w, int unit, int end, int depth, int warp, const Lane& lane)
      : walk(w, unit, depth),
        left(end - unit),
        blocks(int(w.K / kBlockK)),
        last(last_block(w)),
        packed(w.packed + lane.index % 2 * 16),
        stages(shared_memory<unsigned char>() + kWidePairTableBytes + warp * S::kStages * kStageBytes) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      rows[i] = first_block_of<S>(w, unit, depth, warp / S::kWarpsK * kWarpTileN + lane.index / 2 + 16 * i);
#pragma unroll
    for (int stage = 0; stage < S::kStages - 1; ++stage) fetch(stage, lane);
  }

  NF4_DEVICE void fetch(int stage, const Lane& lane) {
    if (left > 0) {
      unsigned char* to = stages + stage * kStageBytes + 16 * lane.index;
      const bool is_whole = walk.at * kUnitBlocks + 1 < blocks;
      const uint32_t away = walk.advance();
      left -= S::kWarpsK;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // A row past N gets the last one's bytes: its results are not stored.
        const uint8_t* from = packed + int64_t(min(rows[i], last)) * (kBlockK / 2);
        copy_async_16(to + i * kStageBlock / 2, from);
        if (is_whole) copy_async_16(to + i * kStageBlock / 2 + kStageBlock, from + kBlockK / 2, rows[i] < last);
        rows[i] += away;
      }
    }
    copy_async_commit();
  }

  // The lane's words of the next unit, kWarp to a slot; copies another unit in place of the one before it.
  NF4_DEVICE const uint2* next(const Lane& lane) {
    copy_async_wait<S::kStages - 2>();
    sync_warp();  // all lanes' copies have come, and all have read the unit before
    fetch(slot == 0 ? S::kStages - 1 : slot - 1, lane);
    const uint2* words = reinterpret_cast<const uint2*>(stages + slot * kStageBytes) + lane.index;
    slot = slot == S::kStages - 1 ? 0 : slot + 1;
    return words;
  }
};

// The scales of a warp's units, loaded a unit ahead of their use. Those of rows past N are the last one's.
template <class S, class Scaled>
struct UnitScales;

template <class S>
struct UnitScales<S, ScaledSums> {
  struct Stored {
    uint32_t codes[kUnitBlocks];
    float superscales[kUnitBlocks];
  };
  const Weight& w;
  Walk<S> walk;          // is at the next unit to load
  uint32_t first, last;  // its first block in the lane's row: lane 4g + t has row g + 8t
  float offset;
  NF4_DEVICE UnitScales(const Weight& w, int unit, int depth, int row, const Lane& lane)
      : w(w),
        walk(w, unit, depth),
        first(first_block_of<S>(w, unit, depth, row + lane.g + 8 * lane.t)),
        last(last_block(w)),
        offset(offset_of(w)) {}

  NF4_DEVICE Stored next() {
    Stored stored;
#pragma unroll
    for (int j = 0; j < kUnitBlocks; ++j) {
      const uint32_t index = min(first + uint32_t(j), last) >> (w.block_shift - 6);
      if (w.scales == Scales::kDouble) {
        stored.codes[j] = load_cached(w.absmax_as<uint8_t>() + index);
        stored.superscales[j] = load_cached(w.scale_absmax + (index >> kSuperblockShift));
      } else {
        stored.codes[j] = bits_of(load_cached(w.absmax_as<float>() + index));
      }
    }
    first += walk.advance();
    return stored;
  }

  // sums += W[32 n, 64 k] @ x^T for block j of a unit.
  template <class T, int kTilesM, class LoadX>
  NF4_DEVICE void multiply(Sums<kTilesM>& sums, int j, const Stored& stored, const uint2 (&words)[kSlots],
                           const WidePairTable& table, float factor, LoadX&& load_x) const {
    float scale = float_of(stored.codes[j]);
    if (w.scales == Scales::kDouble) {
      const float product = load_cached(w.scale_code + stored.codes[j]) * stored.superscales[j];
      scale = product + offset;
    }
    Sums<kTilesM> part = {};
    multiply_block<T, kTilesM>(part, words, table, [](uint32_t pair, int) { return pair; }, load_x);
    add_scaled<kTilesM>(sums, part, scale * factor);
  }
};

template <class S>
struct UnitScales<S, ScaledLevels> {
  struct Stored {
    StoredScales<kSlots> of[kUnitBlocks];
    uint32_t first;  // of row g
  };
  const Weight& w;
  Walk<S> walk;
  uint32_t first[kSlots], last;  // in 16 k: the lane's own of the unit in its rows, g + 8 slot; the last of W
  float offset;
  NF4_DEVICE UnitScales(const Weight& w, int unit, int depth, int row, const Lane& lane)
      : w(w), walk(w, unit, depth), last(last_block(w) * 4 + 3), offset(offset_of(w)) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      first[slot] = first_block_of<S>(w, unit, depth, row + lane.g + 8 * slot) * 4 + uint32_t(lane.t);
  }

  NF4_DEVICE uint32_t index(uint32_t first, int j) const {
    return min(first + uint32_t(4 * j), last) >> (w.block_shift - 4);
  }
  NF4_DEVICE Stored next() {
    Stored stored;
    stored.first = first[0];
#pragma unroll
    for (int j = 0; j < kUnitBlocks; ++j)
      stored.of[j] = load_scales<kSlots>(w, w.scales, [&](int slot) { return index(first[slot], j); });
    const uint32_t away = 4 * walk.advance();
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) first[slot] += away;
    return stored;
  }

  template <class T, int kTilesM, class LoadX>
  NF4_DEVICE void multiply(Sums<kTilesM>& sums, int j, const Stored& stored, const uint2 (&words)[kSlots],
                           const WidePairTable& table, float factor, LoadX&& load_x) const {
    float values[kSlots];
    decode_scales(values, w, w.scales, stored.of[j], offset,
                  [&](int slot) { return index(stored.first + uint32_t(32 * slot) * uint32_t(w.K / kBlockK), j); });
    ScalePair<T> scales[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) scales[slot] = ScalePair<T>(values[slot] * factor, values[slot] * factor);
    multiply_block<T, kTilesM>(
        sums, words, table, [&](uint32_t pair, int slot) { return scales[slot].times(pair); }, load_x);
  }
};

// A cut tile's part [M, 64] of this block: a block has at most two, that which its share begins with and the last.
NF4_DEVICE float* part_of(const ProductArgs& args, const Shares& shares, int block, int tile) {
  const bool is_last = shares.begin(block) < tile * shares.depth;
  return args.partial + int64_t(2 * block + is_last) * args.M * shares.tile_n;
}

template <class T>
NF4_DEVICE void store_sum(const ProductArgs& args, int m, uint32_t n, float sum) {
  if (n >= args.weight.N) return;
  if (args.bias != nullptr) sum += to_float(static_cast<const T*>(args.bias)[n]);
  static_cast<T*>(args.out)[m * args.weight.N + n] = from_float<T>(sum);
}

// y of a cut tile whose parts are those of blocks first to last: their sum, in order.
template <class T>
NF4_DEVICE void join_parts(const ProductArgs& args, const Shares& shares, int tile, int first, int last) {
  constexpr int kAtOnce = 8;  // loads in flight
  for (int i = int(threadIdx.x); i < int(args.M) * shares.tile_n; i += int(blockDim.x)) {
    float sum = 0;
    for (int begin = first; begin <= last; begin += kAtOnce) {
      float parts[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (begin + j <= last) parts[j] = load_l2(part_of(args, shares, begin + j, tile) + i);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (begin + j <= last) sum += parts[j];
    }
    store_sum<T>(args, i / shares.tile_n, uint32_t(tile) * unsigned(shares.tile_n) + uint32_t(i % shares.tile_n), sum);
  }
}

// The end of a tile: its warps' sums, added in order, are y or this block's part of it.
template <class T, int kTilesM, class S>
NF4_DEVICE void finish_tile(const ProductArgs& args, const Shares& shares, int tile) {
  const int first = shares.block_of(tile * shares.depth), last = shares.block_of((tile + 1) * shares.depth - 1);
  float* part = first == last ? nullptr : part_of(args, shares, int(blockIdx.x), tile);
  sync_block();
  for (int i = int(thread_again()); i < int(args.M) * S::kTileN; i += S::kThreads) {
    const int m = i / S::kTileN, n = i % S::kTileN;
    float sum = 0;
    for (int warp = 0; warp < S::kWarpsK; ++warp)
      sum += kept_sum<kTilesM>(n / kWarpTileN * S::kWarpsK + warp, m, n % kWarpTileN);
    if (part == nullptr)
      store_sum<T>(args, m, uint32_t(tile) * S::kTileN + uint32_t(n), sum);
    else
      part[i] = sum;
  }
  if (part != nullptr && args.arrivals >= 0 &&
      is_last_to_arrive(args.arrivals, first, last - first + 1, shared_memory<uint32_t>() + S::kWord / 4))
    join_parts<T>(args, shares, tile, first, last);
  sync_block();  // all have read the warps' sums
}

template <class T, int kTilesM, class Scaled, class S>
__global__ void __launch_bounds__(S::kThreads, 1) linear_small_kernel(const ProductArgs args) {
  if constexpr (S::kSharedBytes > kMostShared) return device_assert(false, "linear_small needs more shared memory");
  // Units to a sum: 512 terms, or mma's.
  constexpr int kLongest = S::kWarpsK * (kScalesSums<Scaled> ? 512 / kUnitBlocks : 128 / kUnitBlocks);
  const Weight& w = args.weight;
  const Shares shares(args);
  const Lane lane;
  const int warp = int(threadIdx.x) / kWarp, depth = shares.depth;
  const int begin = shares.begin(int(blockIdx.x)), end = shares.begin(int(blockIdx.x) + 1);
  int unit = begin + ((warp - begin) & (S::kWarpsK - 1));  // the warp's next
  Ring<S> ring(w, unit, end, depth, warp, lane);
  UnitScales<S, Scaled> scales(w, unit, depth, warp / S::kWarpsK * kWarpTileN, lane);
  auto next_scales = scales.next();

  uint32_t* words = shared_memory<uint32_t>();
  const float factor = build_pair_table<T, kWidePairTableRow>(words, args);
  sync_block();
  const WidePairTable table(words, lane.index);

  uint32_t x_rows[kTilesM];  // byte offsets; rows past M repeat the last one
#pragma unroll
  for (int m = 0; m < kTilesM; ++m)
    x_rows[m] = (uint32_t(min(8 * m + lane.g, int(args.M) - 1)) * uint32_t(w.K) + 16 * lane.t) * 2;

  for (int tile = begin / depth; tile * depth < end; ++tile) {
    const int tile_end = min(end, (tile + 1) * depth);
    // The LoRA term waits where the sums will be kept, so that it takes no registers in the loop.
    bool has_kept = args.rank > 0 && begin <= tile * depth && warp % S::kWarpsK == S::kWarpsK - 1;
    if (has_kept) {
      Sums<kTilesM> term = {};
      add_lora_term<T, kTilesM>(term, args, Work<int64_t>{w, tile, 0, args.M, 0, 0},
                                int64_t(tile) * S::kTileN + warp / S::kWarpsK * kWarpTileN, 0, lane);
      keep<kTilesM>(term, false);
    }
    Sums<kTilesM> sums = {};
    while (true) {
      const int stop = min(tile_end, unit + kLongest);
#pragma unroll 1
      for (; unit < stop; unit += S::kWarpsK) {
        const uint2* packed = ring.next(lane);
        const auto stored = next_scales;
        next_scales = scales.next();
        const int first_block = (unit - tile * depth) * kUnitBlocks;
        const uint8_t* x = static_cast<const uint8_t*>(args.x) + uint32_t(first_block) * kBlockK * 2;
#pragma unroll
        for (int j = 0; j < kUnitBlocks; ++j) {
          if (j > 0 && first_block + j >= ring.blocks) break;
          uint2 own[kSlots];
#pragma unroll
          for (int slot = 0; slot < kSlots; ++slot) own[slot] = packed[j * kStageBlock / 8 + slot * kWarp];
          scales.template multiply<T, kTilesM>(sums, j, stored, own, table, factor, [&](int m, int half) {
            return load_cached(reinterpret_cast<const uint4*>(x + x_rows[m] + j * kBlockK * 2 + 16 * half));
          });
        }
      }
      keep<kTilesM>(sums, has_kept);
      if (unit >= tile_end) break;
      has_kept = true;
    }
    finish_tile<T, kTilesM, S>(args, shares, tile);
  }
}

// Without arrival counters: block b joins the parts of the cut tile that begins in its share.
template <class T>
__global__ void __launch_bounds__(256) linear_small_join_kernel(const ProductArgs args) {
  const Shares shares(args);
  const int block = int(blockIdx.x), tile = (shares.begin(block + 1) - 1) / shares.depth;
  const int first = shares.block_of(tile * shares.depth), last = shares.block_of((tile + 1) * shares.depth - 1);
  if (first == block && last > block) join_parts<T>(args, shares, tile, first, last);
}

template <class T, int kTilesM, class Scaled>
cudaError_t launch_tile(const ProductArgs& args, cudaStream_t stream) {
  int limit;
  const cudaError_t error = shared_limit(&limit);
  if (error != cudaSuccess) return error;
  const auto launch_shape = [&](auto shape) {
    using S = decltype(shape);
    return launch(linear_small_kernel<T, kTilesM, Scaled, S>, dim3(unsigned(args.blocks)), S::kThreads, S::kSharedBytes,
                  stream, args);
  };
  return limit >= Deep<kTilesM>::kSharedBytes ? launch_shape(Deep<kTilesM>()) : launch_shape(Shallow<kTilesM>());
}

template <class T>
cudaError_t launch_for(const ProductArgs& args, cudaStream_t stream) {
  const cudaError_t error = launch_scaled(args.weight, [&](auto scaled) {
    using Scaled = decltype(scaled);
    return args.M <= 8 ? launch_tile<T, 1, Scaled>(args, stream) : launch_tile<T, 2, Scaled>(args, stream);
  });
  if (error != cudaSuccess || args.arrivals >= 0 || !small_is_cut(args.M, args.weight.N, args.blocks)) return error;
  return launch(linear_small_join_kernel<T>, dim3(unsigned(args.blocks)), 256, 0, stream, args);
}

static_assert(Shallow<1>::kSharedBytes <= 99 << 10 && Shallow<2>::kSharedBytes <= 99 << 10, "every card has so much");
static_assert(Deep<1>::kTileN == small_tile_n(8) && Deep<2>::kTileN == small_tile_n(kSmallM), "as chosen");
static_assert(kSmallMostBlocks <= kArrivals, "a block has a counter for the tile that is cut at its end");

}  // namespace

cudaError_t linear_small(const ProductArgs& args, cudaStream_t stream) {
  return args.dtype == Dtype::kBFloat16 ? launch_for<BFloat16>(args, stream) : launch_for<Float16>(args, stream);
}

}  // namespace nf4::cuda
