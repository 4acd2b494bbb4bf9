// Small arithmetic. Included once per instruction set.

struct Range {
  int64_t begin, end;
};

QC_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
QC_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
QC_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
