// Where kernels synchronize: which sites each kernel has reached, the mutants that change one, and how far the kernels'
// pipelines go round. executor.cpp tells it what happens, always of the thread threadIdx.x.
#pragma once

#include <string>

#include "executor.h"

namespace nf4::cuda::executor {

void sites_forget();
void sites_begin_launch(const std::string& kernel);
void sites_begin_block();
void sites_end_thread();
Change sites_barrier(const char* what, Site site);  // sync_block or sync_warp
void sites_copy(const void* shared);                // a copy_async_16
void sites_commit();

// The kLate barrier that the thread has still to meet; null if there is none, and none from then on.
struct Barrier {
  const char* what;
  Site site;
};
const Barrier* take_late_barrier();

}  // namespace nf4::cuda::executor
