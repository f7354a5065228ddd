#include "decode_neon.h"
#include "lora_inner.h"

namespace nf4::cpu {

void lora_inner_neon(const LoraInnerArgs& args, int64_t m_begin, int64_t m_end) {
  lora_inner_rows<InnerFp32, PackedFp32>(args, m_begin, m_end);
}

}  // namespace nf4::cpu
