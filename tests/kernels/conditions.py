"""What of the native library this machine has, for tests that need it."""

import pytest

from kernels.library import status
from kernels.precision import has_medium

needs_native = pytest.mark.skipif(not status().active, reason=f"no native kernels: {status().reason}")

KERNELS = ("native", "torch") if status().active else ("torch",)
"""Every value of `load_base(kernels=…)` that works here."""

PRECISIONS = ("highest", "medium") if has_medium() else ("highest",)
"""Every value of `load_base(matmul_precision=…)` besides "auto" that works here with native kernels."""
