"""Lines of the log as JSON: each is one object, whatever was logged."""

import json
import logging
import sys

from server.logs import JsonFormatter


def line_of(message: str, *arguments: object, exc_info: object = None) -> dict[str, object]:
    record = logging.LogRecord("server.x", logging.INFO, "x.py", 1, message, arguments, exc_info)  # type: ignore[arg-type]  # as logging makes it
    text = JsonFormatter().format(record)
    assert "\n" not in text
    return dict(json.loads(text))


def test_fields_are_named_and_the_message_is_whole() -> None:
    line = line_of("request queued request_id=%s adapter=%s prompt_tokens=%d", "r 1", "base", 7)
    assert line["message"] == "request queued request_id=r 1 adapter=base prompt_tokens=7"
    assert line["fields"] == {"request_id": "r", "adapter": "base", "prompt_tokens": "7"}
    assert (line["level"], line["logger"]) == ("INFO", "server.x")
    assert str(line["time"]).endswith("Z")


def test_a_message_without_fields_has_none() -> None:
    assert "fields" not in line_of("stopped: a/b?c=d is a URL")


def test_what_would_break_a_line_is_escaped() -> None:
    assert line_of("said %s", 'two\nlines, a "quote" and é')["message"] == 'said two\nlines, a "quote" and é'


def test_an_exception_is_in_the_same_line() -> None:
    try:
        raise ValueError("no such thing")
    except ValueError:
        line = line_of("the engine died", exc_info=sys.exc_info())
    assert "no such thing" in str(line["exception"])
    assert "Traceback" in str(line["exception"])
