"""The other end of server/templates.py: renders one template per line of input. Runs as a script of its own.

A template is a program that a stranger wrote. Jinja's sandbox keeps it from reaching anything; the limits
here keep it from taking the server's time or memory: at the alarm the kernel ends this process, and a new one
takes over.
"""

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

_MEMORY_BYTES = 512 << 20


def main(time_limit_s: float, max_answer_bytes: int) -> None:
    """Answers each request {"template", "messages", "tokens"} with {"text"} or {"error"}."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit_bytes = pages * resource.getpagesize() + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    for line in sys.stdin.buffer:
        request: dict[str, Any] = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, time_limit_s)  # nobody handles the alarm: it ends the process
        try:
            (text,), _ = render_jinja_template(
                conversations=[request["messages"]],
                chat_template=request["template"],
                add_generation_prompt=True,
                **request["tokens"],
            )
            size = len(text.encode())
            answer = (
                {"text": text}
                if size <= max_answer_bytes
                else {"error": f"it wrote {size} bytes, at most {max_answer_bytes} are allowed"}
            )
        except Exception as error:  # a template is data, and can fail in any way
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
