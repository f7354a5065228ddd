// Which of a kernel file's slots of arrival counters (cuda/arrivals.cuh) a launch may use, decided on the host. Pure: this
// file knows no CUDA.
//
// Who: the binding asks with the id that CUDA gives the launch's stream, or while it is captured with the capture's and
//   the stream's handle. Ids are never given twice in a process.
// Trick: launches of one stream follow each other, and so do those of one stream within a graph: they may share a slot.
//   Two streams, or two graphs, may run at once and never share one. A launch needs no memory set to zero before it,
//   since counters return to zero by themselves.
// Needs: a captured graph must not be instantiated twice and both run at once (one instance never overlaps itself); nobody
//   sets a capture's dependencies anew, and no launch is programmatically dependent on the one before.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "../cuda/arrivals.h"

namespace nf4::binding {

using cuda::kArrivalSlots;
constexpr int kCapturedSlots = kArrivalSlots / 4 * 3;  // of which graphs, which may be many, take at most so many

class ArrivalSlots {
 public:
  // The slot of this stream (capture: 0) or of this stream's part of a captured graph; -1 where none is left.
  int of(uint64_t capture, uint64_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = slots_.find({capture, stream});
    if (found != slots_.end()) return found->second;
    if (slots_.size() == kArrivalSlots || (capture != 0 && captured_ == kCapturedSlots)) return -1;
    captured_ += capture != 0;
    return slots_[{capture, stream}] = int(slots_.size());
  }

  // Every slot is free again. Nothing may be running, and no graph of before may be launched any more.
  void forget() {
    const std::lock_guard<std::mutex> lock(mutex_);
    slots_.clear();
    captured_ = 0;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<uint64_t, uint64_t>, int> slots_;
  int captured_ = 0;
};

}  // namespace nf4::binding
