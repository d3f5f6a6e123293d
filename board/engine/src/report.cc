#include "report.h"

#include <unistd.h>

#include <cstdlib>
#include <mutex>

#ifndef AXC_VERSION
#define AXC_VERSION "0"
#endif

namespace axc {
namespace {

constexpr size_t kLongest = 300;

bool quiet() {
  const char* value = std::getenv(kQuiet);
  return value && *value && std::string(value) != "0";
}

// Names in files are untrusted; only printable text goes to the terminal.
std::string printable(std::string text) {
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  for (char& character : text) {
    if (character < ' ' || character > '~') character = '?';
  }
  return text;
}

}  // namespace

void report_refused(const std::string& seen) {
  static std::mutex& mutex = *new std::mutex;  // clients may load from their own exit handlers
  static std::string& last = *new std::string;
  if (quiet()) return;
  const std::string line = "libax_engine (axc " AXC_VERSION ") refuses a model: " + printable(seen) +
                           "; expected an axmodel made by axc, whole, of format version 1 (" + kQuiet + "=1 hides this)\n";
  const std::scoped_lock lock(mutex);
  if (line == last) return;
  last = line;
  if (::write(STDERR_FILENO, line.data(), line.size()) < 0) last.clear();
}

}  // namespace axc
