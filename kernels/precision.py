"""Which precision products with the base's weights have, in torch's words. Knows no operation.

highest  activations and sums in float32
medium   activations rounded to bfloat16, sums in float32 (ADR 9)
"""

from typing import Literal

from kernels.library import native, status
from kernels.structs import Bfloat16

MatmulPrecision = Literal["highest", "medium"]
PrecisionChoice = Literal["auto", "highest", "medium"]


def has_medium() -> bool:
    """Whether the native kernels in use have products of medium precision."""
    library = native()
    return library is not None and library.bfloat16 is not Bfloat16.NONE


def automatic_precision() -> tuple[MatmulPrecision, str]:
    """What `auto` means with the native kernels in use, and why.

    A rule about the processor, never a measurement: answers are the same bits at every start.
    """
    library = native()
    if library is None or library.bfloat16 is Bfloat16.NONE:
        return "highest", f"{status().isa or 'torch'} has no bfloat16 products here; they need AVX512-BF16"
    if library.bfloat16 is Bfloat16.SLOWER:
        return "highest", "this processor's bfloat16 products without AMX are slower than its float32 ones"
    return "medium", "this processor's bfloat16 products are faster than its float32 ones"
