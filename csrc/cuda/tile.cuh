// Tiles of 16-bit rows in shared memory, filled in the background and read 16 bytes a lane without bank conflicts.
#pragma once

#include "product.cuh"

namespace nf4::cuda {

// A row is cut into pieces of 16 bytes, eight in 128 bytes. Piece p of row r stands at place(p, r), so that what a warp
// reads in one cycle, 128 bytes of several rows, is of different banks.
enum class Order {
  kEvenPieces,    // 16 bytes a lane: pieces 0, 2, 4, 6 (or 1, 3, 5, 7) of rows 2i and 2i + 1
  kPieceInPairs,  // 8 bytes a lane: pieces 2j and 2j + 1 of rows 4i to 4i + 3
};
template <Order order>
NF4_HOST_DEVICE inline int place(int piece, int row) {
  return order == Order::kEvenPieces ? piece ^ (row & 7) : piece ^ (row & 3) << 1;
}

// Rows [row, row + kTileRows) and elements [column, column + kTileColumns) of a [rows, columns] matrix of 2-byte
// elements, zeros beyond it; columns % 8 == 0. All kThreads threads of the block take part.
template <int kTileRows, int kTileColumns, Order order, int kThreads>
NF4_DEVICE void fetch_rows(unsigned char* tile, const void* matrix, int64_t rows, int64_t columns, int64_t row,
                           int64_t column) {
  constexpr int kPieces = kTileColumns / 8;
  static_assert(kTileRows * kPieces % kThreads == 0 && kPieces % 8 == 0, "every thread has as many pieces to fetch");
#pragma unroll
  for (int i = 0; i < kTileRows * kPieces / kThreads; ++i) {
    const int index = i * kThreads + int(threadIdx.x), r = index / kPieces, piece = index % kPieces;
    const int64_t from = (row + r) * columns + column + 8 * piece;
    const bool valid = row + r < rows && column + 8 * piece < columns;
    copy_async_16(tile + r * kTileColumns * 2 + 16 * place<order>(piece, r),
                  static_cast<const unsigned char*>(matrix) + (valid ? from * 2 : 0), valid);
  }
}

}  // namespace nf4::cuda
