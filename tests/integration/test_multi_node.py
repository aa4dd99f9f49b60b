"""Several nodes, as so many launchers on this one: torchrun agents, ranks started by hand, schedulers' scripts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.runs import (
    ROOT,
    Finished,
    agents,
    finish,
    free_port,
    metrics,
    outlive,
    ranks_of,
    start,
    succeed,
    wait_for_steps,
    words_of,
)

pytestmark = pytest.mark.slow

SCRIPTS = ROOT / "examples" / "launch"
# The global batch of the other runs, 4, with two replicas.
TWO_BY_TWO = {"--gradient-accumulation-steps": 1, "--tensor-parallel": 2, "--data-parallel": 2}


def by_hand(flags: dict[str, Any], each: int = 2) -> list[subprocess.Popen[str]]:
    """``by_hand.sh`` for each of two nodes."""
    script, port = str(SCRIPTS / "by_hand.sh"), str(free_port())
    return [
        start(
            [script, str(first), str(each), str(2 * each), "127.0.0.1", "--", *words_of(flags)],
            MASTER_PORT=port,
            PYTHON=sys.executable,
        )
        for first in (0, each)
    ]


def finish_all(jobs: list[subprocess.Popen[str]]) -> list[Finished]:
    done = [finish(job) for job in jobs]
    for node in done:
        assert node.status == 0, "\n---\n".join(node.output for node in done)
    return done


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every whole weight of the newest checkpoint."""
    newest = sorted(directory.glob("step_????????"))[-1]
    return {name: value for path in newest.glob("model-*.safetensors") for name, value in load_file(path).items()}


def assert_same_run(found: Path, expected: Path) -> None:
    """One run in two layouts: the same data to the bit, losses and weights as near as float32 sums are."""
    ours, theirs = metrics(found), metrics(expected)
    assert [line["step"] for line in ours] == list(range(1, 13))
    assert [line["batch_hash"] for line in ours] == [line["batch_hash"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)
    weights, reference = tensors(found), tensors(expected)
    assert weights.keys() == reference.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, reference[name], rtol=0, atol=1e-3, msg=lambda text, name=name: name + text)


@pytest.fixture(scope="module")
def dense(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the same run in one process."""
    directory = tmp_path_factory.mktemp("dense")
    succeed("pretrain", {**flags, "--output-dir": directory}, nproc=1)
    return directory


@pytest.mark.exhaustive  # a scheduler's script starts two agents too
def test_two_torchrun_agents_train_stop_and_continue_as_one_process_does(
    flags: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    both = {**flags, **TWO_BY_TWO, "--output-dir": tmp_path}
    finish_all(agents({**both, "--stop-at-step": 5}))
    assert metrics(tmp_path)[-1]["step"] == 5
    done = finish_all(agents(both))
    assert sum("continuing from" in node.output for node in done) == 1, "not exactly one rank of all nodes speaks"
    assert_same_run(tmp_path, dense)


REFUSAL = """
import torch
from argonne.parallel import ArgonneError, Layout, process_groups
from argonne.launch import guarded
from argonne.parallel.communication.collectives import barrier

def body():
    with process_groups(Layout(tensor=4), torch.device("cpu")) as groups:
        if groups.world.rank == 0:
            raise ArgonneError("this is refused")
        barrier(groups.world)

guarded(body)
"""


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_what_one_rank_refuses_ends_both_nodes_whichever_keeps_the_store(tmp_path: Path, host: int) -> None:
    """An agent that started its ranks again would wait for the other's for ten minutes."""
    script = tmp_path / "refusal.py"
    script.write_text(REFUSAL)
    done = [finish(job) for job in agents({}, restarts=3, script=script, host=host)]
    assert all(node.status != 0 for node in done)
    lines = [line for node in done for line in node.output.splitlines() if line.startswith("argonne: error: ")]
    assert lines == ["argonne: error: this is refused"]


def test_ranks_started_by_hand_on_two_nodes_train_as_one_process_does(
    flags: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    finish_all(by_hand({**flags, "--gradient-accumulation-steps": 1, "--output-dir": tmp_path}))
    assert_same_run(tmp_path, dense)
    assert metrics(tmp_path)[0]["layout"] | {"tensor": 2, "data": 2} == metrics(tmp_path)[0]["layout"]


@pytest.mark.slow
def test_a_rank_lost_by_hand_ends_the_ranks_of_every_node(flags: dict[str, Any], tmp_path: Path) -> None:
    long = {"--gradient-accumulation-steps": 1, "--total-steps": 100_000, "--save-interval": 100_000}
    jobs = by_hand({**flags, **long, "--output-dir": tmp_path})
    wait_for_steps(jobs[0], tmp_path, 2)
    pids = {rank: pid for job in jobs for rank, pid in ranks_of(job).items()}
    assert sorted(pids) == [0, 1, 2, 3]
    os.kill(pids[3], signal.SIGKILL)
    assert [finish(job, timeout=60).status != 0 for job in jobs] == [True, True]
    assert outlive(pids.values()) == [], "a rank outlived its job"


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.iterdir()))
def test_script_is_bash_and_may_be_run(script: str) -> None:
    assert os.access(SCRIPTS / script, os.X_OK)
    checked = subprocess.run(["bash", "-n", SCRIPTS / script], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_by_hand_refuses_ranks_that_no_job_has() -> None:
    for words in ([], ["0", "2", "4", "127.0.0.1"], ["3", "2", "4", "127.0.0.1", "--"], ["0", "3", "4", "h", "--"]):
        done = finish(start([str(SCRIPTS / "by_hand.sh"), *words]))
        assert done.status == 2
        assert len(done.output.splitlines()) == 1


@pytest.mark.parametrize("script", ["slurm.sh", "pbs.sh", "by_hand.sh"])
def test_a_driver_that_is_not_there_is_refused(script: str) -> None:
    before = ["0", "1", "1", "127.0.0.1", "--"] if script == "by_hand.sh" else []
    done = finish(start([str(SCRIPTS / script), *before, "finetun", "--output-dir", "x"]))
    assert (done.status, len(done.output.splitlines())) == (2, 1)
    assert "there is no examples/finetun.py here; legal: pretrain, resume, finetune, distill" in done.output


# What a cluster has and this machine has not: every node is this one, and starting there is starting here.
STAND_INS = {
    "scontrol": "printf '127.0.0.1\\n127.0.0.1\\n'",
    "srun": 'while [[ $1 != "$PYTHON" ]]; do shift; done; "$@" & "$@" & wait -n; wait -n',
    "mpiexec": 'while [[ $1 != "$PYTHON" ]]; do shift; done; "$@" & "$@" & wait -n; wait -n',
    "awk": "printf 'localhost\\n127.0.0.1\\n'",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", ["slurm.sh", pytest.param("pbs.sh", marks=pytest.mark.exhaustive)])
def test_a_schedulers_script_starts_an_agent_a_node_and_resumes(
    flags: dict[str, Any], dense: Path, tmp_path: Path, script: str
) -> None:
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\nset -e\n{body}\n")
        (tmp_path / name).chmod(0o755)
    scheduler = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "MASTER_PORT": str(free_port()),
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "1234",
        "GPUS_PER_NODE": "2",
        "PBS_NODEFILE": "/dev/null",
        "PBS_JOBID": "1234[5].server",
    }
    run = {**flags, "--gradient-accumulation-steps": 1, "--output-dir": tmp_path / "run"}
    first, rest = {"--stop-at-step": 6}, {"--checkpoint-path": tmp_path / "run"}
    for words in (words_of({**run, **first}), ["resume", *words_of(rest)]):
        done = finish(start([str(SCRIPTS / script), *words], **scheduler))
        assert done.status == 0, done.output
    assert_same_run(tmp_path / "run", dense)
