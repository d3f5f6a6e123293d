#include "model.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <new>

namespace axc {

Mapping Mapping::of_file(const std::string& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw Failure(AXC_ENGINE_MISSING, path + ": " + std::strerror(errno));
  struct stat status {};
  const bool regular = ::fstat(file, &status) == 0 && S_ISREG(status.st_mode) && status.st_size > 0;
  void* memory = regular ? ::mmap(nullptr, static_cast<size_t>(status.st_size), PROT_READ, MAP_SHARED, file, 0) : MAP_FAILED;
  ::close(file);
  if (memory == MAP_FAILED) illegal(path + " is empty or cannot be mapped");
  return Mapping(Bytes(static_cast<const uint8_t*>(memory), static_cast<size_t>(status.st_size)));
}

Mapping Mapping::copy_of(Bytes bytes) {
  if (bytes.empty()) illegal("an empty file");
  void* memory = ::mmap(nullptr, bytes.size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  std::memcpy(memory, bytes.data(), bytes.size());
  return Mapping(Bytes(static_cast<const uint8_t*>(memory), bytes.size()));
}

Mapping::~Mapping() {
  if (!bytes_.empty()) ::munmap(const_cast<uint8_t*>(bytes_.data()), bytes_.size());
}

Model::Model(Mapping given)
    : mapping(std::move(given)), axmodel(read_axmodel(mapping.bytes())), graph(build_graph(axmodel)), program(fuse(graph)),
      takes_segments(axc::takes_segments(graph, program)) {
  for (const Group& group : axmodel.groups) {
    program.bytes(group.tokens, group.history);
    for (const std::vector<int>& list : {graph.inputs, graph.outputs}) {
      for (const int value : list) {
        if (bytes(value, group.tokens, group.history) > UINT32_MAX) illegal(graph.values[value].name + " is too large");
      }
    }
  }
}

uint64_t Model::bytes(int index, uint32_t tokens, uint32_t history) const {
  const Value& value = graph.values[index];
  uint64_t count = 1;
  for (const Dim& dim : value.shape) {
    const uint64_t size = static_cast<uint64_t>(dim.at(tokens, history));
    if (size && count > UINT64_MAX / 64 / size) illegal(value.name + " is too large");
    count *= size;
  }
  return (count * static_cast<uint64_t>(bits_of(value.type)) + 7) / 8;
}

}  // namespace axc
