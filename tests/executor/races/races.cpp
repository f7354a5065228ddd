// The race detector behind races.h. Blocks run one after the other and each thread until its next collective, so that
// an access is ordered behind an earlier one if a barrier or an arrival lies between: no vector clocks are needed.
#include "races.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

namespace nf4::cuda::executor::races {
namespace {

// Time. An interval lies between two barriers of a block and has its own number in the launch, so that it names the
// block too; a warp's interval lies between two sync_warp of a block.

uint32_t interval;     // of the current block
uint32_t block_begin;  // its first interval
uint32_t launch_number;
std::vector<uint32_t> warp_intervals;  // of each warp
std::vector<uint16_t> fence_counts;    // of each thread: how many it has executed

struct Block {
  uint32_t begin;
  uint64_t index;
};
std::vector<Block> blocks;  // that have begun, in their order

const Block& block_of(uint32_t of) {
  return *(std::upper_bound(blocks.begin(), blocks.end(), of, [](uint32_t i, const Block& b) { return i < b.begin; }) -
           1);
}

int warp_of(int thread) { return thread / kLanes; }

// The last access of one kind to a word or byte.
struct Event {
  uint32_t interval = 0;  // 0: none
  uint32_t warp_interval : 31;
  uint32_t in_flight : 1;
  uint16_t thread = 0;
  uint16_t fences = 0;  // that the thread had executed
  uint32_t code = 0;    // the instruction's place in the library

  Event() : warp_interval(0), in_flight(0) {}
  explicit operator bool() const { return interval != 0; }
};
static_assert(sizeof(Event) == 16, "a word has four");

const char* const library_begin = [] {
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(&warp_of), &info);
  return static_cast<const char*>(info.dli_fbase);
}();

Event self;  // of the current thread
Event now(const void* pc) {
  Event event = self;
  event.code = uint32_t(static_cast<const char*>(pc) - library_begin);
  return event;
}

// Order between blocks.

struct Fence {
  int thread;
  uint32_t interval, warp_interval;
  int count;  // it is the thread's fence number `count`
};
// The first `arrivals` arrivals at a counter.
struct Seen {
  const void* counter;
  size_t arrivals;
};
// An arrival has seen those before it.
struct Sight {
  Seen seen;
  Event at;
};
struct Arrival {
  uint32_t block_begin, at;    // intervals
  uint32_t latest;             // interval of its fences
  std::vector<Fence> fences;   // of its block, before it
  std::vector<Seen> acquired;  // by its block, before one of these fences
};
std::map<const void*, std::vector<Arrival>> arrivals;  // of the launch, at each counter
std::vector<Fence> fences;                             // of the current block
std::vector<Sight> sights;                             // of the current block

// Within one block. A thread's own fences are told from its events by how many fences it had executed before.
bool is_before(const Event& event, const Fence& fence) {
  if (event.thread == fence.thread) return event.fences < fence.count;
  if (event.interval != fence.interval) return event.interval < fence.interval;
  return warp_of(event.thread) == warp_of(fence.thread) && event.warp_interval < fence.warp_interval;
}
bool is_before(const Fence& fence, const Event& event) {
  if (event.thread == fence.thread) return fence.count <= event.fences;
  if (event.interval != fence.interval) return fence.interval < event.interval;
  return warp_of(event.thread) == warp_of(fence.thread) && fence.warp_interval < event.warp_interval;
}

std::vector<Fence> fences_before(const Event& event) {
  std::vector<Fence> found;
  for (const Fence& fence : fences)
    if (is_before(fence, event)) found.push_back(fence);
  return found;
}

// What the current block had seen when one of these fences was executed.
std::vector<Seen> seen_before(const std::vector<Fence>& these) {
  std::vector<Seen> found;
  for (const Sight& sight : sights) {
    const auto sees = [&](const Fence& fence) { return is_before(sight.at, fence); };
    if (std::any_of(these.begin(), these.end(), sees)) found.push_back(sight.seen);
  }
  return found;
}

// counter -> how many of its arrivals the current thread has acquired, by itself or through other blocks.
std::map<const void*, size_t> acquired_now(const Event& self) {
  std::map<const void*, size_t> acquired;
  std::vector<Seen> open = seen_before(fences_before(self));
  while (!open.empty()) {
    const Seen seen = open.back();
    open.pop_back();
    size_t& count = acquired[seen.counter];
    const std::vector<Arrival>& at = arrivals[seen.counter];
    for (; count < seen.arrivals; ++count)
      open.insert(open.end(), at[count].acquired.begin(), at[count].acquired.end());
  }
  return acquired;
}

// Whether an access of an earlier block was released by it and acquired by the current thread.
bool is_acquired(const Event& event) {
  static Event of;
  static std::map<const void*, size_t> acquired;
  const auto same = [](const Event& a, const Event& b) {
    return a.interval == b.interval && a.warp_interval == b.warp_interval && a.thread == b.thread &&
           a.fences == b.fences;
  };
  static uint32_t of_launch;
  if (of_launch != launch_number || !same(of, self)) {
    acquired = acquired_now(self);
    of = self;
    of_launch = launch_number;
  }
  const uint32_t begin = block_of(event.interval).begin;
  for (const auto& [counter, count] : acquired) {
    const std::vector<Arrival>& at = arrivals[counter];
    const auto of_block = [](const Arrival& arrival, uint32_t begin) { return arrival.block_begin < begin; };
    auto arrival = std::lower_bound(at.begin(), at.begin() + long(count), begin, of_block);
    for (; arrival != at.begin() + long(count) && arrival->block_begin == begin; ++arrival) {
      if (event.interval < arrival->latest) return true;
      const auto releases = [&](const Fence& fence) { return is_before(event, fence); };
      if (std::any_of(arrival->fences.begin(), arrival->fences.end(), releases)) return true;
    }
  }
  return false;
}

bool is_of_this_block(const Event& event) { return event.interval >= block_begin; }

// Whether the current thread's next action is ordered behind the event.
bool is_ordered(const Event& event) {
  if (!is_of_this_block(event)) return is_acquired(event);
  if (event.thread == current || event.interval < interval) return true;
  const int warp = warp_of(current);
  return warp_of(event.thread) == warp && event.warp_interval < warp_intervals[warp];
}

// Shadow memory.

struct Cell {
  uint32_t valid = 0;       // the block or launch to which the rest belongs
  uint32_t bytes : 30;      // 1 + index of the cells of the word's four bytes; 0: it is kept whole
  uint32_t read_only : 1;   // load_cached or the like has read it
  uint32_t is_counter : 1;  // of arrivals
  Event written;
  Event read;                 // the last one,
  Event read_by_other_warp;   // the last one of its block by another warp than that,
  Event read_by_other_block;  // and the last one of another block
  uint32_t warps = 0;         // that have read in the interval of `read`
  uint32_t lanes = 0;         // of the warp of `read` that have read in its interval and warp interval

  Cell() : bytes(0), read_only(0), is_counter(0) {}
};

struct Shadow {
  std::deque<std::array<Cell, 4>> split;
  uint32_t valid = 0;

  void begin(uint32_t number) {
    valid = number;
    split.clear();
  }
  Cell& fresh(Cell& cell) const {
    if (cell.valid != valid) {
      cell = Cell{};
      cell.valid = valid;
    }
    return cell;
  }
  // Calls visit(cell) for the word's cell, or for those of its bytes [first, end) once a part of it has been accessed.
  template <class F>
  void visit(Cell& word, size_t first, size_t end, F&& visit) {
    fresh(word);
    if (word.bytes == 0 && first == 0 && end == 4) return visit(word);
    if (word.bytes == 0) {
      Cell byte = word;
      split.push_back({byte, byte, byte, byte});
      word.bytes = uint32_t(split.size());
    }
    for (size_t i = first; i < end; ++i) visit(split[word.bytes - 1][i]);
  }
};

constexpr size_t kWindow = 8 << 20, kArenaBegin = 4 << 20, kArenaMost = 256 << 10;
Shadow shared_shadow, global_shadow;
std::vector<Cell> shared_cells(kArenaMost / 4);

constexpr uintptr_t kPageBytes = 4096;
using Page = std::array<Cell, kPageBytes / 4>;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
constexpr size_t kPagesKept = 512;  // from launch to launch
struct RecentPage {
  uintptr_t number = 0;
  Page* page = nullptr;
};
std::array<RecentPage, 64> recent_pages;

Cell& global_cell(uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  RecentPage& recent = recent_pages[number % recent_pages.size()];
  if (recent.number != number) {
    std::unique_ptr<Page>& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    recent = {number, page.get()};
  }
  return (*recent.page)[address % kPageBytes / 4];
}

unsigned char* window() {
  static unsigned char* const begin = [] {
    void* all = mmap(nullptr, kWindow, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    return static_cast<unsigned char*>(all);
  }();
  return begin;
}

// Messages.

std::string where(const void* address) {
  char text[48];
  const auto* p = static_cast<const unsigned char*>(address);
  if (p >= arena && p < arena + arena_bytes)
    std::snprintf(text, sizeof text, "shared memory at %zu", size_t(p - arena));
  else
    std::snprintf(text, sizeof text, "global memory at %p", address);
  return text;
}

std::string describe(const Event& event) {
  std::string text = "thread " + std::to_string(event.thread);
  if (!is_of_this_block(event)) {
    const uint64_t i = block_of(event.interval).index;
    text += " of block (" + std::to_string(i % gridDim.x) + "," + std::to_string(i / gridDim.x % gridDim.y) + "," +
            std::to_string(i / gridDim.x / gridDim.y) + ")";
  }
  return text;
}

// "race: reads shared memory at 16, which thread 3 wrote at linear.cu:80: no barrier orders them"
[[noreturn]] void report(const void* address, Access access, const void* pc, const char* did, const Event& other,
                         const char* rule) {
  const char* does = access == Access::kWrite    ? "writes"
                     : access == Access::kCopy   ? "copies to"
                     : access == Access::kArrive ? "arrives at"
                                                 : "reads";
  const Line here = line_of(pc), there = line_of(library_begin + other.code);
  const std::string there_text = std::string(there.file) + ":" + std::to_string(there.line);
  fail({here.file, here.line}, "race: %s %s, which %s %s at %s: %s", does, where(address).c_str(),
       describe(other).c_str(), did, there_text.c_str(), rule);
}

constexpr char kInFlight[] = "the copy is in flight until that thread's copy_async_wait";
constexpr char kReadOnly[] = "what load_cached, load_streamed or a copy reads may not be written by the same launch";
constexpr char kCounter[] = "a counter of arrivals is for arrive alone";

const char* missing_order(const Event& other) {
  return is_of_this_block(other) ? "no barrier orders them" : "no fence_device and arrive order their blocks";
}

// Accesses.

bool is_write(Access access) { return access == Access::kWrite || access == Access::kCopy; }

void check_and_note_read(Cell& cell, const void* address, Access access, const void* pc) {
  const auto refuse = [&](const char* rule) { report(address, access, pc, "wrote", cell.written, rule); };
  if (cell.written) {
    if (!is_ordered(cell.written)) refuse(missing_order(cell.written));
    if (access == Access::kReadOnly) refuse(kReadOnly);
    if (access != Access::kReadL2 && !is_of_this_block(cell.written))
      refuse("what another block wrote is read by load_l2 alone");
  }
  if (cell.read_only) return;  // nothing may write it: no other reader need be known
  const int warp = warp_of(self.thread);
  if (cell.read && !is_of_this_block(cell.read)) {
    cell.read_by_other_block = cell.read;
    cell.read_by_other_warp = {};
  } else if (cell.read && warp_of(cell.read.thread) != warp) {
    cell.read_by_other_warp = cell.read;
  }
  const bool same_interval = cell.read.interval == self.interval;
  const bool same_lanes =
      same_interval && warp_of(cell.read.thread) == warp && cell.read.warp_interval == self.warp_interval;
  cell.warps = (same_interval ? cell.warps : 0) | 1u << warp;
  cell.lanes = (same_lanes ? cell.lanes : 0) | 1u << self.thread % kLanes;
  cell.read = now(pc);
  cell.read_only |= access == Access::kReadOnly;
}

void check_reads(const Cell& cell, const void* address, Access access, const void* pc) {
  const auto refuse = [&](const Event& read) { report(address, access, pc, "read", read, missing_order(read)); };
  if (cell.read_only) report(address, access, pc, "read", cell.read, kReadOnly);
  if (!is_of_this_block(cell.read) && !is_ordered(cell.read)) refuse(cell.read);
  if (cell.read_by_other_block && !is_ordered(cell.read_by_other_block)) refuse(cell.read_by_other_block);
  if (cell.read.interval != interval) return;
  const int warp = warp_of(current);
  if (warp_of(cell.read.thread) != warp) refuse(cell.read);
  if (cell.warps & ~(1u << warp)) refuse(cell.read_by_other_warp);
  const uint32_t others = cell.lanes & ~(1u << current % kLanes);
  if (cell.read.warp_interval != warp_intervals[warp] || others == 0) return;
  Event other = cell.read;
  other.thread = uint16_t(warp * kLanes + __builtin_ctz(others));
  refuse(other);
}

void check_and_note_write(Cell& cell, const void* address, Access access, const void* pc) {
  if (cell.written && !is_ordered(cell.written))
    report(address, access, pc, "wrote", cell.written, missing_order(cell.written));
  if (cell.read) check_reads(cell, address, access, pc);
  const uint32_t valid = cell.valid, bytes = cell.bytes;
  cell = Cell{};
  cell.valid = valid;
  cell.bytes = bytes;
  cell.written = now(pc);
  cell.written.in_flight = access == Access::kCopy;
}

void touch_cell(Cell& cell, const void* address, Access access, const void* pc) {
  if (access == Access::kArrive) {
    if (cell.written && !cell.is_counter) report(address, access, pc, "wrote", cell.written, kCounter);
    if (cell.read) report(address, access, pc, "read", cell.read, kCounter);
    cell.written = now(pc);
    cell.is_counter = true;
    return;
  }
  if (cell.is_counter) report(address, access, pc, "counted", cell.written, kCounter);
  if (cell.written.in_flight) report(address, access, pc, "copied to", cell.written, kInFlight);
  if (is_write(access))
    check_and_note_write(cell, address, access, pc);
  else
    check_and_note_read(cell, address, access, pc);
}

template <class F>
void visit(const unsigned char* p, size_t bytes, F&& visit) {
  const bool shared = p >= arena && p < arena + arena_bytes;
  for (const unsigned char* end = p + bytes; p < end;) {
    const size_t first = uintptr_t(p) % 4, count = std::min(4 - first, size_t(end - p));
    if (shared)
      shared_shadow.visit(shared_cells[size_t(p - arena) / 4], first, first + count, visit);
    else
      global_shadow.visit(global_cell(uintptr_t(p)), first, first + count, visit);
    p += count;
  }
}

}  // namespace

unsigned char* place_arena() { return window() + kArenaBegin; }

void begin_launch() {
  ++launch_number;
  interval = 0;
  blocks.clear();
  arrivals.clear();
  if (pages.size() > kPagesKept) {
    pages.clear();
    recent_pages = {};
  }
  global_shadow.begin(launch_number);
}

void begin_block(uint64_t index, int threads) {
  block_begin = ++interval;
  blocks.push_back({block_begin, index});
  warp_intervals.assign(warp_of(threads - 1) + 1, 0);
  fence_counts.assign(threads, 0);
  fences.clear();
  sights.clear();
  static uint32_t number;
  shared_shadow.begin(++number);
}

void sync_block() { ++interval; }

void sync_warp(int warp) { ++warp_intervals[warp]; }

void resume() {
  self.interval = interval;
  self.warp_interval = warp_intervals[warp_of(current)];
  self.thread = uint16_t(current);
  self.fences = fence_counts[current];
}

void fence_device() {
  const int count = ++fence_counts[current];
  resume();
  fences.push_back({current, interval, warp_intervals[warp_of(current)], count});
}

void arrive(const void* counter) {
  Arrival arrival{block_begin, interval, 0, fences_before(self), {}};
  for (const Fence& fence : arrival.fences) arrival.latest = std::max(arrival.latest, fence.interval);
  arrival.acquired = seen_before(arrival.fences);
  std::vector<Arrival>& at = arrivals[counter];
  sights.push_back({{counter, at.size()}, self});
  at.push_back(std::move(arrival));
}

void land(const void* shared) {
  visit(static_cast<const unsigned char*>(shared), 16, [](Cell& cell) {
    const uint32_t code = cell.written.code;
    cell.written = self;
    cell.written.code = code;
  });
}

void check(const void* address, size_t bytes, Access access, const void* pc) {
  const auto* p = static_cast<const unsigned char*>(address);
  if (size_t(p - window()) < kWindow && (p < arena || p + bytes > arena + arena_bytes)) {
    const Line line = line_of(pc);
    fail({line.file, line.line}, "%s %zu bytes at %td, outside of the block's %zu bytes of shared memory",
         is_write(access) ? "writes" : "reads", bytes, p - arena, arena_bytes);
  }
  visit(p, bytes, [&](Cell& cell) { touch_cell(cell, address, access, pc); });
}

}  // namespace nf4::cuda::executor::races
