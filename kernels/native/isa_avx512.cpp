// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma; used where the processor has them.
#include "isa.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

#define QC_USE_AVX512
#define QC_ISA avx512
#include "isa_table.h"

const qc::Kernels *const qc::avx512_kernels = &qc::avx512::kernels;
#else
const qc::Kernels *const qc::avx512_kernels = nullptr;
#endif
