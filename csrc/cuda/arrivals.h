// The counters that blocks of a launch arrive at (arrivals.cuh): how many there are.
#pragma once

namespace nf4::cuda {

constexpr int kArrivals = 1024;     // counters a slot
constexpr int kArrivalSlots = 256;  // 1 MB of counters in each kernel file that has them

}  // namespace nf4::cuda
