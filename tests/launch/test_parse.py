"""From words to a configuration: defaults that a program gives, switches both ways, and one line for what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from argonne.launch import Given, LaunchFlags, RestartFlags, named_flags, parse
from argonne.parallel import ArgonneError


@dataclass(frozen=True)
class Group:
    """A group of flags."""

    width: int = 3
    """Of something."""
    switch: bool = False
    """Off."""
    stream: bool = True
    """On."""
    place: Path | None = None
    """A path [nowhere]."""


@dataclass(frozen=True)
class Config:
    group: Group = field(default_factory=Group)
    launch: LaunchFlags = field(default_factory=LaunchFlags)
    given: Given = frozenset()


SAVED = Config(Group(width=7, switch=True, stream=False, place=Path("/a")), LaunchFlags(nproc=2))


def test_what_no_flag_names_is_as_the_default_has_it() -> None:
    assert parse(Config, [], default=SAVED) == SAVED
    found = parse(Config, ["--width", "5"], default=SAVED)
    assert found.group == Group(width=5, switch=True, stream=False, place=Path("/a"))
    assert found.launch == SAVED.launch
    assert found.given == {"width"}


@pytest.mark.parametrize("words", [["--switch"], ["--no-stream"], ["--switch", "--no-stream"]])
def test_a_switch_that_the_default_has_thrown_may_be_named_all_the_same(words: list[str]) -> None:
    assert parse(Config, words, default=SAVED).group == SAVED.group


def test_a_switch_that_the_default_has_thrown_can_be_thrown_back() -> None:
    assert parse(Config, ["--no-switch", "--stream"], default=SAVED).group == Group(7, False, True, Path("/a"))


@pytest.mark.parametrize("words", [["--no-switch"], ["--stream"]])
def test_without_a_default_a_switch_has_one_direction(words: list[str]) -> None:
    with pytest.raises(ArgonneError, match=words[0]):
        parse(Config, words)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--width", "many"], "width"),
        (["--width"], "width"),
        (["--frobnicate"], "--frobnicate"),
        (["--width", "3", "--width", "4"], "--width is given twice, as '3' and as '4'; legal: once"),
        (["--max-restarts", "1"], "--max-restarts"),
        (["--device", "abacus"], "device"),
    ],
)
def test_unusable_words_are_refused_in_one_line(words: list[str], named: str) -> None:
    with pytest.raises(ArgonneError) as refusal:
        parse(Config, words)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_named_flags_are_fields_however_they_are_spelled() -> None:
    assert named_flags(["--no-stream", "--width=3", "--local_rank", "0", "-1", "word"]) == {
        "stream",
        "width",
        "local_rank",
    }


def test_the_flags_of_launching_keep_their_names() -> None:
    @dataclass(frozen=True)
    class Restarting:
        launch: RestartFlags = field(default_factory=RestartFlags)

    words = ["--nproc", "4", "--device=cpu", "--local_rank", "1", "--max-restarts", "2"]
    assert parse(Restarting, words).launch == RestartFlags("cpu", 4, 1, 2)
