// Shared-memory tiles of rows, filled by cp.async and read without bank conflicts by means of a swizzle.
//
// A row is cut into vectors of 16 bytes (4 of the 32 banks). Vector v of row r is stored at vector swizzle(v, r) of the
// row, so that the vectors which one phase of a load touches (128 bytes: 8 lanes of 16 bytes or 16 lanes of 8) lie in
// different banks. Rows of 128 bytes, with the vectors of one phase in brackets, stored at position:
//
//   kXorRow      position 0   1   2   3   4   5   6   7
//   row 0                [0]  1  [2]  3  [4]  5  [6]  7     16 bytes a lane: lane 4g + t reads vector 2t + half of row
//   row 1                 1  [0]  3  [2]  5  [4]  7  [6]    g, so a phase is vectors 0, 2, 4, 6 (half 0) of two rows;
//   row 2                 2   3   0   1   6   7   4   5     the next phase is those of rows 2 and 3
//
//   kXorRowPairs position 0   1   2   3   4   5   6   7
//   row 0                [0] [1]  2   3   4   5   6   7     8 bytes a lane: lane 4g + t reads half t % 2 of vector
//   row 1                 2   3  [0] [1]  6   7   4   5     2j + t / 2 of row g, so a phase is vectors 2j and 2j + 1
//   row 2                 4   5   6   7  [0] [1]  2   3     (j = 0) of four rows
//   row 3                 6   7   4   5   2   3  [0] [1]
//   Rows of 64 bytes: two rows have all banks, and vector ^ (row & 2) swaps the halves of rows 2 and 3.
//
//   kNone        8 bytes a lane of 32-byte rows: a phase is rows 4i to 4i + 3, 128 contiguous bytes.
#pragma once

#include "product.cuh"

namespace nf4::cuda {

constexpr int kSharedMost = 99 << 10;  // a block's limit on sm_86, 89 and 120
constexpr int kVectorBytes = 16;

enum class Swizzle { kNone, kXorRow, kXorRowPairs };
template <Swizzle kSwizzle, int kRowVectors>
NF4_HOST_DEVICE inline int swizzle(int vector, int row) {
  if (kSwizzle == Swizzle::kNone) return vector;
  if (kSwizzle == Swizzle::kXorRow) return vector ^ (row & 7);
  return kRowVectors == 4 ? vector ^ (row & 2) : vector ^ (row & 3) << 1;
}

// The vectors of a tile that this thread copies: `vector` of rows row, row + kRowStep, ... All kThreads threads take
// part.
template <int kRows, int kRowVectors, int kThreads>
struct CopyShare {
  static constexpr int kRowStep = kThreads / kRowVectors, kCount = kRows / kRowStep;
  static_assert(kThreads % kRowVectors == 0 && kRows % kRowStep == 0, "every thread copies as many vectors");
  static_assert(kRowStep % 8 == 0 || kCount == 1, "all rows of a thread have the same swizzle");
  int row, vector;
  NF4_DEVICE CopyShare() : row(int(threadIdx.x) / kRowVectors), vector(int(threadIdx.x) % kRowVectors) {}
};

// Copies tiles that follow one another along kRows rows of a matrix. Rows past the matrix repeat its last row: their
// results are not stored, and no load needs a predicate. Offsets have 32 bits: kRows * pitch < 2^32.
template <int kRows, int kRowVectors, Swizzle kSwizzle, int kThreads>
struct RowFetcher {
  using Share = CopyShare<kRows, kRowVectors, kThreads>;
  static constexpr int kPitch = kVectorBytes * kRowVectors;  // bytes from row to row of the tile
  const unsigned char* first_row;
  uint32_t from[Share::kCount];  // byte offsets from first_row
  int to, vector;                // `to`: byte offset in the tile

  // `pitch`: bytes from row to row of the matrix.
  NF4_DEVICE RowFetcher(const void* matrix, int64_t row, int64_t rows, int64_t pitch)
      : first_row(static_cast<const unsigned char*>(matrix) + row * pitch) {
    const Share share;
    const int last = int(smaller(rows - row, kRows)) - 1;
    vector = share.vector;
    to = share.row * kPitch + kVectorBytes * swizzle<kSwizzle, kRowVectors>(vector, share.row);
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i)
      from[i] = uint32_t(min(share.row + i * Share::kRowStep, last)) * uint32_t(pitch) + kVectorBytes * vector;
  }

  // Copies the tile that begins `offset` bytes into each row; this thread's vectors become zeros where not valid, and
  // nothing is read.
  NF4_DEVICE void fetch(unsigned char* tile, uint32_t offset, bool valid = true) const {
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i)
      copy_async_16(tile + to + i * Share::kRowStep * kPitch, first_row + (from[i] + offset), valid);
  }
};

}  // namespace nf4::cuda
