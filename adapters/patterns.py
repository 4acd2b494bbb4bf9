"""Regular expressions that come inside an adapter: checked, then matched within a time budget.

PEFT matches them with `re`, which a hostile pattern can keep busy for ever. So only constructs that cannot
explode while compiling are let in, with the meaning they have in `re`, and matching runs on the `regex`
engine, which can be stopped. Knows nothing of what the patterns select.
"""

import re
import time
from dataclasses import dataclass, field
from functools import lru_cache

import regex

from adapters.errors import InvalidAdapterError
from adapters.strict_json import brief

MAX_PATTERN_CHARS = 2048
MAX_REPEAT = 64
MATCH_BUDGET_S = 5.0  # usual patterns against a whole model take milliseconds

_MAX_GROUP_DEPTH = 16
_ESCAPE = r"\\[dDwWsSbB./_^$*+?()\[\]{}|-]"
_TOKEN = re.compile(
    rf"""
      (?P<look>   \(\?[=!] )
    | (?P<open>   \((?:\?:|(?!\?)) )
    | (?P<close>  \) )
    | (?P<repeat> (?: [*+?] | \{{(?P<low>\d+)(?:,(?P<high>\d*))?\}} )\?? )
    | (?P<other>  \| | [\w.^$/:,\ -] | {_ESCAPE} | \[\^?(?:[\w.,/$()*+?]|\|(?!\|)|-(?!-)|{_ESCAPE})+\] )
    """,
    re.VERBOSE | re.ASCII,
)


@dataclass(slots=True)
class MatchBudget:
    """Processor time left for matching; one budget covers every pattern of an adapter."""

    seconds: float = MATCH_BUDGET_S

    def fullmatch(self, pattern: str, name: str) -> bool:
        """Whether the whole name matches, as `re.fullmatch` has it."""
        return self.match(rf"(?:{pattern})\Z", name) is not None

    def match(self, pattern: str, name: str) -> "regex.Match[str] | None":
        """The match at the start of the name, as `re.match` has it; the parts passed check_pattern."""
        began_s = time.thread_time()
        try:
            return _compile(pattern).match(name, timeout=self.seconds)
        except TimeoutError:
            raise InvalidAdapterError(
                f"the pattern {brief(pattern)} takes too long to match; name the modules in a list instead",
                reason="PATTERN_TOO_SLOW",
            ) from None
        finally:
            self.seconds = max(self.seconds - (time.thread_time() - began_s), 1e-6)


@dataclass(slots=True)
class _Group:
    is_lookahead: bool
    repeats: bool = field(default=False)


def check_pattern(pattern: str, source: str) -> None:
    """Refuses a pattern that `re` would not take, or that uses more than the constructs let in here.

    Raises:
        InvalidAdapterError: reason BAD_PATTERN, naming `source` and the construct.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        raise _bad(pattern, source, f"it is longer than {MAX_PATTERN_CHARS} characters")
    groups = [_Group(is_lookahead=False)]
    last = None
    position = 0
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        if token is None:
            raise _bad(pattern, source, f"what stands at character {position} is not allowed here")
        last = _take(token, groups, last, pattern, source)
        position = token.end()
    try:
        re.compile(pattern)
    except re.error as error:
        raise _bad(pattern, source, str(error)) from None


def _take(
    token: re.Match[str], groups: list[_Group], last: _Group | str | None, pattern: str, source: str
) -> _Group | str:
    """Follows one token; answers what a quantifier after it would repeat: a closed group, or its kind."""
    kind = str(token.lastgroup)
    if kind in ("open", "look"):
        groups.append(_Group(is_lookahead=kind == "look"))
        if len(groups) > _MAX_GROUP_DEPTH:
            raise _bad(pattern, source, f"groups nest more than {_MAX_GROUP_DEPTH} deep")
    elif kind == "close":
        if len(groups) == 1:
            raise _bad(pattern, source, "a closing parenthesis has no opening one")
        closed = groups.pop()
        groups[-1].repeats |= closed.repeats
        return closed
    elif kind == "repeat":
        _check_repeat(token, last, pattern, source)
        groups[-1].repeats = True
    return kind


def _check_repeat(token: re.Match[str], repeated: _Group | str | None, pattern: str, source: str) -> None:
    if any(int(count) > MAX_REPEAT for count in token.group("low", "high") if count):
        raise _bad(pattern, source, f"a count is above {MAX_REPEAT}")
    if repeated == "repeat":
        raise _bad(pattern, source, "a quantifier follows a quantifier")
    if not isinstance(repeated, _Group):
        return
    if repeated.is_lookahead:
        raise _bad(pattern, source, "a lookahead is repeated")
    if repeated.repeats and token.group() not in ("?", "??"):
        raise _bad(pattern, source, "a quantifier repeats a group that repeats something itself")


@lru_cache(maxsize=4096)
def _compile(pattern: str) -> "regex.Pattern[str]":
    return regex.compile(pattern, cache_pattern=False)


def _bad(pattern: str, source: str, why: str) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"{source}: the pattern {brief(pattern)} is refused, {why}; simplify it, or list module names",
        reason="BAD_PATTERN",
    )
