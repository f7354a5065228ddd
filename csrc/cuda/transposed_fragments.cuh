// mma's A fragments of a transposed matrix S[depth, columns] of 2-byte elements, for products that contract over S's
// rows: S^T @ other. S is W[N, K] in linear_dgrad (and A[rank, K] in its LoRA term) and wide[M, columns] in lora_grad.
// Read first: mma_16x8x16 in device.cuh.
//
// Lane 4g + t loads 8 consecutive columns, 8g to 8g + 7, of the four rows 4t to 4t + 3 of each 16 rows of S. The four
// mma tiles share the 64 columns out, and which column is which row of a tile is free. This permutation is chosen:
//
//   row of a tile    tile 0    tile 1    tile 2    tile 3
//        g             8g      8g + 2    8g + 4    8g + 6
//        g + 8       8g + 1    8g + 3    8g + 5    8g + 7
//
// So the c fragments of lane 4g + t hold 8 consecutive columns of the result, 8g to 8g + 7, which one 16-byte store
// writes.
//
// Loads give pairs along the columns, mma wants pairs along the depth (k): transpose() is two byte permutes a pair of
// rows. Rows 4t to 4t + 3 stand in the places that mma calls k = 2t, 2t + 1, 2t + 8, 2t + 9.
#pragma once

#include "device.cuh"

namespace nf4::cuda {

constexpr int kColumnTiles = 4;  // mma tiles of 16 columns of S

// Accumulators [tile of 16 columns][tile of 8 others][c fragment]: c0, c1 are column 8g + 2 tile, c2, c3 column
// 8g + 2 tile + 1; each at others 2t and 2t + 1.
template <int kOtherTiles>
using TransposedSums = float[kColumnTiles][kOtherTiles][4];

// One tile's A fragment from the pairs {column 8g + 2 tile, the next} of rows 4t to 4t + 3.
NF4_DEVICE void transpose(uint32_t (&a)[4], const uint32_t (&pairs)[4]) {
  a[0] = permute_bytes(pairs[0], pairs[1], 0x5410);
  a[1] = permute_bytes(pairs[0], pairs[1], 0x7632);
  a[2] = permute_bytes(pairs[2], pairs[3], 0x5410);
  a[3] = permute_bytes(pairs[2], pairs[3], 0x7632);
}

// The lane's columns, at `from` in its first row, of its four rows: `row` to row + 3. Zeros past `depth` rows and where not
// valid.
template <class T>
NF4_DEVICE void load_rows(uint4 (&rows)[4], const T* from, int64_t row, int64_t depth, int64_t columns, bool valid) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    rows[i] = valid && row + i < depth ? load_cached(reinterpret_cast<const uint4*>(from + i * columns))
                                       : make_uint4(0, 0, 0, 0);
}
// All four tiles' A fragments of these rows.
NF4_DEVICE void transpose(uint32_t (&a)[kColumnTiles][4], const uint4 (&rows)[4]) {
  const uint32_t pairs[kColumnTiles][4] = {{rows[0].x, rows[1].x, rows[2].x, rows[3].x},
                                           {rows[0].y, rows[1].y, rows[2].y, rows[3].y},
                                           {rows[0].z, rows[1].z, rows[2].z, rows[3].z},
                                           {rows[0].w, rows[1].w, rows[2].w, rows[3].w}};
#pragma unroll
  for (int tile = 0; tile < kColumnTiles; ++tile) transpose(a[tile], pairs[tile]);
}
template <class T>
NF4_DEVICE void load_transposed(uint32_t (&a)[kColumnTiles][4], const T* from, int64_t row, int64_t depth,
                                int64_t columns, bool valid) {
  uint4 rows[4];
  load_rows(rows, from, row, depth, columns, valid);
  transpose(a, rows);
}

// The sums of the lane's 8 columns at other 2t + odd of a tile of others.
template <int kOtherTiles>
NF4_DEVICE void eight_columns(float (&values)[8], const TransposedSums<kOtherTiles>& sums, int other, int odd) {
#pragma unroll
  for (int tile = 0; tile < kColumnTiles; ++tile) {
    values[2 * tile] = sums[tile][other][odd];
    values[2 * tile + 1] = sums[tile][other][2 + odd];
  }
}

}  // namespace nf4::cuda
