// The threads that share one operation. Included once per instruction set.

struct Team {
  int index, count;
  void (*wait)();  // until all of the team are here

  void barrier() const {
    if (count > 1) wait();
  }
};

struct Range {
  int64_t begin, end;
};

// This thread's contiguous share of `total` pieces.
QC_INLINE Range share(int64_t total, const Team &team) {
  return {total * team.index / team.count, total * (team.index + 1) / team.count};
}

QC_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
QC_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
QC_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
