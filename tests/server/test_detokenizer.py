"""Pieces of text: joined they are the whole, and no character or stop string is ever cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.detokenizer import Detokenizer


class Bytes:
    """One token per byte, as byte-level tokenizers fall back to."""

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


def pieces(text: bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(Bytes(), stop)
    out = []
    for byte in text:
        out.append(detokenizer.add(byte))
        if detokenizer.stopped:
            return out, True
    out.append(detokenizer.finish())
    return out, detokenizer.stopped


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40))
def test_joined_pieces_are_the_text_and_characters_stay_whole(text: str) -> None:
    out, stopped = pieces(text.encode())
    assert "".join(out) == text
    assert not stopped
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in out)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=40))
def test_invalid_bytes_come_out_as_the_whole_decodes(data: bytes) -> None:
    out, _ = pieces(data)
    assert "".join(out) == data.decode("utf-8", errors="replace")


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(alphabet="abé", max_size=30),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    out, stopped = pieces(text.encode(), tuple(stop))
    # The stop that is complete first, at the earliest place it begins.
    for end in range(len(text) + 1):
        begins = [text[:end].index(s) for s in stop if s in text[:end]]
        if begins:
            assert stopped
            assert "".join(out) == text[: min(begins)]
            return
    assert not stopped
    assert "".join(out) == text


@pytest.mark.parametrize("stop", ["END", "EN", "E"])
def test_nothing_of_a_possible_stop_is_sent_early(stop: str) -> None:
    out, stopped = pieces(b"one END two", (stop,))
    assert stopped
    assert "".join(out) == "one "


def test_a_held_beginning_is_released_when_it_was_no_stop() -> None:
    out, stopped = pieces(b"one EN", ("END",))
    assert not stopped
    assert out[-1] == "EN"
    assert "".join(out) == "one EN"
