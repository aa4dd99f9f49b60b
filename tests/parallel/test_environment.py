"""What a launcher's environment may hold is checked in one place: refused with variable, value and what is legal."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from argonne.parallel.communication import environment, rendezvous
from argonne.parallel.communication.environment import JobProcess, Meeting
from argonne.parallel.communication.rendezvous import meet
from argonne.parallel.errors import LauncherError
from tests.pool import free_port

TWO = {"RANK": "1", "WORLD_SIZE": "2"}
REFUSED = [
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc' is not legal; legal: 1 or more"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE='' is not legal"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not legal"),
    ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2' is not legal"),
    ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0' is not legal"),
    ({"WORLD_SIZE": "9" * 5000}, "is not legal"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set but RANK is not; legal: both"),
    ({"RANK": "0"}, "RANK=0 is set but WORLD_SIZE is not; legal: both"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK='2' is not legal; legal: 0 to 1"),
    ({"RANK": "", "WORLD_SIZE": "1"}, "RANK='' is not legal; legal: 0 to 0"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not legal"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' is not legal; legal: 0 or more"),
    ({"SLURM_LOCALID": "?"}, "SLURM_LOCALID='?' is not legal"),
    ({**TWO, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE='3' is not legal; legal: 1 to 2"),
    ({**TWO, "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "1"}, "LOCAL_RANK=1 is not legal with LOCAL_WORLD_SIZE=1"),
    ({**TWO, "MASTER_PORT": "65536"}, "MASTER_PORT='65536' is not legal; legal: 1 to 65535"),
    ({**TWO, "MASTER_PORT": "http"}, "MASTER_PORT='http' is not legal"),
    ({**TWO, "MASTER_ADDR": ""}, "MASTER_ADDR='' is not legal"),
    ({**TWO, "MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR='no.such.host.invalid' is not known"),
    ({**TWO, "MASTER_ADDR": "a" * 70 + ".b"}, "is not known"),
    ({"TORCHELASTIC_USE_AGENT_STORE": "maybe"}, "TORCHELASTIC_USE_AGENT_STORE='maybe' is not legal"),
    ({"TORCHELASTIC_RESTART_COUNT": "one"}, "TORCHELASTIC_RESTART_COUNT='one' is not legal"),
    ({"TORCHELASTIC_MAX_RESTARTS": "-1"}, "TORCHELASTIC_MAX_RESTARTS='-1' is not legal"),
    ({"ARGONNE_RESTARTS_LEFT": "few"}, "ARGONNE_RESTARTS_LEFT='few' is not legal"),
    ({"ARGONNE_STARTED_AT": "today"}, "ARGONNE_STARTED_AT='today' is not legal"),
    ({"ARGONNE_STARTED_AT": "nan"}, "ARGONNE_STARTED_AT='nan' is not legal"),
    ({"ARGONNE_STARTED_AT": f"{time.time() * 1000:.0f}"}, "is not legal"),
    ({"ARGONNE_PARENT": "me"}, "ARGONNE_PARENT='me' is not legal"),
    ({"OMP_NUM_THREADS": "all"}, "OMP_NUM_THREADS='all' is not legal; legal: 1 or more"),
    ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS='0' is not legal"),
]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a launcher, whatever runs the tests; no patience with a name server."""
    for name in list(os.environ):
        if name.startswith(("TORCHELASTIC_", "ARGONNE_")) or name in {name for bad, _ in REFUSED for name in bad}:
            monkeypatch.delenv(name)
    monkeypatch.setattr(environment, "_RESOLVES_WITHIN", 0.0)


@pytest.mark.parametrize(("variables", "expected"), REFUSED, ids=[" ".join(bad)[:40] for bad, _ in REFUSED])
def test_what_no_launcher_says_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LauncherError) as refused:
        environment.check()
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_launchers_say_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    environment.check()
    assert environment.this_process() == JobProcess()
    told = {**TWO, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    own = {"ARGONNE_STARTED_AT": f"{time.time() - 100:.0f}", "OMP_NUM_THREADS": "4,2", "ARGONNE_RESTARTS_LEFT": "3"}
    for name, value in {**told, **own}.items():
        monkeypatch.setenv(name, value)
    environment.check()
    assert environment.this_process() == JobProcess(1, 2, 1, 2, True)
    assert environment.meeting() == Meeting("localhost", 1234)
    assert environment.restarts_left() == 3
    assert 99 <= environment.seconds_since_start() < 160


def test_a_scheduler_need_not_say_which_rank_of_its_node_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert environment.this_process() == JobProcess(1, 2, 1, 1, True)


def test_where_nobody_listens_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "_NEIGHBOUR_ANSWERS_WITHIN", 0.5)
    monkeypatch.setattr(rendezvous, "_LOGS_AFTER", 0.1)
    nowhere = Meeting("127.0.0.1", free_port())
    with pytest.raises(LauncherError, match=f"nobody answers at MASTER_ADDR=127.0.0.1, MASTER_PORT={nowhere.port}"):
        meet(JobProcess(1, 2, launched=True), nowhere, timedelta(seconds=60))
    assert capsys.readouterr().err.count("rank 1 waits up to 0 s for rank 0: nobody answers at") == 1


def test_a_port_that_another_program_has_is_refused_by_the_rank_that_should_keep_it() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(LauncherError, match=f"MASTER_PORT={taken} cannot be had"):
            meet(JobProcess(0, 2, launched=True), Meeting("127.0.0.1", taken), timedelta(seconds=60))


def test_ranks_that_nobody_gave_a_store_meet_in_one_of_the_first() -> None:
    where, patience = Meeting("127.0.0.1", free_port()), timedelta(seconds=60)
    with ThreadPoolExecutor(3) as threads:
        stores = list(threads.map(lambda rank: meet(JobProcess(rank, 3, launched=True), where, patience), range(3)))
    stores[2].set("key", "value")
    assert [store.get("key") for store in stores] == [b"value"] * 3
