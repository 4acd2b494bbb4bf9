"""The one door to bitsandbytes: imports it without its misleading warning. Knows nothing of its use.

bitsandbytes looks for the Hugging Face package `kernels`, finds ours of that name, and warns that it falls
back to its own library; that library is what is wanted here.
"""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "kernels-community" not in record.getMessage()
)

from bitsandbytes import functional  # noqa: E402  after the filter above
from bitsandbytes.cextension import lib  # noqa: E402  after the filter above
from bitsandbytes.nn import Linear4bit  # noqa: E402  after the filter above

__all__ = ["Linear4bit", "functional", "lib"]
