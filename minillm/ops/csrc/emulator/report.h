// What the emulated GPU tells of a call: how much was moved, what one block did, and the first thing that must not be
// done.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

namespace emulator {

struct Place {  // in the source of a kernel; line 0: a name
  const char* file;
  int line;
  bool operator==(const Place& other) const { return line == other.line && !std::strcmp(file, other.file); }
  const char* name() const { return std::strrchr(file, '/') ? std::strrchr(file, '/') + 1 : file; }
};

// Bytes; shuffles by single threads; tensor core products by warps; conflicts: times that ldmatrix must read again, as
// rows lie in the same banks of the memory. Python reads them by these names.
struct Counts {
  int64_t global_read, global_written, shared_read, shared_written, shuffles, mma, barriers, blocks, conflicts;
};

class Report {
 public:
  Counts counts{};
  std::string error, trace;

  // Only the first error is told: what comes after it is wrong because of it.
  __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) {
    if (!error.empty()) return;
    va_list arguments;
    va_start(arguments, format);
    error = text(format, arguments);
    va_end(arguments);
  }

 protected:
  __attribute__((format(printf, 2, 3))) void tell(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    trace += text(format, arguments);
    va_end(arguments);
  }
  void tell_header() {
    tell("  until                          global read  written    shared read  written   shuffles    mma\n");
    start_ = counts;
  }
  // A line of the trace: what the block did since the last one.
  void tell_phase(const Place& end) {
    char where[80];
    std::snprintf(where, sizeof where, end.line ? "barrier %s:%d" : "%s", end.name(), end.line);
    auto since = [&](int64_t Counts::*count) { return static_cast<long>(counts.*count - start_.*count); };
    tell("  %-30s %11ld %8ld %14ld %8ld %10ld %6ld\n", where, since(&Counts::global_read),
         since(&Counts::global_written), since(&Counts::shared_read), since(&Counts::shared_written),
         since(&Counts::shuffles), since(&Counts::mma));
    start_ = counts;
  }

 private:
  static std::string text(const char* format, va_list arguments) {
    char buffer[400];
    std::vsnprintf(buffer, sizeof buffer, format, arguments);
    return buffer;
  }
  Counts start_{};  // as they stood at the last line of the trace
};

}  // namespace emulator
