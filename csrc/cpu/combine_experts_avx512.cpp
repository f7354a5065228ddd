#include "decode_avx512.h"

#include "combine_experts.h"

namespace nf4::cpu {

const CombineKernels kCombineExperts_avx512{combine_tokens, combine_dgrad_tokens, combine_wgrad_tokens};

}  // namespace nf4::cpu
