#include "counts.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <tuple>
#include <vector>

namespace nf4::cuda::executor::counts {

bool is_counting = false;

namespace {

enum class Space { kShared, kGlobal };

struct Instruction {
  const void* pc;
  Space space;
  Access access;
  size_t bytes;
  bool operator<(const Instruction& b) const {
    return std::tie(pc, space, access, bytes) < std::tie(b.pc, b.space, b.access, b.bytes);
  }
};

struct Total {
  uint64_t accesses = 0, ideal = 0, actual = 0;  // of whole warps; wavefronts or sectors
  void add(uint64_t least, uint64_t taken) {
    ++accesses;
    ideal += least;
    actual += taken;
  }
};

using Addresses = std::vector<uintptr_t>;
using Lanes = std::array<Addresses, kLanes>;           // of each lane, in the order of execution
std::vector<std::map<Instruction, Lanes>> unfinished;  // of each warp, since its last collective
std::map<std::string, std::map<Instruction, Total>> totals;
std::map<Instruction, Total>* own_totals;  // of the kernel that runs

// Of one access by one phase: the lanes that are served together.
uint64_t wavefronts(const Addresses& phase, size_t bytes) {
  std::array<std::set<uintptr_t>, 32> words_of_bank;
  for (const uintptr_t address : phase) {
    for (uintptr_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) words_of_bank[word % 32].insert(word);
  }
  size_t most = 0;
  for (const auto& words : words_of_bank) most = std::max(most, words.size());
  return most;
}

void add_shared(Total& total, const std::array<uintptr_t, kLanes>& lanes, size_t bytes) {
  const int phases = bytes == 16 ? 4 : bytes == 8 ? 2 : 1, width = kLanes / phases;
  uint64_t least = 0, taken = 0;
  for (int begin = 0; begin < kLanes; begin += width) {
    Addresses phase(lanes.begin() + begin, lanes.begin() + begin + width);
    phase.erase(std::remove(phase.begin(), phase.end(), 0), phase.end());
    least += !phase.empty();
    taken += wavefronts(phase, bytes);
  }
  total.add(least, taken);
}

void add_global(Total& total, const std::array<uintptr_t, kLanes>& lanes, size_t bytes) {
  constexpr size_t kSector = 32;
  std::set<uintptr_t> sectors, distinct;
  for (const uintptr_t address : lanes) {
    if (address == 0) continue;
    for (uintptr_t byte = address; byte < address + bytes; ++byte) {
      sectors.insert(byte / kSector);
      distinct.insert(byte);
    }
  }
  total.add((distinct.size() + kSector - 1) / kSector, sectors.size());
}

}  // namespace

void begin_launch(const std::string& kernel) {
  own_totals = &totals[kernel];
  unfinished.clear();  // of a launch that failed
}

void note(const void* address, size_t bytes, Access access, const void* pc) {
  constexpr size_t kMost = 16;  // an instruction's; what the host copies at once is more than one on a GPU
  const size_t warp = size_t(current) / kLanes, each = bytes <= kMost ? bytes : 4;
  if (unfinished.size() <= warp) unfinished.resize(warp + 1);
  const bool is_shared = address >= arena && address < arena + arena_bytes;
  const Instruction instruction{pc, is_shared ? Space::kShared : Space::kGlobal, access, each};
  Addresses& addresses = unfinished[warp][instruction][current % kLanes];
  for (size_t i = 0; i < bytes; i += each) addresses.push_back(uintptr_t(address) + i);
}

void flush(int warp) {
  if (size_t(warp) >= unfinished.size()) return;
  for (auto& [instruction, lanes] : unfinished[warp]) {
    for (size_t n = 0;; ++n) {
      std::array<uintptr_t, kLanes> nth{};  // 0: this lane has not executed it so often
      for (int lane = 0; lane < kLanes; ++lane) nth[lane] = n < lanes[lane].size() ? lanes[lane][n] : 0;
      if (std::all_of(nth.begin(), nth.end(), [](uintptr_t address) { return address == 0; })) break;
      const auto add = instruction.space == Space::kShared ? add_shared : add_global;
      add((*own_totals)[instruction], nth, instruction.bytes);
    }
  }
  unfinished[warp].clear();
}

void flush() {
  for (size_t warp = 0; warp < unfinished.size(); ++warp) flush(int(warp));
}

}  // namespace nf4::cuda::executor::counts

// The C interface of executor.py.

using namespace nf4::cuda::executor;

extern "C" __attribute__((visibility("default"))) void nf4_executor_count_accesses(bool on) {
  counts::is_counting = on;
}

// A line for each instruction of each kernel, with tabs between: the kernel, the place of the instruction after it in
// the library, "shared" or "global", "load", "store", "copy" or "arrive", bytes a lane, accesses of a warp, and the
// wavefronts or sectors that they need at least and that they take.
extern "C" __attribute__((visibility("default"))) const char* nf4_executor_accesses() {
  static std::string text;
  text.clear();
  for (const auto& [kernel, instructions] : counts::totals) {
    for (const auto& [at, total] : instructions) {
      Dl_info library{};
      dladdr(at.pc, &library);
      const char* access = at.access == Access::kWrite    ? "store"
                           : at.access == Access::kCopy   ? "copy"
                           : at.access == Access::kArrive ? "arrive"
                                                          : "load";
      char line[256];
      std::snprintf(line, sizeof line, "\t%td\t%s\t%s\t%zu\t%zu\t%zu\t%zu\n",
                    static_cast<const char*>(at.pc) - static_cast<const char*>(library.dli_fbase),
                    at.space == counts::Space::kShared ? "shared" : "global", access, at.bytes, size_t(total.accesses),
                    size_t(total.ideal), size_t(total.actual));
      text += kernel + line;
    }
  }
  return text.c_str();
}

extern "C" __attribute__((visibility("default"))) void nf4_executor_forget_accesses() { counts::totals.clear(); }
