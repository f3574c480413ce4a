#include "sim/symbols.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace simt {
namespace {

int find_module(dl_phdr_info* info, size_t, void* pointer) {
  Module& module = *static_cast<Module*>(pointer);
  const auto here = reinterpret_cast<uintptr_t>(&find_module);
  Module found;
  found.image.begin = UINTPTR_MAX;
  bool mine = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    if (header.p_type == PT_LOAD) {
      mine = mine || (here >= begin && here < begin + header.p_memsz);
      found.image.begin = std::min(found.image.begin, begin);
      found.image.end = std::max(found.image.end, begin + header.p_memsz);
    } else if (header.p_type == PT_TLS && info->dlpi_tls_data != nullptr) {
      found.thread_local_storage.begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
      found.thread_local_storage.end = found.thread_local_storage.begin + header.p_memsz;
    }
  }
  if (mine) module = found;
  return mine;
}

}  // namespace

Module this_module() {
  Module module;
  dl_iterate_phdr(find_module, &module);
  return module;
}

std::string source_line(const void* pc) {
  Dl_info info;
  if (dladdr(pc, &info) == 0) return "an unknown place";
  const auto address = reinterpret_cast<uintptr_t>(pc) - 1;  // in the call, not behind it
  char text[512];
  // An executable may be linked to a fixed address, which addr2line then expects.
  const auto base = reinterpret_cast<uintptr_t>(info.dli_fbase);
  const auto* header = static_cast<const ElfW(Ehdr)*>(info.dli_fbase);
  const auto location = static_cast<unsigned long long>(header->e_type == ET_EXEC ? address : address - base);
  snprintf(text, sizeof text, "addr2line -i -e '%s' 0x%llx 2>/dev/null", info.dli_fname, location);
  std::string first, last;
  if (FILE* pipe = popen(text, "r")) {
    while (fgets(text, sizeof text, pipe) != nullptr) {
      text[strcspn(text, " \n")] = '\0';
      const char* slash = strrchr(text, '/');
      last = slash != nullptr ? slash + 1 : text;
      if (first.empty()) first = last;
    }
    pclose(pipe);
  }
  if (!first.empty() && first[0] != '?') return first == last ? first : first + " (called from " + last + ")";
  snprintf(text, sizeof text, "%s+0x%llx", info.dli_fname, location);
  return text;
}

}  // namespace simt
