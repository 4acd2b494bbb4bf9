"""Keys of cache blocks: equal exactly when adapter, scale, salt, tenant and every token so far are."""

from hypothesis import given
from hypothesis import strategies as st

from server.prefix import PrefixChain

TOKENS = st.lists(st.integers(0, 3), min_size=8, max_size=8)
NAMES = st.sampled_from(["", "a", "b", "ab"])
WHO = st.tuples(NAMES, st.sampled_from([1.0, 0.5, -1.0]), NAMES, NAMES)


@given(WHO, WHO, TOKENS, TOKENS)
def test_keys_are_equal_exactly_when_all_that_matters_is(
    mine: tuple[str, float, str, str],
    other: tuple[str, float, str, str],
    tokens: list[int],
    others: list[int],
) -> None:
    first = PrefixChain(*mine[:3], block_tokens=4, tenant=mine[3]).keys(tokens, 2)
    second = PrefixChain(*other[:3], block_tokens=4, tenant=other[3]).keys(others, 2)
    for count in (1, 2):
        same = mine == other and tokens[: 4 * count] == others[: 4 * count]
        assert (first[count - 1] == second[count - 1]) == same


def test_keys_computed_bit_by_bit_are_those_computed_at_once() -> None:
    tokens = list(range(40))
    chain = PrefixChain("a", 1.0, "", 4)
    for count in range(11):
        chain.keys(tokens[: 4 * count], count)
    assert chain.keys(tokens, 10) == PrefixChain("a", 1.0, "", 4).keys(tokens, 10)
