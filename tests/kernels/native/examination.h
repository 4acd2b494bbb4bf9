// One function of the C interface under one instruction set: its cases, their checksum, what a failure says.
#pragma once

#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include "support.h"

namespace selftest {

// A result may be off by tolerance · magnitude; where the magnitude is 0 it is exact.
struct Expected {
  double value, magnitude;
};

// What the first instruction set gave, case by case: the others must give the same bits.
struct Record {
  const char *isa;
  std::vector<std::vector<uint32_t>> cases;
  double largest_error = 0.0;
};

class Examination {
 public:
  Examination(const char *isa, const char *function, double tolerance, Record &record)
      : isa_(isa), function_(function), tolerance_(tolerance), record_(record), first_(record.isa == isa) {
    current = this;
  }
  ~Examination() { current = nullptr; }

  inline static Examination *current = nullptr;

  // Describes the case that follows, for messages.
  __attribute__((format(printf, 2, 3))) void begin(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(shape_, sizeof shape_, format, arguments);
    va_end(arguments);
  }

  __attribute__((format(printf, 2, 3))) [[noreturn]] void fail(const char *format, ...) const {
    fprintf(stderr, "FAILED %s, %s (%s): ", function_, isa_, shape_);
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    fflush(nullptr);
    _exit(1);
  }

  // Takes a case's results: into the checksum, and against the reference if this is the first instruction set.
  template <typename T, typename Reference>
  void settle(const Buffer<T> &got, Reference reference) {
    remember(got);
    if (!first_) return;
    const std::vector<Expected> expected = reference();
    if ((int64_t)expected.size() != got.size()) fail("the test expects %zu results", expected.size());
    for (int64_t i = 0; i < got.size(); ++i) near(i, (double)got[i], expected[(size_t)i]);
  }

  template <typename T>
  void settle_exactly(const char *what, const Buffer<T> &got, const Buffer<T> &expected) {
    remember(got);
    same(what, got.data(), expected.data(), got.size());
  }

  // The same bits, any NaN for any other.
  template <typename T>
  void same(const char *what, const T *got, const T *expected, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      if (canonical(got[i]) != canonical(expected[i]))
        fail("%s: value %lld is %.9g, not %.9g", what, (long long)i, (double)got[i], (double)expected[i]);
  }
  template <typename T>
  void same(const char *what, const Buffer<T> &got, const Buffer<T> &expected) const {
    same(what, got.data(), expected.data(), expected.size());
  }

  void all_nan(const char *what, const float *got, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      if (got[i] == got[i]) fail("%s: value %lld is %.9g, not NaN", what, (long long)i, (double)got[i]);
  }

  uint64_t checksum() const { return checksum_; }

 private:
  template <typename T>
  void remember(const Buffer<T> &got) {
    if (first_) record_.cases.emplace_back();
    std::vector<uint32_t> &known = record_.cases.at(index_++);
    for (int64_t i = 0; i < got.size(); ++i) {
      const uint32_t bits = canonical(got[i]);
      checksum_ = (checksum_ ^ bits) * 0x100000001B3u;  // FNV-1a, a word at a time
      if (first_)
        known.push_back(bits);
      else if (known.at((size_t)i) != bits)
        fail("value %lld is %08x, under %s %08x", (long long)i, bits, record_.isa, known[(size_t)i]);
    }
  }

  void near(int64_t i, double got, Expected expected) {
    const double error = fabs(got - expected.value), allowed = tolerance_ * expected.magnitude;
    const bool both_nan = got != got && expected.value != expected.value;
    const bool fits = both_nan || got == expected.value || error <= allowed;
    if (!fits)
      fail("value %lld is %.9g, should be %.9g ± %.2g", (long long)i, got, expected.value, allowed);
    if (!both_nan && expected.magnitude > 0.0 && error > 0.0)
      record_.largest_error = fmax(record_.largest_error, error / expected.magnitude);
  }

  const char *isa_, *function_;
  const double tolerance_;
  Record &record_;
  const bool first_;
  char shape_[256] = "";
  size_t index_ = 0;
  uint64_t checksum_ = 0xCBF29CE484222325u;
};

}  // namespace selftest
