// How the last block of several that share a piece of work finds out that it is the last: counters, in device memory
// from the start, that wrap to zero by themselves.
//
// Who: thread 0 of a block arrives for the block.
// Trick: a slot (bindings/arrival_slots.h) belongs to one stream, so that no two launches count in it at once. Every kernel file has
//   counters of its own, so that it asks the host for no address. Rejected: counters in a workspace, which a launch of
//   its own would set to zero; waiting for a block by a flag, which hangs where not all blocks are resident.
#pragma once

#include "arrivals.h"
#include "device.cuh"

namespace nf4::cuda {
namespace {

__device__ uint32_t arrival_counters[kArrivalSlots][kArrivals];

// Whether this block is the last of `count` to come to this counter, for all its threads. What the blocks wrote before
// is then read by load_l2. `shared` is a word of shared memory that nothing else uses until the next barrier.
NF4_DEVICE bool is_last_to_arrive(int slot, int counter, int count, uint32_t* shared) {
  sync_block();  // all threads have written
  if (threadIdx.x == 0) {
    fence_device();
    *shared = arrive(&arrival_counters[slot][counter], uint32_t(count - 1));
    fence_device();
  }
  sync_block();
  return *shared == uint32_t(count - 1);
}

}  // namespace
}  // namespace nf4::cuda
