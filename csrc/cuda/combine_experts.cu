// combine_experts: out[t] = sum over j of weights[t, j] * rows[p], p = positions[t, j] (none where p < 0), and its
// gradients: drows[p] = weights[t, j] * dout[t] (zeros at row ~p where p < 0), dweights[t, j] = dout[t] . rows[p].
//
// Who: a thread has 8 columns of a token, one where H is no multiple of 8, and takes its k rows in the order of j; of
//   dweights a warp has one choice and adds its lanes' sums by shuffles. All are grid-stride loops.
// Trick: each token gathers its rows, so that nothing is added by atomics, and every product and sum is rounded as on
//   the CPU. Rejected: scattering rows into out, which is zeroed first and added to in the order of arrival.
// Bytes: T * k rows once and the tokens once: T = 4096, k = 8, H = 2048 in bf16 151 MB, 35 us at an H200's 4.3 TB/s.
// Needs: contiguous rows; for 8 columns a thread all pointers aligned to 16 bytes. A position that is no row is none.
#include "product.cuh"

namespace nf4::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;

template <class T, int kV>
NF4_DEVICE void load_floats(float (&values)[kV], const void* from, int64_t i) {
  const T* p = static_cast<const T*>(from) + i;
  if constexpr (kV == 1) {
    values[0] = to_float(*p);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 four = load_cached(reinterpret_cast<const uint4*>(p) + half);
      const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) values[4 * half + w] = float_of(words[w]);
    }
  } else {
    const uint4 eight = load_cached(reinterpret_cast<const uint4*>(p));
    const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      values[2 * w] = first_of<T>(words[w]);
      values[2 * w + 1] = second_of<T>(words[w]);
    }
  }
}

template <class T, int kV>
NF4_DEVICE void store_floats(void* to, int64_t i, const float (&values)[kV]) {
  T* p = static_cast<T*>(to) + i;
  if constexpr (kV == 1) {
    *p = from_float<T>(values[0]);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* four = values + 4 * half;
      reinterpret_cast<uint4*>(p)[half] = {bits_of(four[0]), bits_of(four[1]), bits_of(four[2]), bits_of(four[3])};
    }
  } else {
    *reinterpret_cast<uint4*>(p) = {pack<T>(values[0], values[1]), pack<T>(values[2], values[3]),
                                    pack<T>(values[4], values[5]), pack<T>(values[6], values[7])};
  }
}

// With the element type of the dtype, which is known at run time: once a token, not once a row.
template <class F>
NF4_DEVICE void with_type(Dtype dtype, F&& f) {
  if (dtype == Dtype::kFloat32)
    f(float{});
  else if (dtype == Dtype::kBFloat16)
    f(BFloat16{});
  else
    f(Float16{});
}

NF4_DEVICE float weight_of(const CombineArgs& args, int64_t choice) {
  if (args.weights == nullptr) return 1.f;
  float weight = 0;
  with_type(args.weights_dtype,
            [&](auto t) { weight = to_float(static_cast<const decltype(t)*>(args.weights)[choice]); });
  return weight;
}

NF4_DEVICE bool is_row(const CombineArgs& args, int64_t row) { return row >= 0 && row < args.T * args.top_k; }

template <class T, int kV>
__global__ void __launch_bounds__(kThreads) combine_kernel(const CombineArgs args) {
  const int64_t vectors = args.H / kV, count = args.T * vectors;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const int64_t t = i / vectors, column = i % vectors * kV;
    float sums[kV] = {};
#pragma unroll 2
    for (int64_t j = 0; j < args.top_k; ++j) {
      const int64_t row = load_cached(args.positions + t * args.top_k + j);
      if (!is_row(args, row)) continue;
      const float weight = weight_of(args, t * args.top_k + j);
      float values[kV];
      load_floats<T>(values, args.rows, row * args.H + column);
#pragma unroll
      for (int v = 0; v < kV; ++v) sums[v] += weight * values[v];
    }
    with_type(args.out_dtype, [&](auto out) { store_floats<decltype(out)>(args.out, i * kV, sums); });
  }
}

template <class T, int kV>
__global__ void __launch_bounds__(kThreads) combine_dgrad_kernel(const CombineArgs args) {
  const int64_t vectors = args.H / kV, count = args.T * vectors;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const int64_t t = i / vectors, column = i % vectors * kV;
    float token[kV];
    with_type(args.tokens_dtype, [&](auto in) { load_floats<decltype(in)>(token, args.tokens, i * kV); });
    for (int64_t j = 0; j < args.top_k; ++j) {
      const int64_t position = load_cached(args.positions + t * args.top_k + j),
                    row = position < 0 ? ~position : position;
      if (!is_row(args, row)) continue;
      const float weight = weight_of(args, t * args.top_k + j);
      float values[kV];
#pragma unroll
      for (int v = 0; v < kV; ++v) values[v] = position < 0 ? 0.f : weight * token[v];
      store_floats<T>(args.out, row * args.H + column, values);
    }
  }
}

template <class T, int kV>
__global__ void __launch_bounds__(kThreads) combine_wgrad_kernel(const CombineArgs args) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = int(threadIdx.x) % kWarp;
  const int64_t count = args.T * args.top_k;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; i < count; i += int64_t(gridDim.x) * kWarps) {
    const int64_t row = load_cached(args.positions + i), t = i / args.top_k;
    float sum = 0;
    if (is_row(args, row)) {
      for (int64_t column = lane * kV; column < args.H; column += kWarp * kV) {
        float token[kV], values[kV];
        with_type(args.tokens_dtype,
                  [&](auto in) { load_floats<decltype(in)>(token, args.tokens, t * args.H + column); });
        load_floats<T>(values, args.rows, row * args.H + column);
        float part = 0;
#pragma unroll
        for (int v = 0; v < kV; ++v) part += token[v] * values[v];
        sum += part;
      }
    }
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) {
      const float one[1] = {sum};
      with_type(args.out_dtype, [&](auto out) { store_floats<decltype(out)>(args.out, i, one); });
    }
  }
}

enum class Kernel { kCombine, kDgrad, kWgrad };

template <class T, int kV>
cudaError_t launch_for(Kernel kernel, const CombineArgs& args, cudaStream_t stream) {
  const int64_t work = kernel == Kernel::kWgrad ? args.T * args.top_k * kWarp : args.T * (args.H / kV);
  const auto run = kernel == Kernel::kCombine ? combine_kernel<T, kV>
                   : kernel == Kernel::kDgrad ? combine_dgrad_kernel<T, kV>
                                              : combine_wgrad_kernel<T, kV>;
  return launch(run, dim3(blocks_for(work, kThreads)), kThreads, 0, stream, args);
}

cudaError_t launch_kernel(Kernel kernel, const CombineArgs& args, cudaStream_t stream) {
  const bool vectors = args.aligned && args.H % kVector == 0;
  switch (kernel == Kernel::kDgrad ? args.out_dtype : args.rows_dtype) {
    case Dtype::kFloat32:
      return vectors ? launch_for<float, kVector>(kernel, args, stream) : launch_for<float, 1>(kernel, args, stream);
    case Dtype::kBFloat16:
      return vectors ? launch_for<BFloat16, kVector>(kernel, args, stream)
                     : launch_for<BFloat16, 1>(kernel, args, stream);
    default:
      return vectors ? launch_for<Float16, kVector>(kernel, args, stream)
                     : launch_for<Float16, 1>(kernel, args, stream);
  }
}

}  // namespace

cudaError_t combine_experts(const CombineArgs& args, cudaStream_t stream) {
  return launch_kernel(Kernel::kCombine, args, stream);
}
cudaError_t combine_experts_dgrad(const CombineArgs& args, cudaStream_t stream) {
  return launch_kernel(Kernel::kDgrad, args, stream);
}
cudaError_t combine_experts_wgrad(const CombineArgs& args, cudaStream_t stream) {
  return launch_kernel(Kernel::kWgrad, args, stream);
}

}  // namespace nf4::cuda
