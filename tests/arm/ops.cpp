// The ops of csrc/cpu without torch, in a process of their own, which may be one of another machine: reads calls from
// stdin and writes their results to stdout until stdin ends. machine.py is the other end and says what each op takes.
//
//   a call       "op\n", the number of arguments, each: a tag and
//                n  nothing    i  int64    d  double    t  Element, dimensions, sizes, bytes
//   a result     the number of tensors, each as after t
//
// Every number is an int64. Each tensor and panel ends at a page that may not be touched and is filled with 0xff: a NaN.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "cpu/dequantize.h"
#include "cpu/grouped_lora.h"
#include "cpu/product.h"

extern "C" {
const char* nf4kernels_cpu_isa();
const char* nf4kernels_cpu_isa_list();
const char* nf4kernels_force_cpu_isa(const char* name);
}

namespace {

using namespace nf4;

enum Element : int64_t { kFp32, kBf16, kFp16, kUint8, kInt32, kInt64 };
int64_t size_of(int64_t element) {
  constexpr int64_t kSizes[] = {4, 2, 2, 1, 4, 8};
  return kSizes[element];
}

class Memory {
 public:
  explicit Memory(int64_t bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE), pages = ceil_div(bytes, page) + 2;
    length_ = size_t(pages * page);
    void* mapped = mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) std::abort();
    begin_ = static_cast<char*>(mapped);
    mprotect(begin_ + page, size_t((pages - 2) * page), PROT_READ | PROT_WRITE);
    data_ = begin_ + (pages - 1) * page - bytes;
    std::memset(data_, 0xff, size_t(bytes));
  }
  Memory(Memory&& other) noexcept : begin_(other.begin_), data_(other.data_), length_(other.length_) {
    other.begin_ = nullptr;
  }
  ~Memory() {
    if (begin_ != nullptr) munmap(begin_, length_);
  }
  char* data() const { return data_; }

 private:
  char *begin_, *data_;
  size_t length_;
};

struct Tensor {
  int64_t element;
  std::vector<int64_t> sizes;
  Memory memory;

  Tensor(int64_t e, std::vector<int64_t> s) : element(e), sizes(std::move(s)), memory(count() * size_of(e)) {}
  int64_t count() const {
    int64_t product = 1;
    for (int64_t size : sizes) product *= size;
    return product;
  }
  int64_t bytes() const { return count() * size_of(element); }
  template <class T = void>
  T* data() const {
    return static_cast<T*>(static_cast<void*>(memory.data()));
  }
  Dtype dtype() const { return Dtype(element); }
};

struct Argument {
  char tag;
  int64_t integer = 0;
  double number = 0;
  std::vector<Tensor> tensor = {};  // one or none
};

struct Call {
  std::vector<Argument> arguments;
  std::vector<Tensor> results;

  const Tensor& tensor(size_t i) const { return arguments[i].tensor.at(0); }
  template <class T = void>
  const T* data(size_t i) const {  // null where there is none
    return arguments[i].tag == 't' ? tensor(i).data<const T>() : nullptr;
  }
  int64_t integer(size_t i) const { return arguments[i].integer; }
  float number(size_t i) const { return float(arguments[i].number); }
  void* add(int64_t element, std::vector<int64_t> sizes) {
    results.emplace_back(element, std::move(sizes));
    return results.back().data();
  }
};

// Parts that end where no kernel's tiles do, one after the other.
struct Runtime {
  std::vector<Memory> panel = {};

  template <class Body>
  static void parallel_for(int64_t begin, int64_t end, int64_t, const Body& body) {
    const int64_t part = cpu::at_least_1((end - begin) / 3);
    for (int64_t first = begin; first < end; first += part) body(first, end - first < part ? end : first + part);
  }
  static int64_t threads() { return 3; }
  static void gemm(const cpu::SliceGemm&) { std::abort(); }  // torch's, which no product chooses here
  void* allocate(int64_t bytes) {
    panel.clear();
    return panel.emplace_back((bytes + 63) / 64 * 64).data();
  }
};
void parallel_for(int64_t begin, int64_t end, int64_t grain, cpu::ParallelBody body, const void* state) {
  Runtime::parallel_for(begin, end, grain, [=](int64_t first, int64_t last) { body(state, first, last); });
}

// The codebook that is argument i; null: int8, of 256 levels.
const float* code_of(const Call& call, size_t i) {
  return call.tensor(i).count() == 256 ? nullptr : call.data<float>(i);
}

// The nine arguments of a weight from argument i on; of `count` experts.
Experts experts_of(const Call& call, size_t i, int64_t count) {
  Experts experts{};
  Weight& w = experts.first;
  w.packed = call.data<uint8_t>(i);
  w.absmax = call.data(i + 1);
  w.scale_absmax = call.data<float>(i + 2);
  w.scale_offset = call.data<float>(i + 3);
  w.code = code_of(call, i + 4);
  w.scale_code = call.data<float>(i + 5);
  w.N = call.integer(i + 6);
  w.K = call.integer(i + 7);
  while (1 << w.block_shift < call.integer(i + 8)) ++w.block_shift;
  const int64_t element = call.tensor(i + 1).element;
  w.scales = w.scale_absmax != nullptr ? Scales::kDouble
             : w.scale_code != nullptr ? Scales::kCodes
             : element == kBf16        ? Scales::kBFloat16
             : element == kFp16        ? Scales::kFloat16
                                       : Scales::kFloat32;
  experts.count = count;
  experts.blocks = ceil_div(w.N * w.K, int64_t(1) << w.block_shift);
  experts.superblocks = ceil_div(experts.blocks, int64_t(1) << kSuperblockShift);
  return experts;
}

void quantize(Call& call) {
  const Tensor& weight = call.tensor(0);
  cpu::QuantizeArgs args{};
  args.weight = weight.data();
  args.dtype = weight.dtype();
  args.numel = weight.count();
  args.code = code_of(call, 1);
  args.block_size = int(call.integer(2));
  const int64_t blocks = ceil_div(args.numel, args.block_size);
  const bool is_int8 = args.code == nullptr;
  args.packed = static_cast<uint8_t*>(call.add(kUint8, {is_int8 ? args.numel : ceil_div(args.numel, 2)}));
  args.absmax = static_cast<float*>(call.add(kFp32, {blocks}));
  const auto run = is_int8 ? cpu::active_kernels().int8->quantize : cpu::active_kernels().quantize;
  Runtime::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

void quantize_absmax(Call& call) {
  cpu::QuantizeAbsmaxArgs args{};
  args.blocks = call.tensor(0).count();
  args.absmax = call.data<float>(0);
  args.scale_code = call.data<float>(1);
  args.scale_is_e4m3 = call.integer(2) != 0;
  const int64_t superblocks = cpu::superblocks_of(args.blocks);
  args.quantized = static_cast<uint8_t*>(call.add(kUint8, call.tensor(0).sizes));
  args.scale_absmax = static_cast<float*>(call.add(kFp32, {superblocks}));
  auto* scale_offset = static_cast<float*>(call.add(kFp32, {}));
  std::vector<double> sums(static_cast<size_t>(superblocks));
  cpu::sum_superblocks(args, 0, superblocks, sums.data());
  *scale_offset = args.scale_offset = cpu::mean_absmax(args, sums.data());
  cpu::quantize_superblocks(args, 0, superblocks);
}

// dtype last.
void dequantize(Call& call) {
  const Weight w = experts_of(call, 0, 1)[0];
  const int64_t row = call.integer(9), rows = call.integer(10) - row, column = call.integer(11);
  const int64_t columns = call.integer(12) - column, element = call.integer(13);
  void* out = call.add(element, {rows, columns});
  cpu::dequantize_rectangle(Runtime(), w, row * w.K + column, rows, columns, Dtype(element), out, columns);
}

std::vector<float> scaled(const Call& call, size_t i, float scaling) {
  if (call.data(i) == nullptr) return {};
  const Tensor& inner = call.tensor(i);
  std::vector<float> values(static_cast<size_t>(inner.count()));
  cpu::scale_lora_inner(inner.data(), inner.dtype(), inner.count(), scaling, values.data());
  return values;
}

// x, the weight, bias (linear alone), lora_inner, lora_factor, scaling.
void multiply(Call& call, bool is_dgrad) {
  const Tensor& x = call.tensor(0);
  const size_t lora = is_dgrad ? 10 : 11;
  cpu::GemmArgs args{};
  args.weight = experts_of(call, 1, 1)[0];
  const cpu::Product product{is_dgrad, is_dgrad ? args.weight.K : args.weight.N,
                             is_dgrad ? args.weight.N : args.weight.K};
  args.dtype = x.dtype();
  args.M = x.sizes[0];
  args.bias = is_dgrad ? nullptr : call.data(10);
  const std::vector<float> inner = scaled(call, lora, call.number(lora + 2));
  args.lora_inner = inner.data();
  args.unscaled_inner = call.data(lora);
  args.scaling = float(call.number(lora + 2));
  args.lora_factor = call.data(lora + 1);
  args.rank = args.lora_factor == nullptr ? 0 : call.tensor(lora).sizes[1];
  args.out = call.add(x.element, {args.M, product.C});
  Runtime runtime;
  if (args.M > 0 && product.C > 0) cpu::multiply(runtime, product, args, x.data());
}

// x, expert_offsets, the weights, bias (linear alone), lora_inner, lora_factor, scaling.
void multiply_grouped(Call& call, bool is_dgrad) {
  const Tensor& x = call.tensor(0);
  const size_t lora = is_dgrad ? 11 : 12;
  const Experts experts = experts_of(call, 2, call.tensor(1).count());
  const int64_t N = experts.first.N, K = experts.first.K, T = x.sizes[0];
  const cpu::Product product{is_dgrad, is_dgrad ? K : N, is_dgrad ? N : K};
  const std::vector<float> inner = scaled(call, lora, call.number(lora + 2));
  const int64_t rank = inner.empty() ? 0 : call.tensor(lora).sizes[1];
  const cpu::GroupedTerms terms{
      is_dgrad ? nullptr : call.data(11), rank, inner.data(), call.data(lora + 1), call.data(lora),
      float(call.number(lora + 2))};
  Runtime runtime;
  void* out = call.add(x.element, {T, product.C});
  cpu::multiply_grouped(runtime, product, experts, terms, call.data<int32_t>(1), x.dtype(), T, x.data(), out);
}

// small, wide, expert_offsets of grouped_lora_grad, scaling, dtype, transposed.
void lora_grad(Call& call, bool is_grouped) {
  const Tensor &small = call.tensor(0), &wide = call.tensor(1);
  const size_t rest = is_grouped ? 3 : 2;
  cpu::LoraGradArgs args{};
  args.wide = wide.data();
  args.dtype = wide.dtype();
  args.M = wide.sizes[0];
  args.C = wide.sizes[1];
  args.rank = small.sizes[1];
  args.scaling = call.number(rest);
  const int64_t element = call.integer(rest + 1);
  args.out_dtype = Dtype(element);
  args.transposed = call.integer(rest + 2) != 0;
  std::vector<int64_t> shape = {args.rank, args.C};
  if (args.transposed) shape = {args.C, args.rank};
  if (is_grouped) {
    const int64_t E = call.tensor(2).count();
    shape.insert(shape.begin(), E);
    args.out = call.add(element, shape);
    return cpu::sum_lora_grads(parallel_for, args, small.data(), call.data<int32_t>(2), E);
  }
  args.out = call.add(element, shape);
  const cpu::LoraGradKernel& kernel = *cpu::active_kernels()[cpu::choose_lora(args.dtype)].lora_grad;
  args.lora_inner_stride = ceil_div(args.M, 2) * 2;
  const Memory inner(args.rank * args.lora_inner_stride * cpu::element_bytes(kernel.inner_dtype));
  cpu::transpose_lora_inner(small.data(), args.dtype, args.M, args.rank, args.lora_inner_stride, kernel.inner_dtype,
                            inner.data());
  args.lora_inner = inner.data();
  Runtime::parallel_for(0, ceil_div(args.C, kernel.tile_c), 1,
                        [&](int64_t begin, int64_t end) { kernel.run(args, begin, end); });
}

void grouped_lora_inner(Call& call) {
  const Tensor &x = call.tensor(0), &factor = call.tensor(2);
  const bool transposed = call.integer(3) != 0;
  cpu::LoraInnerArgs args{};
  args.x = x.data();
  args.dtype = x.dtype();
  args.M = x.sizes[0];
  args.D = x.sizes[1];
  args.factor = factor.data();
  args.rank = factor.sizes[transposed ? 2 : 1];
  args.out = call.add(x.element, {args.M, args.rank});
  args.transposed = transposed;
  cpu::multiply_lora_inner(parallel_for, args, call.data<int32_t>(1), call.tensor(1).count());
}

// combine: rows, positions, weights, dtype; dgrad: dout, positions, weights, dtype; wgrad: dout, rows, positions, dtype.
void combine(Call& call, cpu::CombineFn cpu::CombineKernels::* kernel) {
  const bool is_dgrad = kernel == &cpu::CombineKernels::dgrad, is_wgrad = kernel == &cpu::CombineKernels::wgrad;
  const Tensor &in = call.tensor(0), &positions = call.tensor(is_wgrad ? 2 : 1);
  const int64_t T = positions.sizes[0];
  cpu::CombineArgs args{};
  args.top_k = positions.sizes[1];
  args.H = in.sizes[1];
  args.positions = positions.data<int32_t>();
  std::vector<float> weights(static_cast<size_t>(T * args.top_k), 1.f);
  if (!is_wgrad && call.data(2) != nullptr) weights = scaled(call, 2, 1.f);
  args.weights = weights.data();
  const Tensor& rows = call.tensor(is_wgrad ? 1 : 0);
  args.rows = rows.data();
  args.rows_dtype = rows.dtype();
  args.tokens = in.data();
  args.tokens_dtype = in.dtype();
  const int64_t element = call.integer(3);
  args.out_dtype = Dtype(element);
  args.out = call.add(element, is_wgrad   ? std::vector<int64_t>{T, args.top_k}
                               : is_dgrad ? std::vector<int64_t>{T * args.top_k, args.H}
                                          : std::vector<int64_t>{T, args.H});
  const cpu::CombineFn run = cpu::active_kernels().combine_experts->*kernel;
  Runtime::parallel_for(0, T, 1, [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

void add_text(Call& call, const std::string& text) {
  void* out = call.add(kUint8, {int64_t(text.size())});
  std::memcpy(out, text.data(), text.size());
}

const std::map<std::string, void (*)(Call&)> kOps = {
    {"isas", [](Call& call) { add_text(call, nf4kernels_cpu_isa_list()); }},
    {"isa", [](Call& call) { add_text(call, nf4kernels_cpu_isa()); }},
    {"force_isa",  // the error, empty if none
     [](Call& call) {
       const Tensor& name = call.tensor(0);
       const char* error = nf4kernels_force_cpu_isa(std::string(name.data<char>(), size_t(name.count())).c_str());
       add_text(call, error == nullptr ? "" : error);
     }},
    {"quantize", quantize},
    {"quantize_absmax", quantize_absmax},
    {"dequantize", dequantize},
    {"linear", [](Call& call) { multiply(call, false); }},
    {"linear_dgrad", [](Call& call) { multiply(call, true); }},
    {"grouped_linear", [](Call& call) { multiply_grouped(call, false); }},
    {"grouped_linear_dgrad", [](Call& call) { multiply_grouped(call, true); }},
    {"lora_grad", [](Call& call) { lora_grad(call, false); }},
    {"grouped_lora_grad", [](Call& call) { lora_grad(call, true); }},
    {"grouped_lora_inner", grouped_lora_inner},
    {"combine_experts", [](Call& call) { combine(call, &cpu::CombineKernels::combine); }},
    {"combine_experts_dgrad", [](Call& call) { combine(call, &cpu::CombineKernels::dgrad); }},
    {"combine_experts_wgrad", [](Call& call) { combine(call, &cpu::CombineKernels::wgrad); }},
};

void read(void* to, int64_t bytes) {
  if (std::fread(to, 1, size_t(bytes), stdin) != size_t(bytes)) std::exit(1);
}
int64_t read_integer() {
  int64_t value;
  read(&value, 8);
  return value;
}
void write_integer(int64_t value) { std::fwrite(&value, 8, 1, stdout); }

Argument read_argument() {
  Argument argument{};
  read(&argument.tag, 1);
  if (argument.tag == 'i') argument.integer = read_integer();
  if (argument.tag == 'd') read(&argument.number, 8);
  if (argument.tag == 't') {
    const int64_t element = read_integer();
    std::vector<int64_t> sizes(static_cast<size_t>(read_integer()));
    for (int64_t& size : sizes) size = read_integer();
    const Tensor& tensor = argument.tensor.emplace_back(element, std::move(sizes));
    read(tensor.data(), tensor.bytes());
  }
  return argument;
}

}  // namespace

int main() {
  for (std::string op; true; op.clear()) {
    int c = std::getchar();
    for (; c != '\n' && c != EOF; c = std::getchar()) op += char(c);
    if (c == EOF) return 0;
    Call call;
    for (int64_t left = read_integer(); left > 0; --left) call.arguments.push_back(read_argument());
    const auto found = kOps.find(op);
    if (found == kOps.end()) return 2;
    found->second(call);
    write_integer(int64_t(call.results.size()));
    for (const Tensor& result : call.results) {
      write_integer(result.element);
      write_integer(int64_t(result.sizes.size()));
      for (int64_t size : result.sizes) write_integer(size);
      std::fwrite(result.data(), 1, size_t(result.bytes()), stdout);
    }
    std::fflush(stdout);
  }
}
