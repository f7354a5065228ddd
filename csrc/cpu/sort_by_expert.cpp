// sort_by_expert: the row of every choice of an expert, sorted by expert and stable, and where each expert's rows end.
//
// Who          one thread: T = 4096 tokens of k = 8 are 32768 choices, 80 us beside the 134 MB of rows that threads
//              copy.
// Trick        Counting sort: counts, their sums, and a second pass that numbers each expert's choices.
// Rejected     torch's stable sort, a second one for its inverse, and searchsorted: 80 us of calls for one token,
//              against 19 of these ops.
// Bytes        8 read twice and 4 written a choice.
// Needs        fewer than 2^31 choices.
#include <vector>

#include "kernels.h"

namespace nf4::cpu {

int64_t sort_by_expert(const int64_t* experts_of, int64_t count, int64_t experts, int32_t* offsets,
                       int32_t* positions) {
  std::vector<int32_t> next(static_cast<size_t>(experts) + 2);  // [e + 1] counts, then [e] is the next row of e
  for (int64_t i = 0; i < count; ++i) {
    if (experts_of[i] < 0 || experts_of[i] > experts) return i;
    ++next[static_cast<size_t>(experts_of[i] + 1)];
  }
  for (size_t e = 1; e < next.size(); ++e) next[e] += next[e - 1];
  for (int64_t e = 0; e < experts; ++e) offsets[e] = next[static_cast<size_t>(e + 1)];
  for (int64_t i = 0; i < count; ++i) {
    const int32_t row = next[static_cast<size_t>(experts_of[i])]++;
    positions[i] = experts_of[i] == experts ? ~row : row;
  }
  return -1;
}

}  // namespace nf4::cpu
