// Behind sites.h, and the C functions of executor.py that belong to it.
#include "sites.h"

#include <deque>
#include <map>
#include <set>
#include <utility>
#include <vector>

namespace nf4::cuda::executor {

int source_mutant = 0;

namespace {

// A call of this launch, found by its pointers, so that no string is made of it.
struct Call : Barrier {
  Change change;
  bool before_copies;
};

struct ThreadSites {
  const Call* late = nullptr;       // a barrier that a mutant puts off
  Call* barrier = nullptr;          // the last one
  bool copies = false;              // since the last commit
  int steps = 0;                    // commits with copies
  std::vector<const void*> stages;  // where their first copies went, each place once
};

struct Pipeline {
  size_t stages;
  int fewest, most;
};

struct Mutant {
  std::string kernel, what, site;
  Change change = Change::kNone;
};

std::string current_kernel;
std::deque<Call> calls;  // whose elements stay where they are
std::vector<ThreadSites> own(1024);
std::set<std::string> reached;
std::map<std::string, Pipeline> pipelines;
Mutant mutant;

std::string text_of(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

void note(const char* what, Site site) {
  reached.insert(std::string(what) + " " + text_of(site) + " " + current_kernel);
}

Call& find(const char* what, Site site) {
  for (Call& call : calls)
    if (call.site.line == site.line && call.what == what && call.site.file == site.file) return call;
  note(what, site);
  const bool is_mutant = mutant.kernel == current_kernel && mutant.what == what && mutant.site == text_of(site);
  return calls.emplace_back(Call{{what, site}, is_mutant ? mutant.change : Change::kNone, false});
}

}  // namespace

void sites_forget() {
  reached.clear();
  pipelines.clear();
}

void sites_begin_launch(const std::string& kernel) {
  current_kernel = kernel;
  calls.clear();
}

void sites_begin_block() {
  for (unsigned i = 0; i < blockDim.x; ++i) {
    own[i].stages.clear();
    own[i] = {nullptr, nullptr, false, 0, std::move(own[i].stages)};
  }
}

void sites_end_thread() {
  const ThreadSites& self = own[threadIdx.x];
  if (self.steps == 0) return;
  Pipeline& all = pipelines.try_emplace(current_kernel, Pipeline{0, self.steps, 0}).first->second;
  all = {max(all.stages, self.stages.size()), min(all.fewest, self.steps), max(all.most, self.steps)};
}

Change reach(const char* what, Site site) { return find(what, site).change; }

Change sites_barrier(const char* what, Site site) {
  Call& call = find(what, site);
  ThreadSites& self = own[threadIdx.x];
  self.barrier = &call;
  if (call.change == Change::kLate) self.late = &call;
  return call.change;
}

void sites_copy(const void* shared) {
  ThreadSites& self = own[threadIdx.x];
  if (self.copies) return;
  self.copies = true;
  ++self.steps;
  if (std::find(self.stages.begin(), self.stages.end(), shared) == self.stages.end()) self.stages.push_back(shared);
  if (self.barrier == nullptr || std::exchange(self.barrier->before_copies, true)) return;
  note((std::string(self.barrier->what) + "-copies").c_str(), self.barrier->site);
}

void sites_commit() { own[threadIdx.x].copies = false; }

const Barrier* take_late_barrier() { return std::exchange(own[threadIdx.x].late, nullptr); }

}  // namespace nf4::cuda::executor

#define NF4_EXECUTOR_API extern "C" __attribute__((visibility("default")))

// What every kernel launched since nf4_executor_reset has reached, a line each: "<what> <file>:<line> <kernel>". What
// is a name of device.cuh, and once more with "-copies" for a barrier after which copies are begun before the next one.
NF4_EXECUTOR_API const char* nf4_executor_sites() {
  static std::string text;
  text.clear();
  for (const std::string& line : nf4::cuda::executor::reached) text += line + "\n";
  return text.c_str();
}

// The pipelines of copies of every kernel launched since, a line each: "<stages> <fewest> <most> <kernel>", the fewest
// and the most steps of a thread that copied.
NF4_EXECUTOR_API const char* nf4_executor_pipelines() {
  static std::string text;
  text.clear();
  for (const auto& [kernel, pipeline] : nf4::cuda::executor::pipelines) {
    text += std::to_string(pipeline.stages) + " " + std::to_string(pipeline.fewest) + " ";
    text += std::to_string(pipeline.most) + " " + kernel + "\n";
  }
  return text.c_str();
}

// From now on `what` at this site of this kernel is changed, see executor::Change; change 0: nothing is.
NF4_EXECUTOR_API void nf4_executor_change(const char* kernel, const char* what, const char* site, int change) {
  nf4::cuda::executor::mutant = {kernel, what, site, nf4::cuda::executor::Change(change)};
}

// Of the mutants in a copy of csrc, from 1 on; 0: none is on.
NF4_EXECUTOR_API void nf4_executor_source_mutant(int number) { nf4::cuda::executor::source_mutant = number; }
