"""Questions in MMLU's CSV and Parquet forms and as JSON lines are the same questions; what is none is named."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from argonne.data.errors import DataError
from argonne.inference.choices.collection import Selection, Subject, collect

Rows = list[tuple[str, list[str], int]]
ANATOMY: Rows = [
    ('Where is the "heart",\nexactly? ', ["left, mostly", "right", "None", ""], 0),
    ("Which is a bone? ☃", ["skin", "femur", "hair", "nail"], 1),
    ("How many ribs?", ["2", "12", "24", "25"], 2),
]
LAW: Rows = [("Who judges?", ["a judge", "a jury", "both", "neither"], 3)]
TEST, DEV = {"anatomy": ANATOMY, "world_law": LAW}, {"anatomy": ANATOMY[1:], "world_law": LAW}


def write_csv(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([text, *choices, "ABCD"[answer]] for text, choices, answer in rows)


def write_parquet(path: Path, subjects: dict[str, Rows]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [(text, choices, answer, name) for name, own in subjects.items() for text, choices, answer in own]
    columns = zip(*rows, strict=True)
    pq.write_table(pa.table(dict(zip(("question", "choices", "answer", "subject"), columns, strict=True))), path)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def told(subjects: list[Subject]) -> Any:
    """All but where they were found."""
    plain = [[[(q.text, q.choices, q.answer) for q in each] for each in (s.shown, s.asked)] for s in subjects]
    return dict(zip([subject.name for subject in subjects], plain, strict=True))


def test_the_three_forms_have_the_same_questions(tmp_path: Path) -> None:
    for split, subjects in (("test", TEST), ("dev", DEV)):
        for name, rows in subjects.items():
            write_csv(tmp_path / "csv" / split / f"{name}_{split}.csv", rows)
            write_parquet(tmp_path / "hub" / name / f"{split}-00000-of-00001.parquet", {name: rows})
        write_parquet(tmp_path / "hub" / "all" / f"{split}-00000-of-00001.parquet", subjects)
        write_parquet(tmp_path / "one" / f"{split}.parquet", subjects)
        lines = [
            {"question": text, "choices": choices, "answer": form(choices, answer), "subject": name}
            for name, rows in subjects.items()
            for (text, choices, answer), form in zip(
                rows, (lambda c, a: a, lambda c, a: "ABCD"[a], lambda c, a: c[a]), strict=False
            )
        ]
        write_lines(tmp_path / "lines" / f"{split}.jsonl", lines)
    write_csv(tmp_path / "csv" / "auxiliary_train" / "science_middle.csv", ANATOMY)
    expected = {name: [[(t, tuple(c), a) for t, c, a in each] for each in (DEV[name][:1], TEST[name])] for name in TEST}
    for form in ("csv", "hub", "one", "lines"):
        assert told(collect([tmp_path / form], None, Selection(shots=1))) == expected, form
        (only,) = collect([tmp_path / form], None, Selection(subjects=("anatomy",), limit=2, split="dev"))
        assert told([only]) == {"anatomy": [[], expected["anatomy"][1][1:]]}
    files = [tmp_path / "csv" / "test" / "anatomy_test.csv", tmp_path / "csv" / "test" / "world_law_test.csv"]
    assert told(collect(files, tmp_path / "csv", Selection(shots=1))) == expected


def test_questions_of_no_subject_are_of_their_file_and_shown_before_any(tmp_path: Path) -> None:
    rows = [{"question": text, "choices": choices, "answer": answer} for text, choices, answer in ANATOMY]
    data, shown = (write_lines(tmp_path / name, rows) for name in ("trivia.jsonl", "few.jsonl"))
    (found,) = collect([data], shown, Selection(shots=2))
    assert (found.name, len(found.shown), len(found.asked)) == ("trivia", 2, 3)


GOOD = {"question": "Is it?", "choices": ["yes", "no", "A"], "answer": 1}
REFUSED: dict[str, tuple[str, list[Any], str]] = {
    "no answer": ("x.csv", ["q,1,2,3,4,A\n", "q,1,2,3\n"], "line 2 of .* has 4 columns; legal: 6"),
    "ragged": ("x.csv", ["q,1,2,3,4,A,more\n"], "line 1 of .* has 7 columns"),
    "header": ("x.csv", ["question,A,B,C,D,answer\n"], "line 1 of .* has answer='answer'; legal: A, B, C or D"),
    "quotes": ("x.csv", ['"a\nb",1,2,3,4,B\n', '"q"x,1,2,3,4,A\n'], "line 3 of .* is no CSV"),
    "unfinished": ("x.csv", ['"q,1,2,3,4,A\n'], "line 1 of .* is no CSV"),
    "empty": ("x.csv", [], "has no questions; legal: at least one"),
    "empty lines": ("x.jsonl", ["\n", " \n"], "has no questions"),
    "broken JSON": ("x.jsonl", [GOOD, "\n", '{"question": \n'], "line 3 of .* is no JSON"),
    "no object": ("x.jsonl", ["[1]\n"], "line 1 of .* is no JSON object"),
    "no field": ("x.jsonl", [{"question": "?", "choices": ["a", "b"]}], "line 1 of .* has no answer; legal"),
    "out of range": ("x.jsonl", [GOOD | {"answer": 3}], "has answer=3; legal: 0 to 2, A to C, or the text"),
    "no place": ("x.jsonl", [GOOD | {"answer": True}], "has answer=True; legal"),
    "no letter": ("x.jsonl", [GOOD | {"answer": "D"}], "has answer='D'; legal"),
    "two meanings": ("x.jsonl", [GOOD | {"answer": "A"}], "answer='A', which may be A and C; legal: a place"),
    "twice": ("x.jsonl", [GOOD | {"choices": ["b", "a", "a"], "answer": "a"}], "may be B and C"),
    "one choice": ("x.jsonl", [GOOD | {"choices": ["yes"]}], "has 1 choices; legal: 2 to 26"),
    "no text": ("x.jsonl", [GOOD | {"choices": ["yes", 2]}], r"has choices=\['yes', 2\]; legal: a list of texts"),
    "no question": ("x.jsonl", [GOOD | {"question": " "}], "has question=' '; legal: a text"),
    "no subject": ("x.jsonl", [GOOD | {"subject": 3}], "has subject=3; legal: a text"),
    "no Parquet": ("x.parquet", ["PAR1 is not enough"], "cannot be read"),
    "no ending": ("x.txt", [GOOD], "is no file of questions; legal: a name that ends in .csv, .parquet, .jsonl"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_question_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    file, rows, message = REFUSED[name]
    require_refused(lambda: collect([write_lines(tmp_path / file, rows)], None, Selection()), message)


def test_what_is_not_there_is_named_in_one_line(tmp_path: Path) -> None:
    write_csv(tmp_path / "mmlu" / "test" / "anatomy_test.csv", ANATOMY)
    home = tmp_path / "mmlu"

    def asked(*data: Path, shots_from: Path | None = None, **selection: Any) -> Callable[[], Any]:
        return lambda: collect(data or [home], shots_from, Selection(**selection))

    require_refused(asked(subjects=("law",)), "subjects='law' is not among those of the data; legal: anatomy")
    require_refused(asked(split="val"), "has no files of the split 'val'; legal: one of test")
    require_refused(asked(shots=1), "has no files of the split 'dev'; legal: one of test")
    (tmp_path / "empty").mkdir()
    require_refused(
        asked(tmp_path / "empty"), "'test'; legal: a directory with .csv, .parquet, .jsonl files in or named"
    )
    write_csv(home / "dev" / "anatomy_dev.csv", ANATOMY[:2])
    require_refused(asked(shots=3), "shots=3 is more than there are to show of anatomy, .*legal: 0 to 2")
    file = home / "test" / "anatomy_test.csv"
    require_refused(asked(file, shots=1), "shots=1 needs questions to show; legal: 0, or with --shots-from")
    write_csv(home / "dev" / "law_dev.csv", LAW)
    require_refused(asked(shots=1, shots_from=home / "dev" / "law_dev.csv"), "shots=1 is more .* legal: 0 to 0")
    require_refused(asked(tmp_path / "no.csv"), "no.csv' does not exist; legal: a file of questions")
    (tmp_path / "noise.csv").write_bytes(b"q,\xff\n")
    require_refused(asked(tmp_path / "noise.csv"), "is no text in UTF-8")
    pq.write_table(pa.table({"question": ["?"]}), tmp_path / "few.parquet")
    require_refused(asked(tmp_path / "few.parquet"), "has no column choices, answer; legal: question, choices, answer")


def require_refused(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as refusal:
        action()
    assert "\n" not in str(refusal.value)
