"""Documents from the files of a Debian package: dictionaries, web pages, plain and reStructuredText files."""

from __future__ import annotations

import gzip
import string
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

PAGE_CHARACTERS = 2000
"""Entries of a dictionary are joined to pages of about so many: most are a line or two."""

_DIGITS = {digit: value for value, digit in enumerate(string.ascii_uppercase + string.ascii_lowercase + "0123456789+/")}


def dictionary(package: Path) -> Iterator[str]:
    """Pages of the entries of each dictionary in dictd's format: ``NAME.index`` beside ``NAME.dict.dz``."""
    for index in sorted(package.rglob("*.index")):
        text = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())  # dictzip is gzip that can be entered
        yield from pages(decode(text[start : start + length]) for start, length in spans(index.read_text("utf-8")))


def spans(index: str) -> list[tuple[int, int]]:
    """``(offset, length)`` of each entry once, in order, without those that describe the dictionary itself.

    A line of the index is a headword, an offset and a length, the two in base 64, with tabs between.
    Several headwords may lead to one entry.
    """
    entries, described = set(), set()
    for line in index.splitlines():
        headword, offset, length = line.split("\t")[:3]
        (described if headword.startswith("00") else entries).add((number(offset), number(length)))
    return sorted(entries - described)


def number(digits: str) -> int:
    """A number as dictd writes it: base 64, the most significant digit first."""
    value = 0
    for digit in digits:
        value = 64 * value + _DIGITS[digit]
    return value


def pages(entries: Iterable[str]) -> Iterator[str]:
    """Consecutive entries, joined until they reach ``PAGE_CHARACTERS``."""
    page: list[str] = []
    for entry in entries:
        page.append(entry)
        if sum(map(len, page)) >= PAGE_CHARACTERS:
            yield "".join(page)
            page = []
    if page:
        yield "".join(page)


def text_files(package: Path, folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """The files below ``folder`` that have one of ``suffixes``, compressed by gzip or not."""
    for path in sorted((package / folder).rglob("*")):
        name = Path(path.name.removesuffix(".gz"))
        if name.suffix in suffixes and path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            yield decode(gzip.decompress(content) if path.suffix == ".gz" else content)


def web_pages(package: Path, folder: str) -> Iterator[str]:
    """What a reader sees of the HTML files below ``folder``."""
    return (html_text(page) for page in text_files(package, folder, (".html",)))


def decode(content: bytes) -> str:
    """Text in UTF-8, or else in the encoding of old western files."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def html_text(page: str) -> str:
    """The words of a web page, one line for each block of them; not its head, scripts and navigation."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    lines = "".join(reader.pieces).splitlines()
    kept = [line.rstrip() for line in lines if line.strip()]
    return "\n".join(kept) + "\n" if kept else ""


class _Reader(HTMLParser):
    UNSEEN = frozenset({"head", "script", "style", "nav", "svg", "template", "noscript"})
    PHRASES = frozenset({"a", "abbr", "b", "cite", "code", "em", "i", "kbd", "q", "samp", "small", "span", "strong"})
    MARKS = frozenset({"del", "font", "img", "input", "ins", "sub", "sup", "tt", "u", "var", "wbr"})
    INLINE = PHRASES | MARKS
    VOID = frozenset({"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._unseen: list[str] = []
        """The tag that hides what follows, and those of the same name within it."""
        self._preformatted = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if self._unseen:
            if tag == self._unseen[0]:
                self._unseen.append(tag)
        elif tag in self.UNSEEN or (tag not in self.VOID and ("role", "navigation") in attributes):
            self._unseen.append(tag)
        else:
            self._preformatted += tag == "pre"
            self._break_line(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._unseen:
            if tag == self._unseen[0]:
                self._unseen.pop()
        else:
            self._preformatted -= tag == "pre" and self._preformatted > 0
            self._break_line(tag)

    def handle_data(self, data: str) -> None:
        if self._unseen:
            return
        if self._preformatted:
            self.pieces.append(data)
        elif words := " ".join(data.split()):
            before = " " if data[0].isspace() and self.pieces and not self.pieces[-1].endswith(("\n", " ")) else ""
            self.pieces.append(before + words + (" " if data[-1].isspace() else ""))
        elif self.pieces and not self.pieces[-1].endswith(("\n", " ")):
            self.pieces.append(" ")

    def _break_line(self, tag: str) -> None:
        if tag not in self.INLINE:
            self.pieces.append("\n")
