// What the self-test stands on: repeatable numbers, fenced memory. Knows no operation.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <initializer_list>
#include <new>
#include <utility>
#include <vector>

#include "quickchange_kernels.h"

namespace selftest {

constexpr float kNaN = __builtin_nanf("");
constexpr float kUntouched = -12345.0f;  // fills what an operation must not write

// SplitMix64 (Steele, Lea & Flood 2014). Floats are exact fractions: the same numbers on every processor. Of the
// arguments of one call at most one may draw: compilers differ in which they evaluate first.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  int below(int n) { return (int)(bits() % (uint64_t)n); }
  bool coin() { return below(2) == 1; }
  template <typename T>
  T one_of(std::initializer_list<T> choices) {
    return choices.begin()[below((int)choices.size())];
  }
  float uniform() { return (float)((int64_t)(bits() >> 40) - (1 << 23)) / (float)(1 << 23); }  // [-1, 1)

 private:
  uint64_t state_;
};

inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

inline float widened(uint16_t half) { return float_of((uint32_t)half << 16); }

// To nearest, ties to even; NaN stays one.
inline uint16_t narrowed(float x) {
  const uint32_t u = bits_of(x);
  if (x != x) return (uint16_t)(u >> 16 | 0x40u);
  const uint32_t rest = u & 0xFFFFu, half = 0x8000u, kept = u >> 16;
  return (uint16_t)(kept + (rest > half || (rest == half && (kept & 1u))));
}

// Processors differ in the sign and the payload of the NaN that they make: any NaN counts as this one.
inline uint32_t canonical(float x) { return x == x ? bits_of(x) : 0x7FC00000u; }
inline uint32_t canonical(uint16_t half) { return canonical(widened(half)) >> 16; }
inline uint32_t canonical(int64_t index) { return (uint32_t)index; }

// Memory of exactly the needed size. Behind it lies a page that nothing may touch, which stops masked vector
// instructions too; AddressSanitizer does not see those, and brings its own fences for everything else.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size, T value = T()) : size_(size) {
    allocate((size_t)size * sizeof(T));
    for (T &each : *this) each = value;
  }
  explicit Buffer(const std::vector<T> &values) : Buffer((int64_t)values.size()) {
    for (int64_t i = 0; i < size_; ++i) data_[i] = values[(size_t)i];
  }
  Buffer(const Buffer &other) : Buffer(other.size_) {
    for (int64_t i = 0; i < size_; ++i) data_[i] = other.data_[i];
  }
  Buffer(Buffer &&other) noexcept { swap(other); }
  Buffer &operator=(Buffer other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { release(); }

  T *data() const { return data_; }
  int64_t size() const { return size_; }
  T *begin() const { return data_; }
  T *end() const { return data_ + size_; }
  T &operator[](int64_t i) const { return data_[i]; }

 private:
  void swap(Buffer &other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(pages_, other.pages_);
    std::swap(mapped_, other.mapped_);
  }
#if defined(__SANITIZE_ADDRESS__) || defined(SELFTEST_WITHOUT_FENCES)
  void allocate(size_t bytes) {
    data_ = (T *)malloc(bytes);
    if (!data_) throw std::bad_alloc();
  }
  void release() { free(data_); }
#else
  void allocate(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t used = (bytes + page - 1) / page * page;
    mapped_ = used + page;
    void *pages = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    pages_ = (char *)pages;
    mprotect(pages_ + used, page, PROT_NONE);
    data_ = (T *)(pages_ + used - bytes);
  }
  void release() {
    if (pages_) munmap(pages_, mapped_);
  }
#endif

  T *data_ = nullptr;
  int64_t size_ = 0;
  char *pages_ = nullptr;
  size_t mapped_ = 0;
};

// Rows of `width` floats, `ld` apart; the last row has nothing behind it.
struct Matrix {
  int rows, width;
  int64_t ld;
  Buffer<float> floats;

  Matrix(int rows, int width, int gap, float between)
      : rows(rows), width(width), ld(width + gap), floats(rows ? (rows - 1) * ld + width : 0, between) {}
  Matrix(const Matrix &source, int row) : Matrix(1, source.width, 0, 0.0f) {  // that row alone
    for (int i = 0; i < width; ++i) floats[i] = source.row(row)[i];
  }

  float *row(int r) const { return floats.data() + r * ld; }
  Matrix &random(Random &random, float scale) {
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < width; ++i) row(r)[i] = random.uniform() * scale;
    return *this;
  }
};

// What an operation reads; whoever looks between its rows sees NaN.
inline Matrix input(Random &random, int rows, int width, float scale = 1.0f) {
  return std::move(Matrix(rows, width, random.below(3) * 5, kNaN).random(random, scale));
}

// What an operation writes, rows and gaps.
inline Matrix output(Random &random, int rows, int width) {
  return Matrix(rows, width, random.below(3) * 5, kUntouched);
}

// Floats or bfloat16.
struct Typed {
  qc_type type = QC_F32;
  Buffer<float> floats;
  Buffer<uint16_t> halves;

  Typed() = default;
  Typed(qc_type type, int64_t size, float value = 0.0f) : type(type) {
    if (type == QC_BF16)
      halves = Buffer<uint16_t>(size, narrowed(value));
    else
      floats = Buffer<float>(size, value);
  }
  Typed &random(Random &random, float scale) {
    for (float &each : floats) each = random.uniform() * scale;
    for (uint16_t &each : halves) each = narrowed(random.uniform() * scale);
    return *this;
  }
  void *data() const { return type == QC_BF16 ? (void *)halves.data() : (void *)floats.data(); }
  float at(int64_t i) const { return type == QC_BF16 ? widened(halves[i]) : floats[i]; }
  void put(int64_t i, float value) const {
    if (type == QC_BF16)
      halves[i] = narrowed(value);
    else
      floats[i] = value;
  }
};

}  // namespace selftest
