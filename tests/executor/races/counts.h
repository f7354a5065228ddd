// Counts what each access of a warp takes of the memory: wavefronts of shared memory, sectors of global memory.
//
// The accesses of a warp's 32 lanes that the hardware makes at once are those of one instruction that each lane executes
// for the n-th time since the warp's last collective. A wavefront serves each of the 32 banks (4 bytes) once, with one
// word for as many lanes as want it; 8 bytes a lane go in two half-warps, 16 bytes in four quarter-warps. Global memory
// is moved in sectors of 32 bytes.
// The widths are those of the source: nvcc may join neighbouring loads, which then need fewer wavefronts.
#pragma once

#include <cstddef>
#include <string>

#include "races.h"

namespace nf4::cuda::executor::counts {

extern bool is_counting;

void begin_launch(const std::string& kernel);
void note(const void* address, size_t bytes, Access access, const void* pc);
void flush();  // every warp's; all of a block's threads are at a barrier, or at their end
void flush(int warp);

}  // namespace nf4::cuda::executor::counts
