// Tiles of 16-bit rows in shared memory, filled in the background and read 16 bytes a lane without bank conflicts.
#pragma once

#include "product.cuh"

namespace nf4::cuda {

constexpr int kSharedMost = 99 << 10;  // what a block can have on sm_86, 89 and 120

// A row is cut into kPieces pieces of 16 bytes. Piece p of row r stands at place(p, r), so that what a warp reads in one
// cycle, 128 bytes of several rows, is of different banks.
enum class Order {
  kEvenPieces,    // 16 bytes a lane: pieces 0, 2, 4, 6 (or 1, 3, 5, 7) of rows 2i and 2i + 1
  kPieceInPairs,  // 8 bytes a lane: pieces 2j and 2j + 1 of rows 4i to 4i + 3
};
template <Order order, int kPieces>
NF4_HOST_DEVICE inline int place(int piece, int row) {
  if (order == Order::kEvenPieces) return piece ^ (row & 7);
  return kPieces == 4 ? piece ^ (row & 2) : piece ^ (row & 3) << 1;  // two rows of 4 pieces have all banks
}

// Rows [row, row + kTileRows) and elements [column, column + kTileColumns) of a [rows, columns] matrix of 2-byte
// elements, zeros beyond it; columns % 8 == 0. All kThreads threads of the block take part.
template <int kTileRows, int kTileColumns, Order order, int kThreads>
NF4_DEVICE void fetch_rows(unsigned char* tile, const void* matrix, int64_t rows, int64_t columns, int64_t row,
                           int64_t column) {
  constexpr int kPieces = kTileColumns / 8;
  static_assert(
      kTileRows * kPieces % kThreads == 0 && (kPieces % 8 == 0 || (kPieces == 4 && order == Order::kPieceInPairs)),
      "every thread has as many pieces to fetch");
#pragma unroll
  for (int i = 0; i < kTileRows * kPieces / kThreads; ++i) {
    const int index = i * kThreads + int(threadIdx.x), r = index / kPieces, piece = index % kPieces;
    const int64_t from = (row + r) * columns + column + 8 * piece;
    const bool valid = row + r < rows && column + 8 * piece < columns;
    copy_async_16(tile + r * kTileColumns * 2 + 16 * place<order, kPieces>(piece, r),
                  static_cast<const unsigned char*>(matrix) + (valid ? from * 2 : 0), valid);
  }
}

}  // namespace nf4::cuda
