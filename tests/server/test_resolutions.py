"""What references meant last: the newest meaning, nothing of what is gone, no more than asked for."""

from server.services.resolutions import Resolutions


def test_a_reference_means_what_it_was_resolved_to_last() -> None:
    known = Resolutions()
    known.remember("sql", "one")
    known.remember("sql@1", "one")
    known.remember("sql", "two")
    assert known.references_to({"one"}) == ["sql@1"]
    assert known.references_to({"two"}) == ["sql"]


def test_what_is_gone_is_meant_by_nothing() -> None:
    known = Resolutions()
    known.remember("sql", "one")
    known.remember("fr", "two")
    known.forget("one")
    assert known.references_to({"one", "two"}) == ["fr"]


def test_the_longest_unused_reference_goes_first() -> None:
    known = Resolutions(kept=2)
    for reference in ("a", "b", "a", "c"):
        known.remember(reference, "one")
    assert known.references_to({"one"}) == ["a", "c"]
