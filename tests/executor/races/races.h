// The race detector of a build with races=True: its kernels are compiled with -fsanitize=thread, whose hooks (hooks.cpp)
// bring every load and store of theirs to touch().
//
// It keeps, for every word of shared and global memory, who wrote and read it last, and ends the launch at an access
// that nothing orders behind those. What orders, and no more than the hardware promises:
//   within a block    sync_block; sync_warp for the lanes of a warp. Shuffles and mma order nothing.
//   copies            a copy_async_16 writes from its issue until its thread's copy_async_wait, and may be seen by that
//                     thread after it, by the others after a barrier that follows it.
//   between blocks    fence_device and then arrive by the one block, arrive at the same counter and then fence_device by
//                     the other; a barrier may stand between a thread's access, its block's fence and its arrival. What
//                     is ordered so must be read with load_l2: an L1 need not know of another block's store.
//   load_cached, load_streamed and the sources of copies    what the launch does not write, whoever writes it.
// Words of which less than four bytes are accessed are kept byte by byte. Of blocks that have read a word only the last
// is remembered until another block writes it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../executor.h"

namespace nf4::cuda::executor {

#ifdef NF4_EXECUTOR_RACES
constexpr bool kRaces = true;
#else
constexpr bool kRaces = false;
#endif

namespace races {

// A block's shared memory, aligned to 128, in the middle of a range in which no other memory lies.
unsigned char* place_arena();

void begin_launch();
void begin_block(uint64_t index, int threads);
void resume();  // the current thread runs from here on
void sync_block();
void sync_warp(int warp);
void fence_device();
void arrive(const void* counter);
void land(const void* shared);  // the 16 bytes that a copy of this thread has written, when it has waited for them

void check(const void* address, size_t bytes, Access access, const void* pc);

}  // namespace races

// An access by the current thread from the instruction before `pc`: counts it if asked to, and checks it.
void touch(const void* address, size_t bytes, Access access, const void* pc);

// "linear_small.cuh:65": the source line of the instruction before pc, of the kernels and not of the executor.
struct Line {
  const char* file;
  int line;
};
Line line_of(const void* pc);

// What executor.cpp knows of the launch.
extern int current;     // the thread that runs
extern bool in_kernel;  // one of the launch's threads runs, and not the host
extern unsigned char* arena;
extern size_t arena_bytes;
constexpr int kMaxThreads = 1024;
constexpr size_t kStacksBytes = size_t(kMaxThreads) * (256 << 10);
extern unsigned char* stacks;  // of all threads

}  // namespace nf4::cuda::executor
