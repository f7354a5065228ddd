// sort_by_expert: positions[i] = the row of choice i among all choices sorted by expert, stable; offsets[e] = the row
// past expert e's last one. Choice i names expert experts_of[i]; `experts` stands for none, whose rows come last.
//
// Who: a block has a chunk of 256 choices. count: its choices of each expert. scan: one block adds the counts over the
//   chunks, then over the experts, so that a count becomes the first row. place: each choice's row.
// Trick: a choice's rank in its chunk is how many before it name the same expert, 256 comparisons from shared memory
//   that all threads read at the same address: stable and without atomics, whose order differs from run to run.
//   Rejected: a radix sort of (expert, choice), which moves keys four times and needs a workspace of its own.
// Bytes: 16 read and 4 written a choice, and 12 for each of 256 / (experts + 1) of one; 32768 choices of 128 experts
//   1.0 MB, so that three launches, some 6 us, are all of it.
// Needs: fewer than 2^31 choices; counts [chunks, experts + 1].
#include "grouped.cuh"

namespace nf4::cuda {
namespace {

constexpr int kChunk = 256;  // choices, and threads, of a block
constexpr int kNothing = -1;

// The expert of this thread's choice; all of the chunk's in shared memory after a barrier. Past the end: kNothing.
NF4_DEVICE int load_chunk(const SortArgs& args, int* chunk) {
  const int64_t i = int64_t(blockIdx.x) * kChunk + threadIdx.x;
  int expert = kNothing;
  if (i < args.count) {
    const int64_t given = load_cached(args.experts_of + i);
    const bool in_range = given >= 0 && given <= args.experts;
    device_assert(in_range, "nf4kernels.sort_by_expert: top_k_index must be in 0..num_experts");
    expert = in_range ? int(given) : args.experts;
  }
  chunk[threadIdx.x] = expert;
  sync_block();
  return expert;
}

__global__ void __launch_bounds__(kChunk) count_kernel(const SortArgs args) {
  int* chunk = shared_memory<int>();
  load_chunk(args, chunk);
  for (int expert = int(threadIdx.x); expert <= args.experts; expert += kChunk) {
    int count = 0;
    for (int i = 0; i < kChunk; ++i) count += chunk[i] == expert ? 1 : 0;
    args.counts[int64_t(blockIdx.x) * (args.experts + 1) + expert] = count;
  }
}

__global__ void __launch_bounds__(kChunk) scan_kernel(const SortArgs args, int64_t chunks) {
  constexpr int kWarps = kChunk / kWarp;
  int* warp_totals = shared_memory<int>();
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, bins = args.experts + 1;
  int base = 0;
  for (int first = 0; first < bins; first += kChunk) {
    const int expert = first + int(threadIdx.x);
    int total = 0;
    if (expert < bins)
      for (int64_t c = 0; c < chunks; ++c) total += args.counts[c * bins + expert];
    const int inclusive = inclusive_scan(total, lane, [](int a, int b) { return a + b; });
    if (lane == kWarp - 1) warp_totals[warp] = inclusive;
    sync_block();
    int before = 0, all = 0;
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp ? warp_totals[w] : 0;
      all += warp_totals[w];
    }
    int row = base + before + inclusive - total;
    if (expert < args.experts) args.offsets[expert] = row + total;
    if (expert < bins) {
      for (int64_t c = 0; c < chunks; ++c) {
        const int count = args.counts[c * bins + expert];
        args.counts[c * bins + expert] = row;
        row += count;
      }
    }
    base += all;
    sync_block();
  }
}

__global__ void __launch_bounds__(kChunk) place_kernel(const SortArgs args) {
  int* chunk = shared_memory<int>();
  const int expert = load_chunk(args, chunk);
  if (expert == kNothing) return;
  int row = args.counts[int64_t(blockIdx.x) * (args.experts + 1) + expert];
  for (int i = 0; i < kChunk; ++i) row += i < int(threadIdx.x) && chunk[i] == expert ? 1 : 0;
  args.positions[int64_t(blockIdx.x) * kChunk + threadIdx.x] = expert == args.experts ? ~row : row;
}

}  // namespace

int64_t sort_chunks(int64_t count) { return ceil_div(count, kChunk); }

cudaError_t sort_by_expert(const SortArgs& args, cudaStream_t stream) {
  const int64_t chunks = sort_chunks(args.count);
  const dim3 grid{unsigned(chunks)};
  constexpr size_t kSharedBytes = kChunk * sizeof(int);
  if (chunks > 0) {
    const cudaError_t error = launch(count_kernel, grid, kChunk, kSharedBytes, stream, args);
    if (error != cudaSuccess) return error;
  }
  const cudaError_t error = launch(scan_kernel, dim3(1), kChunk, kSharedBytes, stream, args, chunks);
  if (error != cudaSuccess || chunks == 0) return error;
  return launch(place_kernel, grid, kChunk, kSharedBytes, stream, args);
}

}  // namespace nf4::cuda
