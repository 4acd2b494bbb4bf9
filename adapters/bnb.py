"""The one door to bitsandbytes: imports it without its misleading warnings. Knows nothing of its use.

bitsandbytes looks for the Hugging Face package `kernels`, finds ours of that name, and warns that it falls
back to its own library; that library is what is wanted here. And it says of every product of an evaluated
int8 layer that it rounds activations to float16, which is how LLM.int8() works.
"""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "kernels-community" not in record.getMessage()
)

logging.getLogger("bitsandbytes.autograd._functions").addFilter(
    lambda record: "inputs will be cast" not in record.getMessage()
)

from bitsandbytes import functional  # noqa: E402  after the filters above
from bitsandbytes.cextension import lib  # noqa: E402  after the filters above
from bitsandbytes.nn import Linear4bit, Linear8bitLt  # noqa: E402  after the filters above

__all__ = ["Linear4bit", "Linear8bitLt", "functional", "lib"]
