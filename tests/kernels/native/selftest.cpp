// Runs every function of the C interface under every instruction set that is available here, over awkward shapes,
// and compares: with a naive reference in double precision, with the other instruction sets bit by bit, with
// other numbers of threads, and with the same row alone.
//
// Prints one line for each instruction set and function, "avx2 qc_gated 0123456789abcdef": the checksum of all
// its results, which must not depend on the processor either. Exits with 1 and a message at the first fault.
#include <signal.h>

#include "attention_cases.h"
#include "draw_cases.h"
#include "layer_cases.h"
#include "linear_cases.h"
#include "row_cases.h"
#include "screen_cases.h"
#include "thread_cases.h"

namespace {

using namespace selftest;

struct Function {
  const char *name;
  void (*cases)(Examination &);
  double tolerance;     // of the magnitude that the reference gives; the errors found are a third of it or less
  bool medium = false;  // of products that not every instruction set has
};

constexpr Function kFunctions[] = {
    {"qc_linear_forward", highest_linear_cases, 1e-6},
    {"qc_lora_delta", delta_cases, 1e-6},
    {"qc_cache_write", write_cases, 0.0},
    {"qc_attention", attention_cases, 1e-6},
    {"qc_rms_norm", norm_cases, 1e-6},
    {"qc_rotary", rotary_cases, 1e-6},
    {"qc_gated", gated_cases, 1e-6},
    {"qc_argmax", argmax_cases, 0.0},
    {"qc_draw_tokens", draw_cases, 0.0},
    {"qc_layers_forward", highest_layer_cases, 1e-5},
    {"threads", thread_cases, 0.0},
    {"child_process", child_cases, 0.0},
    {"qc_likeliest", screen_cases, 0.0, true},
    {"qc_linear_forward/medium", medium_linear_cases, 1e-6, true},
    {"qc_layers_forward/medium", medium_layer_cases, 0.0, true},
};
constexpr const char *kIsas[] = {"generic", "neon", "avx2", "avx512"};  // by qc_isa

void outside(int) {
  if (Examination::current) Examination::current->fail("memory outside of the arguments was touched");
  _exit(1);
}

// All functions, or those that the command line names.
bool wanted(const char *function, int count, char **names) {
  for (int i = 1; i < count; ++i)
    if (strcmp(names[i], function) == 0) return true;
  return count <= 1;
}

}  // namespace

int main(int count, char **names) {
#if !defined(__SANITIZE_ADDRESS__)
  signal(SIGSEGV, outside);
  signal(SIGBUS, outside);
#endif
  if (qc_isa_available(99) || qc_isa_use(99) != -1) return fprintf(stderr, "FAILED: there is no 99th set\n"), 1;
  for (const Function &function : kFunctions) {
    if (!wanted(function.name, count, names)) continue;
    Record record = {};
    for (int32_t isa = QC_GENERIC; isa <= QC_AVX512; ++isa) {
      if (!qc_isa_available(isa) || (function.medium && qc_isa_bf16(isa) == QC_BF16_NONE)) continue;
      if (qc_isa_use(isa) != 0 || qc_isa_active() != isa) return fprintf(stderr, "FAILED to use %s\n", kIsas[isa]), 1;
      if (!record.isa) record.isa = kIsas[isa];
      Examination examination(kIsas[isa], function.name, function.tolerance, record);
      function.cases(examination);
      printf("%s %s %016llx\n", kIsas[isa], function.name, (unsigned long long)examination.checksum());
      fflush(stdout);
    }
    if (record.isa)
      fprintf(stderr, "%s: largest error %.1e of the magnitude, allowed %.1e\n", function.name, record.largest_error,
            function.tolerance);
  }
  return 0;
}
