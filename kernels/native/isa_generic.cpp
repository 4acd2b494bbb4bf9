// Plain C++, on any processor: what the vector paths are compared with. Never chosen by itself.
#include "isa.h"

#define QC_ISA generic
#include "isa_table.h"

const qc::Kernels *const qc::generic_kernels = &qc::generic::kernels;
