// Tiles of 16-bit rows in shared memory, filled in the background and read 16 bytes a lane without bank conflicts.
#pragma once

#include "product.cuh"

namespace nf4::cuda {

constexpr int kSharedMost = 99 << 10;  // what a block can have on sm_86, 89 and 120

// A row of a tile is cut into kPieces pieces of 16 bytes. Piece p of row r stands at place(p, r), so that what a warp reads
// in one cycle, 128 bytes of several rows, is of different banks.
enum class Order {
  kPlain,         // 8 bytes a lane of 32-byte rows: rows 4i to 4i + 3 are 128 bytes as they are
  kEvenPieces,    // 16 bytes a lane: pieces 0, 2, 4, 6 (or 1, 3, 5, 7) of rows 2i and 2i + 1
  kPieceInPairs,  // 8 bytes a lane: pieces 2j and 2j + 1 of rows 4i to 4i + 3
};
template <Order order, int kPieces>
NF4_HOST_DEVICE inline int place(int piece, int row) {
  if (order == Order::kPlain) return piece;
  if (order == Order::kEvenPieces) return piece ^ (row & 7);
  return kPieces == 4 ? piece ^ (row & 2) : piece ^ (row & 3) << 1;  // two rows of 4 pieces have all banks
}

// Which pieces of a tile a thread fetches: `piece` of rows row, row + kRowStep, ... All kThreads threads take part.
template <int kTileRows, int kPieces, int kThreads>
struct Share {
  static constexpr int kRowStep = kThreads / kPieces, kCount = kTileRows / kRowStep;
  static_assert(kThreads % kPieces == 0 && kTileRows % kRowStep == 0, "every thread has as many pieces");
  static_assert(kRowStep % 8 == 0 || kCount == 1, "a thread's rows all have the same order");
  int row, piece;
  NF4_DEVICE Share() : row(int(threadIdx.x) / kPieces), piece(int(threadIdx.x) % kPieces) {}
};

// Fetches tiles that follow one another along kTileRows rows of a matrix. Rows beyond the matrix are the last row's: what
// comes of them is not stored, and no load needs a condition. Offsets have 32 bits: kTileRows * pitch < 2^32.
template <int kTileRows, int kPieces, Order order, int kThreads>
struct RowFetcher {
  using Threads = Share<kTileRows, kPieces, kThreads>;
  static constexpr int kPitch = 16 * kPieces;  // bytes a row of the tile
  const unsigned char* first_row;
  uint32_t from[Threads::kCount];  // bytes from there
  int to, piece;                   // `to` in bytes from the tile

  // `pitch` is the bytes a row of the matrix.
  NF4_DEVICE RowFetcher(const void* matrix, int64_t row, int64_t rows, int64_t pitch)
      : first_row(static_cast<const unsigned char*>(matrix) + row * pitch) {
    const Threads threads;
    const int last = int(smaller(rows - row, kTileRows)) - 1;
    piece = threads.piece;
    to = threads.row * kPitch + 16 * place<order, kPieces>(piece, threads.row);
#pragma unroll
    for (int i = 0; i < Threads::kCount; ++i)
      from[i] = uint32_t(min(threads.row + i * Threads::kRowStep, last)) * uint32_t(pitch) + 16 * piece;
  }

  // The tile that begins `column` bytes into the rows; zeros for this thread's pieces where not valid.
  NF4_DEVICE void fetch(unsigned char* tile, uint32_t column, bool valid = true) const {
#pragma unroll
    for (int i = 0; i < Threads::kCount; ++i)
      copy_async_16(tile + to + i * Threads::kRowStep * kPitch, first_row + (valid ? from[i] + column : 0), valid);
  }
};

}  // namespace nf4::cuda
