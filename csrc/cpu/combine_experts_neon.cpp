#include "decode_neon.h"

#include "combine_experts.h"

namespace nf4::cpu {

const CombineKernels kCombineExperts_neon{combine_tokens, combine_dgrad_tokens, combine_wgrad_tokens};

}  // namespace nf4::cpu
