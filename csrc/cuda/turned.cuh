// Products whose contraction runs across the rows of a matrix [depth, columns]: linear_dgrad (W) and lora_grad (x or dY).
//
// The matrix's transpose is mma's A operand. A lane (g = lane / 4, t = lane % 4) takes 8 consecutive columns from 8g on of
// rows 4t.. of 16. Which of the 64 columns stands in which row of the four 16-row tiles is free: tile i has 8g + 2i in
// row g and 8g + 2i + 1 in row g + 8, so that the lane ends with 8 consecutive columns of the result.
#pragma once

#include "device.cuh"

namespace nf4::cuda {

constexpr int kTiles = 4;  // of 16 columns

// [tile of 16 columns][tile of 8 others][the four of a c fragment]: c0, c1 are column 8g + 2 tile, c2, c3 the next, of
// others 2t, 2t + 1.
template <int kOtherTiles>
using TurnedSums = float[kTiles][kOtherTiles][4];

// A tile's a fragment, which wants pairs along the depth, from pairs along the columns of rows 4t to 4t + 3.
NF4_DEVICE void turn(uint32_t (&a)[4], const uint32_t (&along_columns)[4]) {
  a[0] = permute_bytes(along_columns[0], along_columns[1], 0x5410);
  a[1] = permute_bytes(along_columns[0], along_columns[1], 0x7632);
  a[2] = permute_bytes(along_columns[2], along_columns[3], 0x5410);
  a[3] = permute_bytes(along_columns[2], along_columns[3], 0x7632);
}

// All four tiles' a fragments of rows row + 4t.. of a matrix of 2-byte elements, `from` being the lane's columns of the
// first row; zeros beyond `depth` rows and where not valid.
template <class T>
NF4_DEVICE void load_turned(uint32_t (&a)[kTiles][4], const T* from, int64_t row, int64_t depth, int64_t columns,
                            bool valid) {
  uint32_t pairs[kTiles][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 eight = valid && row + i < depth ? load_cached(reinterpret_cast<const uint4*>(from + i * columns))
                                                 : make_uint4(0, 0, 0, 0);
    pairs[0][i] = eight.x;
    pairs[1][i] = eight.y;
    pairs[2][i] = eight.z;
    pairs[3][i] = eight.w;
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) turn(a[tile], pairs[tile]);
}

// The lane's 8 columns of other 2t + odd of a tile.
template <int kOtherTiles>
NF4_DEVICE void eight_columns(float (&values)[8], const TurnedSums<kOtherTiles>& sums, int other, int odd) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    values[2 * tile] = sums[tile][other][odd];
    values[2 * tile + 1] = sums[tile][other][2 + odd];
  }
}

}  // namespace nf4::cuda
