"""What a line of the server's log looks like: for people, or as JSON for programs. Knows no event."""

import json
import logging
import re
import sys
import time
from typing import Final, Literal

LogFormat = Literal["text", "json"]

_TEXT: Final = "%(asctime)s %(levelname)s %(name)s %(message)s"
_FIELD: Final = re.compile(r"(?<!\S)([a-z_]+)=(\S*)")


class JsonFormatter(logging.Formatter):
    """One object to a line: time (UTC), level, logger, message, and its key=value pairs as `fields`.

    An exception's trace is the string `exception`, so that a line stays a line.
    """

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": message,
        }
        if fields := dict(_FIELD.findall(message)):
            line["fields"] = fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logging(log_format: LogFormat) -> None:
    """Lets every logger of the process write to standard error, from INFO on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
