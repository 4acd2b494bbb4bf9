"""Patterns inside adapters: what is let in means what `re` says, and nothing keeps the server busy."""

import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import InvalidAdapterError
from adapters.layout import BaseLayout
from adapters.patterns import MatchBudget, check_pattern
from adapters.spec import parse_spec
from tests.adapters.builders import config_of

ATOMS = st.sampled_from(
    ["a", "b", ".", "ab", r"\.", r"\w", r"\d", "[ab]", "[^a]", "[a-c.]", r"[\d]", r"\b", "^", "$", "_", "1"]
)
REPEATS = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,}", "{0,2}", "{1,3}?"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: "(" + "|".join(parts) + ")"),
        st.tuples(inner, REPEATS).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        st.tuples(ATOMS, REPEATS).map("".join),
        inner.map(lambda expression: f"(?!{expression})"),
        inner.map(lambda expression: f"(?={expression})"),
    ),
    max_leaves=8,
)


@given(expression=EXPRESSIONS, name=st.text("ab1._", max_size=8))
@settings(max_examples=800, deadline=None)
def test_a_pattern_that_is_let_in_means_what_re_says(expression: str, name: str) -> None:
    try:
        check_pattern(expression, "target_modules")
    except InvalidAdapterError:
        return
    assert MatchBudget().fullmatch(expression, name) == bool(re.fullmatch(expression, name))
    key = rf"(.*\.)?({expression})$"
    assert bool(MatchBudget().match(key, name)) == bool(re.match(key, name))


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.(1[0-9]|2[0-3])\.(self_attn|mlp)\.(q|k|v|gate|up|down)_proj$",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))",
        r"^(?!.*visual).*(?:q_proj|v_proj).*$",
        r"model\.layers\.\d+\.(?:\w+\.)?q_proj",
    ],
)
def test_patterns_that_people_write_are_let_in(pattern: str) -> None:
    check_pattern(pattern, "target_modules")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(?:(?:a{9}){9}){9}",
        "(a|b*)*c",
        "a{65}",
        r"(a)\1",
        "(?P<n>a)(?P=n)",
        "(?i)a",
        "(?<=a)b",
        "a*+",
        "a**",
        "(?>a)",
        "(?:a){e<=1}",
        r"\p{L}",
        "[[:alpha:]]",
        "[a||b]",
        "a" * 3000,
        "(?:" * 40 + "a" + ")" * 40,
        "ä",
    ],
)
def test_patterns_that_could_explode_or_mean_something_else_are_refused(pattern: str) -> None:
    with pytest.raises(InvalidAdapterError) as refusal:
        parse_spec(config_of(target_modules=pattern))
    assert refusal.value.reason == "BAD_PATTERN"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(?:.?.?.?.?)?" * 150 + "[XY]"},
        {"rank_pattern": {f"{'[a-z0-9_.]{0,64}' * 100}[XY]{index}": 1 for index in range(50)}},
        {"exclude_modules": "(?:.*" * 10 + ")?" * 10 + "[xyz]"},
    ],
)
def test_a_slow_pattern_is_stopped_and_refused(
    fields: dict[str, Any], layout: BaseLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.spec.MatchBudget", lambda: MatchBudget(seconds=0.2))
    spec = parse_spec(config_of(**fields))
    began_s = time.thread_time()
    with pytest.raises(InvalidAdapterError) as refusal:
        spec.ranks_and_scalings(layout)
    assert refusal.value.reason == "PATTERN_TOO_SLOW"
    assert time.thread_time() - began_s < 2
