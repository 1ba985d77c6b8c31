// What the library's own file tells: where it is loaded, its __shared__ variables, the source line of an instruction.
#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

#include "engine.h"
#include "memory.h"

namespace simt {

namespace {

// Makes sure that the library has a thread-local segment, and touching it that this OS thread has its copy.
thread_local char anchor;
ptrdiff_t anchor_offset;

int inspect(dl_phdr_info* info, size_t, void*) {
  const uintptr_t self = reinterpret_cast<uintptr_t>(&inspect);
  bool mine = false;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& segment = info->dlpi_phdr[i];
    mine |= segment.p_type == PT_LOAD && self - (info->dlpi_addr + segment.p_vaddr) < segment.p_memsz;
  }
  if (!mine) return 0;
  Module& m = module();
  m.base = info->dlpi_addr;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& segment = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
    if (segment.p_type == PT_LOAD) m.data.emplace_back(begin, begin + segment.p_memsz);
    if (segment.p_type == PT_TLS) {
      m.shared_begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
      m.shared_bytes = segment.p_memsz;
    }
  }
  return 1;
}

// "void k<4>(float*)::part" and such: the variable's own name is what a kernel author looks for.
std::string variable_name(const char* symbol) {
  int status = 0;
  char* text = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  std::string name = status == 0 ? text : symbol;
  free(text);
  const size_t colons = name.rfind("::");
  return colons == std::string::npos ? name : name.substr(colons + 2);
}

std::vector<SharedVariable> read_variables(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  const std::string file{std::istreambuf_iterator<char>(in), {}};
  std::vector<SharedVariable> variables;
  if (file.size() < sizeof(ElfW(Ehdr))) return variables;
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(file.data());
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(file.data() + header->e_shoff);
  for (int i = 0; i < header->e_shnum; i++) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(file.data() + sections[i].sh_offset);
    const char* names = file.data() + sections[sections[i].sh_link].sh_offset;
    for (size_t k = 0; k < sections[i].sh_size / sizeof *symbols; k++) {
      const auto& s = symbols[k];
      if (ELF64_ST_TYPE(s.st_info) == STT_TLS && s.st_shndx != SHN_UNDEF && s.st_size)
        variables.push_back(
            {s.st_value, s.st_size, variable_name(names + s.st_name), !strncmp(names + s.st_name, "_ZGV", 4)});
    }
  }
  std::sort(variables.begin(), variables.end(), [](const auto& a, const auto& b) { return a.offset < b.offset; });
  return variables;
}

}  // namespace

Module& module() {
  static Module m;
  return m;
}

const SharedVariable* Module::variable(size_t offset) const {
  const auto after = std::upper_bound(variables.begin(), variables.end(), offset,
                                      [](size_t at, const SharedVariable& v) { return at < v.offset; });
  if (after == variables.begin()) return nullptr;
  const SharedVariable& v = *(after - 1);
  return offset - v.offset < v.bytes ? &v : nullptr;
}

void locate_module() {
  Module& m = module();
  *static_cast<volatile char*>(&anchor) = 0;
  const uintptr_t at = reinterpret_cast<uintptr_t>(&anchor);
  if (!m.path.empty()) {
    m.shared_begin = at - anchor_offset;  // another OS thread may launch than last time
    return;
  }
  dl_iterate_phdr(inspect, nullptr);
  anchor_offset = at - m.shared_begin;
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&inspect), &info);
  m.path = info.dli_fname;
  m.variables = read_variables(m.path);
}

uint32_t module_offset(const void* pc) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc) - module().base);
}

std::string where_offset(uint32_t module_pc) {
  char command[4400];
  snprintf(command, sizeof command, "addr2line -iCe '%s' %#x", module().path.c_str(), module_pc - 1);
  std::string text;
  if (FILE* pipe = popen(command, "r")) {
    char line[4096];
    while (fgets(line, sizeof line, pipe)) {
      std::string place(line);
      place.erase(place.find_last_not_of('\n') + 1);
      place.erase(std::min(place.size(), place.find(" (discriminator")));
      text += (text.empty() ? " at " : " < ") + place;
    }
    pclose(pipe);
  }
  return text;
}

std::string where(const void* pc) { return where_offset(module_offset(pc)); }

}  // namespace simt
