// The host executor behind executor.h: fibers, the schedule, collectives, background copies, the checks and the log of
// launches, and the C functions that executor.py calls.
#include "executor.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "races/counts.h"
#include "races/races.h"
#include "sites.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "tests/executor switches fibers in x86-64 assembly"
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Context switch: saves the calling fiber's callee-saved registers and stack pointer, and resumes another fiber.
// Rejected: swapcontext, whose two system calls make a switch 239 ns instead of 8.
extern "C" void nf4_executor_switch(void** from, void* to);
asm(R"(
.pushsection .text
.hidden nf4_executor_switch
.globl nf4_executor_switch
.type nf4_executor_switch, @function
nf4_executor_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size nf4_executor_switch, . - nf4_executor_switch
.popsection
)");

namespace nf4::cuda::executor {

std::string kernel_name(const void* function);  // kernel_name.cpp

int current;
bool in_kernel = false;
unsigned char* arena;
size_t arena_bytes;
unsigned char* stacks;

namespace {

constexpr size_t kStackBytes = kStacksBytes / kMaxThreads, kGuardBytes = 4096;
constexpr size_t kArenaAlignment = 128;
constexpr unsigned char kPoison = 0xff;  // NaN in every float type

enum class Schedule { kAscending, kDescending, kRandom };

struct Settings {
  Schedule schedule = Schedule::kAscending;
  unsigned seed = 0;
  bool copies_late = true;
  size_t shared_limit = 227 << 10;
};

struct Fiber {
  void* stack_pointer;
  const void* stack;
  size_t stack_bytes;
  void* fake_stack;  // AddressSanitizer's
};

struct Copy {
  void* shared;
  const void* global;
  bool valid;
  int group;
  Site site;
};

struct Thread {
  Fiber fiber{};
  bool exited = false;
  const char* waits_at = nullptr;  // the collective; null: runnable
  Site site{};
  void* operands = nullptr;
  std::vector<Copy> copies;  // issued and not yet waited for
  int groups = 0;            // committed
};

// A collective in progress: the threads of a block or warp that have arrived at it.
struct Meeting {
  const char* what = nullptr;
  Site site{};
  int arrived = 0;
};

std::mutex one_launch;
bool planning = false;  // launches are checked and logged, and not run
Settings settings;
unsigned grid_limit = 0;
std::string last_error;
std::map<std::string, int> launches;  // line of the log -> how many launches

const std::function<void()>* kernel_call;
std::vector<Thread> threads;
std::vector<unsigned char> runnable;  // one byte a thread, so that memchr finds the next
Meeting block_meeting;
std::vector<Meeting> warp_meetings;
Fiber scheduler;
std::string failure;
std::minstd_rand random_numbers;
size_t random_from;
bool random_upwards;

// Fibers.

void switch_fiber(Fiber& from, const Fiber& to, [[maybe_unused]] bool for_good = false) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
  nf4_executor_switch(&from.stack_pointer, to.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

[[noreturn]] void leave_for_good() {
  switch_fiber(threads[current].fiber, scheduler, true);
  __builtin_unreachable();
}

void run_thread() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
#endif
  (*kernel_call)();
  Thread& self = threads[current];
  if (!self.copies.empty()) fail(self.copies[0].site, "exits without having waited for this copy_async_16");
  sites_end_thread();
  self.exited = true;
  runnable[current] = 0;
  leave_for_good();
}

// Stacks stay mapped. The lowest page of each is a guard page: an overflow crashes instead of giving a wrong value.
unsigned char* stack_of(int thread) {
  if (stacks == nullptr) {
    void* all = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    for (int i = 0; i < kMaxThreads; ++i) {
      mprotect(static_cast<unsigned char*>(all) + i * kStackBytes, kGuardBytes, PROT_NONE);
    }
    stacks = static_cast<unsigned char*>(all);
  }
  return stacks + thread * kStackBytes;
}

Fiber new_fiber(int thread) {
  unsigned char* stack = stack_of(thread);
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack + kGuardBytes, kStackBytes - kGuardBytes);  // what the last thread left
#endif
  // The frame that nf4_executor_switch pops: six registers and the return address. At a function's entry the stack
  // pointer is 8 past a multiple of 16.
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  std::fill(top - 8, top, nullptr);
  top[-2] = reinterpret_cast<void*>(&run_thread);
  return {top - 8, stack + kGuardBytes, kStackBytes - kGuardBytes, nullptr};
}

// Collectives.

std::string describe(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string describe(const Thread& thread) {
  if (thread.exited) return "have exited";
  return thread.waits_at ? std::string("wait at ") + thread.waits_at + " (" + describe(thread.site) + ")" : "can run";
}

// "threads 0-15, 32 wait at shuffle (linear.cu:80); threads 16-31 have exited"
std::string describe_threads() {
  std::map<std::string, std::string> lists;
  const int count = int(threads.size());
  for (int begin = 0, end; begin < count; begin = end) {
    const std::string state = describe(threads[begin]);
    for (end = begin + 1; end < count && describe(threads[end]) == state;) ++end;
    std::string& list = lists[state];
    list += (list.empty() ? "" : ", ") + std::to_string(begin) + (end > begin + 1 ? "-" + std::to_string(end - 1) : "");
  }
  std::string text;
  for (const auto& [state, list] : lists) text += (text.empty() ? "threads " : "; threads ") + list + " " + state;
  return text;
}

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool joins(Meeting& meeting, const Thread& thread) {
  const bool at_its_site =
      meeting.arrived == 0 || (meeting.site.line == thread.site.line && same(meeting.site.file, thread.site.file) &&
                               same(meeting.what, thread.waits_at));
  meeting = {thread.waits_at, thread.site, meeting.arrived + 1};
  return at_its_site;
}

// Divergence: threads of one warp, or of one block at a barrier, that wait at different sites would wait for ever.
void come(const char* what, Site site, bool whole_block) {
  Thread& self = threads[current];
  self.waits_at = what;
  self.site = site;
  runnable[current] = 0;
  const bool with_warp = joins(warp_meetings[current / kLanes], self);
  if (with_warp && (!whole_block || joins(block_meeting, self))) return;
  failure = "divergent: " + describe_threads();
  leave_for_good();
}

void release(int begin, int end) {
  for (int i = begin; i < end; ++i) {
    threads[i].waits_at = nullptr;
    runnable[i] = 1;
    warp_meetings[i / kLanes].arrived = 0;
  }
}

void redraw() {
  random_from = random_numbers() % runnable.size();
  random_upwards = random_numbers() % 2;
}

// The schedule: the lowest or the highest runnable thread. Random: the nearest one above, or below, a random thread,
// which is redrawn about every 64 turns, so that some warps run far ahead.
int next_thread() {
  const unsigned char* all = runnable.data();
  const size_t count = runnable.size();
  bool upwards = settings.schedule == Schedule::kAscending;
  size_t from = upwards ? 0 : count;
  if (settings.schedule == Schedule::kRandom) {
    if (random_numbers() % 64 == 0) redraw();
    upwards = random_upwards;
    from = random_from;
  }
  const auto up = [&](size_t begin, size_t end) { return std::memchr(all + begin, 1, end - begin); };
  const auto down = [&](size_t begin, size_t end) { return memrchr(all + begin, 1, end - begin); };
  const void* found = upwards ? up(from, count) : down(0, from);
  if (found == nullptr) found = upwards ? up(0, from) : down(from, count);
  return found ? int(static_cast<const unsigned char*>(found) - all) : -1;
}

// Launches.

const std::string& name_of(const void* function) {
  static std::map<const void*, std::string> names;
  std::string& name = names[function];
  if (name.empty()) name = kernel_name(function);
  return name;
}

std::string describe(dim3 index) {
  return std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z);
}

// Runs block blockIdx. Returns whether all its threads reached their end.
bool run_block() {
  std::memset(arena, kPoison, arena_bytes);
  if constexpr (kRaces) {
    races::begin_block(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * uint64_t(blockIdx.z)), int(threads.size()));
  }
  block_meeting = {};
  std::fill(warp_meetings.begin(), warp_meetings.end(), Meeting{});
  std::fill(runnable.begin(), runnable.end(), 1);
  for (size_t i = 0; i < threads.size(); ++i) {
    threads[i] = Thread{};
    threads[i].fiber = new_fiber(int(i));
  }
  failure.clear();
  sites_begin_block();
  while ((current = next_thread()) >= 0) {
    threadIdx = {unsigned(current), 0, 0};
    if constexpr (kRaces) races::resume();
    in_kernel = true;
    switch_fiber(scheduler, threads[current].fiber);
    in_kernel = false;
    if (failure.empty()) continue;
    failure = ", thread " + std::to_string(current) + " at " + describe(threads[current].site) + ": " + failure;
    return false;
  }
  if constexpr (kRaces) counts::flush();
  for (const Thread& thread : threads) {
    if (thread.exited) continue;
    failure = ": deadlock: " + describe_threads();
    return false;
  }
  return true;
}

void perform(const Copy& copy) {
  if (copy.valid)
    std::memcpy(copy.shared, copy.global, 16);
  else
    std::memset(copy.shared, 0, 16);
}

}  // namespace

void fail(Site site, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  threads[current].site = site;
  failure = text;
  leave_for_good();
}

void meet_block(const char* what, Site site) {
  come(what, site, true);
  if (block_meeting.arrived == int(threads.size())) {
    block_meeting.arrived = 0;
    if constexpr (kRaces) {
      races::sync_block();
      counts::flush();
    }
    release(0, int(threads.size()));
  }
  switch_fiber(threads[current].fiber, scheduler);
}

void meet_warp(const char* what, Site site, void* operands, void (*perform)(void* const lanes[kLanes])) {
  const int thread = current, begin = thread / kLanes * kLanes;
  if (begin + kLanes > int(threads.size())) fail(site, "%s needs 32 lanes, got %d", what, int(threads.size()) - begin);
  threads[thread].operands = operands;
  come(what, site, false);
  if (warp_meetings[thread / kLanes].arrived == kLanes) {
    void* lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = threads[begin + i].operands;
    perform(lanes);
    if constexpr (kRaces) {
      if (same(what, "sync_warp")) races::sync_warp(begin / kLanes);
      counts::flush(begin / kLanes);
    }
    release(begin, begin + kLanes);
  }
  switch_fiber(threads[thread].fiber, scheduler);
}

void meet(const Barrier& barrier) {
  if (same(barrier.what, "sync_block"))
    meet_block(barrier.what, barrier.site);
  else
    meet_warp(barrier.what, barrier.site, nullptr, [](void* const*) {});
}
void meet_late_barrier() {
  if (const Barrier* late = take_late_barrier()) meet(*late);
}

void sync_block(Site site) {
  meet_late_barrier();
  if (sites_barrier("sync_block", site) == Change::kNone) meet({"sync_block", site});
}

void sync_warp(Site site) {
  meet_late_barrier();
  const Change change = sites_barrier("sync_warp", site);
  if (change == Change::kNone) meet({"sync_warp", site});
  if (change == Change::kUnordered) meet({"shuffle", site});
}

void* shared_arena() { return arena; }

int shared_limit() { return int(settings.shared_limit); }

void check_global(const void* p, size_t bytes, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail(site, "%s of %zu bytes at misaligned %p", what, bytes, p);
  if (p >= arena && p < arena + arena_bytes) fail(site, "%s of shared memory", what);
}

void load(void* to, const void* from, size_t bytes, Access access, const char* what, Site site) {
  check_global(from, bytes, what, site);
  if constexpr (kRaces) touch(from, bytes, access, __builtin_return_address(0));
  std::memcpy(to, from, bytes);
}

void fence_device(Site site) {
  if (reach("fence_device", site) == Change::kRemoved) return;
  if constexpr (kRaces) races::fence_device();
}

// Blocks run one after the other: what one wrote the next ones see.
uint32_t arrive(uint32_t* counter, uint32_t last, Site site) {
  check_global(counter, sizeof *counter, "arrive", site);
  if (reach("arrive", site) == Change::kRemoved) return last;
  if constexpr (kRaces) {
    touch(counter, sizeof *counter, Access::kArrive, __builtin_return_address(0));
    races::arrive(counter);
  }
  const uint32_t before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}

void copy_async_wait(int pending, Site site) {
  const Change change = reach("copy_async_wait", site);
  if (change == Change::kRemoved) return;
  if (change == Change::kShort) ++pending;
  Thread& self = threads[current];
  const auto unfinished = [&](const Copy& copy) { return copy.group >= self.groups - pending; };
  for (const Copy& copy : self.copies) {
    if (unfinished(copy)) continue;
    if (settings.copies_late) perform(copy);
    if constexpr (kRaces) races::land(copy.shared);
  }
  const auto rest = std::stable_partition(self.copies.begin(), self.copies.end(), unfinished);
  self.copies.erase(rest, self.copies.end());
}

cudaError_t run(const void* kernel, dim3 grid, int thread_count, size_t shared_bytes,
                const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> guard(one_launch);
  const std::string& name = name_of(kernel);
  sites_begin_launch(name);
  const std::string shape =
      "grid " + describe(grid) + " threads " + std::to_string(thread_count) + " shared " + std::to_string(shared_bytes);
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y - 1 >= 65535 || grid.z - 1 >= 65535 || thread_count < 1 ||
      thread_count > kMaxThreads) {
    last_error = "kernel " + name +
                 ": blocks must have 1 to 1024 threads and grids 1 to 2^31 - 1, 65535, 65535 blocks, got " + shape;
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > settings.shared_limit) {
    last_error = "kernel " + name + ": at most " + std::to_string(settings.shared_limit) +
                 " bytes of shared memory, got " + shape;
    return cudaErrorInvalidValue;
  }
  if (planning) {
    ++launches[shape + " " + name];
    return cudaSuccess;
  }
  void* memory = nullptr;
  if (!kRaces && posix_memalign(&memory, kArenaAlignment, shared_bytes) != 0) throw std::bad_alloc();
  const std::unique_ptr<void, decltype(&std::free)> owner(memory, &std::free);
  arena = kRaces ? races::place_arena() : static_cast<unsigned char*>(memory);
  arena_bytes = shared_bytes;
  kernel_call = &thread;
  threads.resize(thread_count);
  runnable.resize(thread_count);
  warp_meetings.resize((thread_count + kLanes - 1) / kLanes);
  if (grid_limit != 0) grid = dim3(min(grid.x, grid_limit), min(grid.y, grid_limit), grid.z);
  gridDim = grid;
  blockDim = dim3(thread_count);
  random_numbers.seed(settings.seed);
  redraw();
  if constexpr (kRaces) {
    races::begin_launch();
    counts::begin_launch(name);
  }
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  // Random: from any block on, in steps that come to every block.
  const bool is_random = settings.schedule == Schedule::kRandom;
  const uint64_t first = is_random ? random_numbers() % blocks : 0;
  uint64_t step = is_random ? 1 + random_numbers() % blocks : 1;
  while (std::gcd(step, blocks) != 1) ++step;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t block = settings.schedule == Schedule::kDescending ? blocks - 1 - i : (first + i * step) % blocks;
    blockIdx = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y), unsigned(block / grid.x / grid.y)};
    if (run_block()) continue;
    last_error = "kernel " + name + ", block (" + describe(dim3(blockIdx.x, blockIdx.y, blockIdx.z)) + ")" + failure;
    return cudaErrorLaunchFailure;
  }
  ++launches[shape + " " + name];
  return cudaSuccess;
}

}  // namespace nf4::cuda::executor

namespace nf4::cuda {

void copy_async_16(void* shared, const void* global, bool valid, executor::Site site) {
  using namespace executor;
  check_global(global, 16, "copy_async_16", site);
  auto* to = static_cast<unsigned char*>(shared);
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) fail(site, "copy_async_16 to misaligned %p", shared);
  if (to < arena || to + 16 > arena + arena_bytes) fail(site, "copy_async_16 to an address outside shared memory");
  sites_copy(shared);
  if constexpr (kRaces) {
    if (valid) touch(global, 16, Access::kReadOnly, __builtin_return_address(0));
    touch(shared, 16, Access::kCopy, __builtin_return_address(0));
  }
  Thread& self = threads[current];
  self.copies.push_back({shared, global, valid, self.groups, site});
  if (!settings.copies_late) perform(self.copies.back());
}

void copy_async_commit(executor::Site site) {
  using namespace executor;
  if (reach("copy_async_commit", site) == Change::kNone) ++threads[current].groups;
  sites_commit();
  meet_late_barrier();
}

}  // namespace nf4::cuda

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : nf4::cuda::executor::last_error.c_str();
}

// The C interface of executor.py.

#define NF4_EXECUTOR_API extern "C" __attribute__((visibility("default")))

// schedule: 0, 1 or 2 as in Schedule.
NF4_EXECUTOR_API void nf4_executor_set(int schedule, unsigned seed, bool copies_late, size_t shared_limit,
                                       bool mma_truncates) {
  using namespace nf4::cuda::executor;
  settings = {Schedule(schedule), seed, copies_late, shared_limit};
  nf4::cuda::executor::mma_truncates = mma_truncates;
}

// Every later launch has at most so many blocks along x and along y, so that a loop over the grid has more than one turn
// of few elements; 0: as many as it asks for.
NF4_EXECUTOR_API void nf4_executor_limit_grid(unsigned blocks) { nf4::cuda::executor::grid_limit = blocks; }

// Whether launches are checked and logged alone, at whatever size.
NF4_EXECUTOR_API void nf4_executor_plan(bool planning) { nf4::cuda::executor::planning = planning; }

NF4_EXECUTOR_API const char* nf4_executor_last_error() { return nf4::cuda::executor::last_error.c_str(); }

// The log, one line for each kind of launch: "<count> grid <x>,<y>,<z> threads <n> shared <bytes> <kernel>".
NF4_EXECUTOR_API const char* nf4_executor_launches() {
  static std::string text;
  text.clear();
  for (const auto& [launch, count] : nf4::cuda::executor::launches) text += std::to_string(count) + " " + launch + "\n";
  return text.c_str();
}

NF4_EXECUTOR_API void nf4_executor_reset() {
  nf4::cuda::executor::last_error.clear();
  nf4::cuda::executor::launches.clear();
  nf4::cuda::executor::sites_forget();
}
