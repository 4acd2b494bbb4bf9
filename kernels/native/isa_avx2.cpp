// Compiled with -mavx2 -mfma; used where the processor has them.
#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#define QC_USE_AVX2
#define QC_ISA avx2
#include "isa_table.h"

const qc::Kernels *const qc::avx2_kernels = &qc::avx2::kernels;
#else
const qc::Kernels *const qc::avx2_kernels = nullptr;
#endif
