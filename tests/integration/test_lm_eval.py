"""``examples/evaluate.py`` beside lm-evaluation-harness: every choice's log-likelihood, every prompt, the accuracy.

``make matrix`` installs it (``pip install 'argonne[evaluation]'``).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from argonne.inference.choices.collection import Selection, collect
from argonne.inference.choices.prompts import Score, answers, asked, introduction
from tests.inference.test_questions import write_csv
from tests.integration.runs import SCHEDULE, command, finish, start, succeed, write_corpus
from tests.warm import ROOT, environment

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'argonne[evaluation]'"),
]

ITEMS = 100
"""Of each of the two subjects."""
SUBJECTS = ("number_theory", "colours_and_things")
DESCRIPTIONS = {
    "letter": "The following are multiple choice questions (with answers) about {}.\n\n",
    "text": "The following are questions (with answers) about {}.\n\n",
}
TEMPLATES: dict[str, dict[str, Any]] = {
    "letter": {
        "doc_to_text": (
            "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
        ),
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
    },
    "text": {
        "doc_to_text": "Question: {{question.strip()}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    },
}
"""What its tasks of MMLU say, and those of MMLU's continuations."""
PRECISIONS = {"letter": ("fp32", "float32"), "text": ("fp64", "float64")}
"""Of each score, here and there. A text's is the sum of several tokens', of which float32 leaves 1e-4 and no more."""
HARNESS = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
folder, model, dtype, names, shots, longest, out = sys.argv[1:]
found = simple_evaluate(
    model="hf",
    model_args={"pretrained": model, "dtype": dtype, "max_length": int(longest)},
    tasks=names.split(","),
    num_fewshot=int(shots),
    batch_size=8,
    device="cpu",
    task_manager=TaskManager(include_path=folder),
    log_samples=True,
    bootstrap_iters=2,
)
told = {
    name: [
        {
            "number": one["doc_id"],
            "log_likelihoods": [value for ((value, _),) in one["resps"]],
            "requests": [[each["arg_0"], each["arg_1"]] for each in one["arguments"].values()]
            if isinstance(one["arguments"], dict) else one["arguments"],
            "acc": one["acc"], "acc_norm": one.get("acc_norm"),
        }
        for one in found["samples"][name]
    ]
    for name in names.split(",")
}
errors = {name: found["results"][name]["acc_stderr,none"] for name in names.split(",")}
json.dump({"samples": told, "errors": errors}, open(out, "w", encoding="utf-8"))
"""


def questions(subject: str, count: int, draw: random.Random) -> list[tuple[str, list[str], int]]:
    """Made up: of sums and remainders, or of colours, with choices of one word and of several."""
    things = ("snow", "grass", "blood", "the night sky", "a ripe lemon", "coal", "an old elephant", "fresh milk")
    colours = ("white", "green", "deep red", "dark blue, nearly black", "yellow", "black", "grey", "off-white")
    found = []
    for _ in range(count):
        if subject == "number_theory":
            a, b = draw.randint(2, 400), draw.randint(2, 30)
            text = draw.choice([f"What is the remainder of {a} divided by {b}?", f" How much is {a} less {b}?\n"])
            right = a % b if "remainder" in text else a - b
            wrong = draw.sample([value for value in range(right - 9, right + 9) if value != right], 3)
            choices = [str(value) for value in (right, *wrong)]
        else:
            place = draw.randrange(len(things))
            text = f"Which colour has {things[place]}, as most people would say{', at noon' * draw.randint(0, 9)}?"
            choices = [colours[place], *draw.sample([c for c in colours if c != colours[place]], 3)]
        answer = draw.randrange(4)
        choices[0], choices[answer] = choices[answer], choices[0]
        found.append((text, choices, answer))
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The questions in MMLU's CSV form, and the harness's tasks with the same as JSON lines."""
    path, draw = tmp_path_factory.mktemp("lm-eval"), random.Random(5)
    tasks = path / "tasks"
    tasks.mkdir()
    for subject in SUBJECTS:
        files = {}
        for split, count in (("dev", 5), ("test", ITEMS)):
            rows = questions(subject, count, draw)
            write_csv(path / "mmlu" / split / f"{subject}_{split}.csv", rows)
            lines = [json.dumps({"question": text, "choices": own, "answer": answer}) for text, own, answer in rows]
            files[split] = str(path / f"{subject}_{split}.jsonl")
            Path(files[split]).write_text("\n".join(lines) + "\n", encoding="utf-8")
        for score, template in TEMPLATES.items():
            task = {
                "task": f"{subject}_{score}",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": files},
                "test_split": "test",
                "fewshot_split": "dev",
                "fewshot_config": {"sampler": "first_n"},
                "output_type": "multiple_choice",
                "description": DESCRIPTIONS[score].format(subject.replace("_", " ")),
                "metric_list": [
                    {"metric": name, "aggregation": "mean", "higher_is_better": True}
                    for name in ("acc", *(("acc_norm",) if score == "text" else ()))
                ],
                **template,
            }
            (tasks / f"{task['task']}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    return path


def harness(home: Path, model: Path, score: str, shots: int, window: int) -> dict[str, Any]:
    names = [f"{subject}_{score}" for subject in SUBJECTS]
    words = [str(home / "tasks"), str(model), PRECISIONS[score][1], ",".join(names), str(shots), str(window)]
    words.append(str(home / "found.json"))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, *words], env=environment(**offline), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((home / "found.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make pretrain`` has written, or what a short run of the same shape writes."""
    home = ROOT / "runs" / "demo"
    if not home.exists():
        home = tmp_path_factory.mktemp("demo")
        write_corpus(home / "corpus")
        flags = {"--preset": "demo", "--data-glob": home / "corpus/*.parquet", "--output-dir": home / "run"}
        succeed("pretrain", SCHEDULE | {"--block-size": 256, "--total-steps": 8} | flags, 1)
        home = home / "run"
    return sorted(home.glob("step_*"))[-1]


def ours(home: Path, model: Path, score: str, shots: int, window: int, nproc: int) -> tuple[dict[str, Any], list[Any]]:
    """What is written: the results, and the answers."""
    out = home / f"{model.name}-{score}-{shots}-{nproc}"
    flags = {
        "--checkpoint-path": model,
        "--data": home / "mmlu",
        "--score": score,
        "--shots": shots,
        "--window": window,
        "--precision": PRECISIONS[score][0],
        "--device": "cpu",
        "--output-dir": out,
        "--uneven-shards": None,
    }
    done = finish(start(command("evaluate", flags, nproc)), timeout=3600)
    assert done.status == 0, done.output
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    return json.loads((out / "results.json").read_text(encoding="utf-8")), rows


def require_same(home: Path, model: Path, score: Score, shots: int, window: int, sizes: tuple[int, ...]) -> None:
    theirs = harness(home, model, score, shots, window)
    found = {nproc: ours(home, model, score, shots, window, nproc) for nproc in sizes}
    for subject in collect([home / "mmlu"], None, Selection(shots=shots)):
        samples = sorted(theirs["samples"][f"{subject.name}_{score}"], key=lambda one: one["number"])
        assert len(samples) == len(subject.asked) == ITEMS
        for question, one in zip(subject.asked, samples, strict=True):
            context = introduction(subject, score) + asked(question, score)
            assert one["requests"] == [[context, end] for end in answers(question, score)]
        for nproc, (results, rows) in found.items():
            own = sorted((row for row in rows if row["subject"] == subject.name), key=lambda row: row["number"])
            worst = 0.0
            for row, one in zip(own, samples, strict=True):
                pairs = zip(row["log_likelihoods"], one["log_likelihoods"], strict=True)
                worst = max(worst, *(abs(mine - its) for mine, its in pairs))
            print(f"{model.name} {score} {shots}-shot {subject.name} at {nproc}: {worst:.2e} apart")
            assert worst < 1e-4
            for kind, its in (("accuracy", "acc"), ("accuracy_normalised", "acc_norm")):
                if kind in results:
                    told = results[kind]["subjects"][subject.name]
                    assert told["correct"] == sum(one[its] for one in samples), (kind, nproc)
            told = results["accuracy"]["subjects"][subject.name]
            assert told["standard_error"] == pytest.approx(theirs["errors"][f"{subject.name}_{score}"])


CASES: list[tuple[Score, int]] = [("letter", 0), ("letter", 3), ("text", 0), ("text", 2)]


@pytest.mark.parametrize(("score", "shots"), CASES)
def test_smollm2_is_scored_as_the_harness_scores_it(home: Path, smollm2: Path, score: Score, shots: int) -> None:
    require_same(home, smollm2, score, shots, 2048, (1, 3))


@pytest.mark.parametrize(("score", "shots"), CASES)
def test_a_demo_checkpoint_is_scored_as_the_harness_scores_it(home: Path, demo: Path, score: Score, shots: int) -> None:
    """Its window is short: with questions shown, some texts lose their first tokens."""
    require_same(home, demo, score, shots, 160, (1, 3))
