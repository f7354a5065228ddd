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
bool sites_barrier(Site site);        // whether the thread meets it here
void sites_copy(const void* shared);  // a copy_async_16
void sites_commit();

// The site of a kLate barrier that the thread has still to meet, null if there is none; it is then none.
const Site* take_late_barrier();

}  // namespace nf4::cuda::executor
