// mma.m16n8k16 on the operands of 32 lanes, with sums as the contract assumes them or as a tensor core takes them.
#include <cmath>

#include "executor.h"

namespace nf4::cuda::executor {

bool mma_truncates = false;

namespace {

constexpr int kM = 16, kN = 8, kK = 16;
constexpr int kProducts = 8;  // that a truncated sum takes at a time

struct Operands {
  float a[kM][kK], b[kK][kN], c[kM][kN];
};

// Rounds to nearest after each product.
void add_rounded(Operands& o) {
  for (int m = 0; m < kM; ++m) {
    for (int k = 0; k < kK; ++k) {
      for (int n = 0; n < kN; ++n) o.c[m][n] += o.a[m][k] * o.b[k][n];
    }
  }
}

float towards_zero(double value) {
  const float nearest = float(value);
  return std::fabs(nearest) > std::fabs(value) ? std::nextafter(nearest, 0.f) : nearest;
}

// As Ampere and Ada, which keep less than Hopper: 8 products and c at a time, each exact and then cut off at the place
// of the largest one's 25th bit, and their sum at its own 24th.
// Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021; Khattak, Mikaitis, "Accurate models
// of NVIDIA tensor cores", 2025.
float sum_truncated(const double (&products)[kProducts], float c) {
  constexpr int kBits = 24 + 1, kLeastExponent = -126;
  double largest = std::fabs(c), plain = c;
  for (const double product : products) {
    largest = std::fmax(largest, std::fabs(product));
    plain += product;
  }
  if (largest == 0 || !std::isfinite(plain)) return float(plain);
  const double unit = std::ldexp(1.0, std::max(std::ilogb(largest), kLeastExponent) - (kBits - 1));
  double sum = std::trunc(c / unit);  // whole numbers below 2^29: all sums are exact
  for (const double product : products) sum += std::trunc(product / unit);
  return towards_zero(sum * unit);
}

void add_truncated(Operands& o) {
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      for (int k = 0; k < kK; k += kProducts) {
        double products[kProducts];
        for (int i = 0; i < kProducts; ++i) products[i] = double(o.a[m][k + i]) * o.b[k + i][n];
        o.c[m][n] = sum_truncated(products, o.c[m][n]);
      }
    }
  }
}

}  // namespace

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
template <class T>
void perform_mma(void* const lanes[kLanes]) {
  Operands o;
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& own = *static_cast<const MmaLane<T>*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      float* row = o.a[g + 8 * (i % 2)] + 2 * t + 8 * (i / 2);
      unpack<T>(own.a[i], row[0], row[1]);
      o.c[g + 8 * (i / 2)][2 * t + i % 2] = own.c[i];
    }
    for (int i = 0; i < 2; ++i) unpack<T>(own.b[i], o.b[2 * t + 8 * i][g], o.b[2 * t + 8 * i + 1][g]);
  }
  mma_truncates ? add_truncated(o) : add_rounded(o);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    float* own = static_cast<MmaLane<T>*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) own[i] = o.c[g + 8 * (i / 2)][2 * t + i % 2];
  }
}

template void perform_mma<BFloat16>(void* const lanes[kLanes]);
template void perform_mma<Float16>(void* const lanes[kLanes]);

}  // namespace nf4::cuda::executor
