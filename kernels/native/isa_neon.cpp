// Every 64-bit ARM processor has these.
#include "isa.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define QC_USE_NEON
#define QC_ISA neon
#include "isa_table.h"

const qc::Kernels *const qc::neon_kernels = &qc::neon::kernels;
#else
const qc::Kernels *const qc::neon_kernels = nullptr;
#endif
