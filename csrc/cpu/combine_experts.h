// combine_experts: out[t] = sum over j of weights[t, j] * rows[p], p = positions[t, j] (none where p < 0), and its
// gradients: drows[p] = weights[t, j] * dout[t] (zeros at row ~p where p < 0), dweights[t, j] = dout[t] . rows[p].
//
// Work split   Tokens. The caller splits them over threads; no two tokens share a row.
// Inner loop   L columns: the k rows in the order of j, each product and each sum rounded to fp32 (never an FMA), so that
//              every instruction set has the same bits. wgrad: kSums sums of L lanes a row, added in a fixed order.
// Rejected     torch's gather, product and sum: three passes over k times the tokens in memory, one of them in fp32.
// Bytes        Reads or writes the T * k rows once and the tokens once (wgrad: k times, from the L1): T = 4096, k = 8,
//              H = 2048 in bf16 are 134 + 17 MB, 10 ms at 15 GB/s.
// Needs        H contiguous columns; positions that are in range.
#pragma once

#include "kernels.h"

namespace nf4::cpu {
namespace {

template <class In, class Out>
void combine_token(const CombineArgs& args, const int32_t* positions, const float* weights, Out* out) {
  const In* rows = static_cast<const In*>(args.rows);
  int64_t h = 0;
  for (; h + Isa::L <= args.H; h += Isa::L) {
    Isa::F sum = Isa::zero();
    for (int64_t j = 0; j < args.top_k; ++j)
      if (positions[j] >= 0)
        sum = Isa::add(sum, Isa::mul(Isa::set1(weights[j]), Isa::load(rows + positions[j] * args.H + h)));
    Isa::store(out + h, sum);
  }
  for (; h < args.H; ++h) {
    float sum = 0;
    for (int64_t j = 0; j < args.top_k; ++j)
      if (positions[j] >= 0) sum += weights[j] * to_float(rows[positions[j] * args.H + h]);
    out[h] = from_float<Out>(sum);
  }
}

template <class In, class Out>
void spread_token(const In* token, int64_t H, float weight, Out* row) {
  int64_t h = 0;
  for (; h + Isa::L <= H; h += Isa::L) Isa::store(row + h, Isa::mul(Isa::set1(weight), Isa::load(token + h)));
  for (; h < H; ++h) row[h] = from_float<Out>(weight * to_float(token[h]));
}

constexpr int kSums = 4;

template <class A, class B>
float inner_product(const A* a, const B* b, int64_t H) {
  Isa::F sums[kSums];
  for (Isa::F& sum : sums) sum = Isa::zero();
  int64_t h = 0;
  for (; h + kSums * Isa::L <= H; h += kSums * Isa::L)
    for (int s = 0; s < kSums; ++s)
      sums[s] = Isa::fma(Isa::load(a + h + s * Isa::L), Isa::load(b + h + s * Isa::L), sums[s]);
  float rest = 0;
  for (; h < H; ++h) rest += to_float(a[h]) * to_float(b[h]);
  return Isa::reduce_add(Isa::add(Isa::add(sums[0], sums[1]), Isa::add(sums[2], sums[3]))) + rest;
}

void combine_tokens(const CombineArgs& args, int64_t t_begin, int64_t t_end) {
  with_type(args.rows_dtype, [&](auto in) {
    with_type(args.out_dtype, [&](auto out) {
      auto* tokens = static_cast<decltype(out)*>(args.out);
      for (int64_t t = t_begin; t < t_end; ++t)
        combine_token<decltype(in)>(args, args.positions + t * args.top_k, args.weights + t * args.top_k,
                                    tokens + t * args.H);
    });
  });
}

void combine_dgrad_tokens(const CombineArgs& args, int64_t t_begin, int64_t t_end) {
  with_type(args.tokens_dtype, [&](auto in) {
    with_type(args.out_dtype, [&](auto out) {
      const auto* tokens = static_cast<const decltype(in)*>(args.tokens);
      auto* rows = static_cast<decltype(out)*>(args.out);
      for (int64_t i = t_begin * args.top_k; i < t_end * args.top_k; ++i) {
        const int32_t p = args.positions[i];
        if (p >= 0)
          spread_token(tokens + i / args.top_k * args.H, args.H, args.weights[i], rows + p * args.H);
        else
          std::memset(static_cast<void*>(rows + int64_t(~p) * args.H), 0, size_t(args.H) * sizeof(out));
      }
    });
  });
}

void combine_wgrad_tokens(const CombineArgs& args, int64_t t_begin, int64_t t_end) {
  with_type(args.tokens_dtype, [&](auto a) {
    with_type(args.rows_dtype, [&](auto b) {
      const auto* tokens = static_cast<const decltype(a)*>(args.tokens);
      const auto* rows = static_cast<const decltype(b)*>(args.rows);
      for (int64_t i = t_begin * args.top_k; i < t_end * args.top_k; ++i) {
        const int32_t p = args.positions[i];
        const float dw = p < 0 ? 0.f : inner_product(tokens + i / args.top_k * args.H, rows + p * args.H, args.H);
        with_type(args.out_dtype,
                  [&](auto out) { static_cast<decltype(out)*>(args.out)[i] = from_float<decltype(out)>(dw); });
      }
    });
  });
}

}  // namespace
}  // namespace nf4::cpu
