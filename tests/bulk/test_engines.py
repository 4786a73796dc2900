"""Workers of both engines; the workers on Ray share one Ray, whose start takes seconds."""

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from flowtracer_plugin import trace_dataset
from flowtracer_plugin.bulk import ray_actors, shards
from flowtracer_plugin.bulk.engines import ENGINES, Engine, run_tasks
from tests.bulk.light_work import NeverStarted, NoRoomError, dying, failing, squared, worker_made
from tests.bulk.stories import stories
from tests.bulk.test_data_set import assert_same, make_tracer

ROWS = {"shard_size": 3, "save_traces": True}


def listening():
    """All that this process and its children listen at: the process, its address, and the port."""
    return {
        (process.pid, one.laddr.ip.removeprefix("::ffff:"), one.laddr.port)
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
        if process.is_running()
        for one in process.net_connections(kind="inet")
        if one.status == psutil.CONN_LISTEN
    }


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory):
    """A Ray as the engine starts it; its value is what listened before, as other tests may."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        before = os.environ.keys() - {"PYTEST_CURRENT_TEST"}
        already = listening()
        with ray_actors._local(2):
            yield already
        assert os.environ.keys() - {"PYTEST_CURRENT_TEST"} == before
    assert not list(home.iterdir()), "Ray has left a token in the home folder"


def counted(numbers, taken):
    for number in numbers:
        taken.append(number)
        yield number


@pytest.mark.parametrize("engine", ENGINES)
def test_a_state_is_made_once_a_worker_and_tasks_are_taken_when_needed(on_ray, tmp_path, engine):
    taken = []
    results = run_tasks(
        partial(worker_made, tmp_path),
        squared,
        counted(range(40), taken),
        engine=Engine(name=engine, workers=2),
    )
    found = [next(results)]
    assert len(taken) <= 4
    found += results
    assert sorted(square for _, square in found) == [number**2 for number in range(40)]
    workers = {pid for pid, _ in found}
    assert os.getpid() not in workers
    assert {path.name for path in tmp_path.iterdir()} == {f"made-{pid}" for pid in workers}
    assert all(path.read_text() == "." for path in tmp_path.iterdir())
    assert not any(psutil.pid_exists(pid) for pid in workers) or engine == "ray"


def test_only_this_machine_can_reach_a_ray_that_was_started_here(on_ray):
    assert {address for _, address, _ in listening() - on_ray} == {"127.0.0.1"}


@pytest.mark.parametrize("engine", [Engine(workers=2), Engine(name="ray")], ids=ENGINES)
def test_an_error_of_a_task_arrives_as_what_it_is(on_ray, engine):
    with pytest.raises(NoRoomError) as caught:
        list(run_tasks(int, failing, ["x"], engine=engine))
    assert type(caught.value) is NoRoomError
    assert str(caught.value) == "no room for x"


def dying_once(folder, model):
    """A tracer in a process that is killed once, between the two tables of shard 1."""
    real = shards._write

    def write(path, content):
        real(path, content)
        if path.parts[-2:] == ("tokens", "00000001.parquet") and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    shards._write = write
    return make_tracer(model)


@pytest.mark.slow
def test_a_killed_actor_loses_no_row(on_ray, plain_model, tmp_path):
    whole = trace_dataset(partial(make_tracer, plain_model), stories(12), tmp_path / "one", **ROWS)
    said = []
    again = trace_dataset(
        partial(dying_once, tmp_path, plain_model),
        stories(12),
        tmp_path / "two",
        engine="ray",
        workers=2,
        say=said.append,
        **ROWS,
    )
    assert (tmp_path / "died").exists()
    assert_same(again, whole)
    assert len(said) == 4
    assert not list((tmp_path / "two").rglob(".*.part"))
    assert ray_actors.ray.is_initialized(), "the Ray of others was shut down"


def test_a_task_that_kills_its_workers_is_given_up(on_ray, monkeypatch):
    monkeypatch.setattr(ray_actors, "TRIES", 2)
    with pytest.raises(RuntimeError, match=r"2 workers have died in the same place.*run the same"):
        list(run_tasks(int, dying, [0], engine=Engine(name="ray")))


def test_workers_that_cannot_be_started_are_given_up(on_ray, monkeypatch):
    monkeypatch.setattr(ray_actors, "TRIES", 1)
    monkeypatch.setattr(ray_actors, "_Worker", NeverStarted)
    with pytest.raises(RuntimeError, match=r"no worker can be started on Ray: .*no such library"):
        list(run_tasks(int, squared, [1], engine=Engine(name="ray")))


def test_more_than_ray_has_is_refused_at_once(on_ray):
    engine = Engine(name="ray", workers=3)
    with pytest.raises(ValueError, match="3 workers need 3 CPUs, and Ray has 2: take fewer"):
        list(run_tasks(int, squared, [1], engine=engine))
    engine = Engine(name="ray", workers=2, gpus_per_worker=32.0)
    with pytest.raises(ValueError, match=r"2 workers need 64 GPUs, and Ray has \d"):
        list(run_tasks(int, squared, [1], engine=engine))


def test_a_cluster_may_still_grow(on_ray, monkeypatch, caplog):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    ray_actors._check_room(3, 0.0, growing=True)
    assert "3 workers need 3 CPUs, and Ray has 2; the others start if the" in caplog.text


def test_an_address_is_none_where_ray_runs_already(on_ray):
    engine = Engine(name="ray", address="auto")
    with pytest.raises(ValueError, match=r"is connected to Ray already.*leave the address out"):
        list(run_tasks(int, squared, [1], engine=engine))


def test_an_address_without_ray_is_named(monkeypatch):
    monkeypatch.setattr(ray_actors.ray, "is_initialized", lambda: False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        engine = Engine(name="ray", address=address)
        with pytest.raises(ConnectionError, match=rf"there is no Ray at '{address}': .*ray start"):
            list(run_tasks(int, squared, [1], engine=engine))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "spark"}, "engine must be one of processes, ray, got 'spark'"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"name": "ray", "gpus_per_worker": -1.0}, "gpus_per_worker must be at least 0, got -1"),
        ({"gpus_per_worker": 1.0}, "are for Ray: set engine='ray'"),
        ({"address": "auto"}, "are for Ray: set engine='ray'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Engine(**options)


def test_a_missing_ray_is_named_with_its_extra(monkeypatch):
    for name in ("ray", ray_actors.__name__):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, ray_actors.__name__)
    monkeypatch.delattr("flowtracer_plugin.bulk.ray_actors")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'flowtracer-plugin\[ray\]'"):
        trace_dataset(lambda: pytest.fail("made"), stories(1), Path("/nowhere"), engine="ray")


def until(reached):
    """Wait; a test that waits for ever ends by pytest's own limit."""
    while not reached():
        time.sleep(0.1)


def test_workers_end_with_the_process_that_started_them(tmp_path):
    script = f"""
from pathlib import Path
from functools import partial
from flowtracer_plugin.bulk.engines import Engine, run_tasks
from tests.bulk.light_work import nothing, slow
if __name__ == "__main__":
    work = partial(slow, Path({str(tmp_path)!r}))
    list(run_tasks(nothing, work, range(4), engine=Engine(workers=2)))
"""
    file = tmp_path / "script.py"
    file.write_text(script)
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, file], env={**os.environ, "PYTHONPATH": str(root)})
    until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    workers = [psutil.Process(int(path.stem)) for path in tmp_path.glob("*.pid")]
    parent.kill()
    parent.wait()
    until(lambda: not any(one.is_running() and one.status() != "zombie" for one in workers))
