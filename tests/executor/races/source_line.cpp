// The source line of an instruction, for messages and for the counts of accesses.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "races.h"

namespace nf4::cuda::executor {

// Asks addr2line, which lists the line that was inlined first and the calls around it after it: the first one outside of
// the executor's own files is the kernel's.
Line line_of(const void* pc) {
  static std::map<const void*, std::pair<std::string, int>> known;
  auto [entry, is_new] = known.try_emplace(pc, "?", 0);
  auto& [file, line] = entry->second;
  Dl_info library;
  if (is_new && dladdr(pc, &library)) {
    const size_t offset = static_cast<const char*>(pc) - static_cast<const char*>(library.dli_fbase) - 1;
    char command[1200], text[1024];
    std::snprintf(command, sizeof command, "addr2line -i -e '%s' %#zx", library.dli_fname, offset);
    if (FILE* output = popen(command, "r")) {
      while (std::fgets(text, sizeof text, output)) {
        const std::string place = text;
        const size_t colon = place.rfind(':');
        if (colon == std::string::npos || place.find("executor.h:") != std::string::npos) continue;
        const size_t slash = place.rfind('/', colon);
        file = place.substr(slash + 1, colon - slash - 1);
        line = std::atoi(place.c_str() + colon + 1);
        break;
      }
      pclose(output);
    }
  }
  return {file.c_str(), line};
}

}  // namespace nf4::cuda::executor
