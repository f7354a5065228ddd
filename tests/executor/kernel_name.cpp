// The name of a kernel from its address, with its template arguments, so that launchers need not pass it.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>

namespace nf4::cuda::executor {

// Looks the address up in the library's own symbol table, which also has static functions and template instances, and
// shortens "nf4::cuda::(anonymous namespace)::scale_kernel<nf4::BFloat16>(float*)" to "scale_kernel<BFloat16>".
std::string kernel_name(const void* function) {
  Dl_info library;
  if (!dladdr(function, &library)) return "?";
  std::ifstream file(library.dli_fname, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  if (bytes.size() < sizeof(Elf64_Ehdr)) return "?";  // the file was rebuilt after it was loaded
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(bytes.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes.data() + header->e_shoff);
  const size_t offset = static_cast<const char*>(function) - static_cast<const char*>(library.dli_fbase);
  std::string name = "?";
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(bytes.data() + sections[s].sh_offset);
    const char* names = bytes.data() + sections[sections[s].sh_link].sh_offset;
    for (size_t i = 0; i < sections[s].sh_size / sizeof(Elf64_Sym); ++i) {
      if (symbols[i].st_value != offset || ELF64_ST_TYPE(symbols[i].st_info) != STT_FUNC) continue;
      std::unique_ptr<char, decltype(&std::free)> plain(
          abi::__cxa_demangle(names + symbols[i].st_name, nullptr, nullptr, nullptr), &std::free);
      name = plain ? plain.get() : names + symbols[i].st_name;
    }
  }
  for (const char* space : {"(anonymous namespace)::", "nf4::cuda::", "nf4::", "void "}) {
    for (size_t at; (at = name.find(space)) != std::string::npos;) name.erase(at, std::strlen(space));
  }
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (name[i] == '(' && depth == 0) name.resize(i);
  }
  return name;
}

}  // namespace nf4::cuda::executor
