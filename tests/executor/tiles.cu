// Loads of csrc/cuda/tile.cuh's tiles and of plain arrays, for the test of the counts of accesses (tests/csrc/
// test_accesses.py).
#include "../../csrc/cuda/tile.cuh"

#define NF4_TEST_API extern "C" __attribute__((visibility("default")))

namespace nf4::cuda {
namespace {

constexpr int kThreads = 128;

// One warp: out[lane] = in[l * stride], l the first lane of the `alike` that read the same, through shared memory at the
// same places; V has 4, 8 or 16 bytes.
template <class V>
__global__ void stride_kernel(const V* in, V* out, int stride, int alike) {
  V* staged = shared_memory<V>();
  const int lane = int(threadIdx.x);
  staged[lane * stride] = in[lane * stride];
  sync_warp();
  out[lane] = staged[lane / alike * alike * stride];
}

// A warp reads a tile [64, 16 kRowVectors bytes] as the tiled kernels read theirs: V has 16 bytes, of vectors 2t and 2t + 1
// of rows g, g + 8, ...; or 8, half t % 2 of vectors 2j + t / 2. out: the last ones.
template <class V, int kRowVectors, Swizzle kSwizzle>
__global__ void tile_kernel(const unsigned char* in, V* out) {
  using Fetcher = RowFetcher<64, kRowVectors, kSwizzle, kThreads>;
  constexpr bool kWhole = sizeof(V) == kVectorBytes;
  unsigned char* tile = shared_memory<unsigned char>();
  const Fetcher fetcher(in, 0, 64, Fetcher::kPitch);
  fetcher.fetch(tile, 0);
  copy_async_commit();
  copy_async_wait<0>();
  sync_block();
  const Lane lane;
  for (int row = lane.g; row < 64; row += 8)
    for (int j = 0; j < (kWhole ? 2 : kRowVectors / 2); ++j) {
      const int vector = kWhole ? 2 * lane.t + j : 2 * j + lane.t / 2;
      const int half = kWhole ? 0 : 8 * (lane.t % 2);
      out[threadIdx.x] = *reinterpret_cast<const V*>(tile + row * Fetcher::kPitch + half +
                                                     kVectorBytes * swizzle<kSwizzle, kRowVectors>(vector, row));
    }
}

template <class V, int kRowVectors, Swizzle kSwizzle>
int run_tile_of(const unsigned char* in, void* out) {
  return launch(tile_kernel<V, kRowVectors, kSwizzle>, 1, kThreads, 64 * kVectorBytes * kRowVectors, nullptr, in,
                static_cast<V*>(out));
}

}  // namespace

NF4_TEST_API int run_stride(int bytes, int stride, int alike, const void* in, void* out) {
  const auto run = [&](auto v) {
    using V = decltype(v);
    return launch(stride_kernel<V>, 1, kWarp, kWarp * stride * sizeof(V), nullptr, static_cast<const V*>(in),
                  static_cast<V*>(out), stride, alike);
  };
  return bytes == 4 ? run(uint32_t()) : bytes == 8 ? run(uint2()) : run(uint4());
}
NF4_TEST_API int run_tile(int kind, const unsigned char* in, void* out) {
  constexpr decltype(&run_tile_of<uint4, 8, Swizzle::kXorRow>) kTiles[] = {
      run_tile_of<uint4, 8, Swizzle::kXorRow>,      run_tile_of<uint4, 8, Swizzle::kNone>,
      run_tile_of<uint2, 8, Swizzle::kXorRowPairs>, run_tile_of<uint2, 8, Swizzle::kNone>,
      run_tile_of<uint2, 4, Swizzle::kXorRowPairs>, run_tile_of<uint2, 4, Swizzle::kNone>,
      run_tile_of<uint2, 2, Swizzle::kNone>};
  return kTiles[kind](in, out);
}

}  // namespace nf4::cuda
