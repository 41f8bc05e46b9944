"""Traces of steps, read back by xprof: which steps are in them, and what they are named by."""

import dataclasses
import itertools
import json
import re
import resource
import socket
import threading

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from tests.buckets import reached_at
from tests.command import finish, start
from tests.made_up import first_state, made_up_step
from tests.run.saved import SETTINGS
from tests.training.test_bad_steps import NoSignals, settings_for
from tvq_pod.config.resolve import default_config, resolve
from tvq_pod.config.settings import MeshSettings, ProfileSettings
from tvq_pod.errors import UserError
from tvq_pod.modes import train as train_module
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.planning.module import Instruction, source_of
from tvq_pod.run import traces as traces_module
from tvq_pod.run.goodput import Goodput
from tvq_pod.run.traces import Profiler, check_hosts, start_server
from tvq_pod.training import restore
from tvq_pod.training.step import abstract_batch, abstract_train_state, make_train_step


def read(path, tool="trace_viewer"):
    """What xprof shows of a trace."""
    from xprof.convert.raw_to_tool_data import xspace_to_tool_data

    data, kind = xspace_to_tool_data([str(path)], tool, {})
    assert kind == "application/json"
    return json.loads(data)


def events(path):
    return [event for event in read(path)["traceEvents"] if event.get("ph") == "X"]


def steps_in(path):
    """The numbers of the steps that a trace has, as xprof groups them."""
    found = [event["args"]["step_num"] for event in events(path) if event["name"].startswith("train")]
    return sorted(map(int, found))


def traces(workdir):
    folder = epath.Path(workdir) / "profile/plugins/profile"
    return {path.name: path / "process_0.xplane.pb" for path in folder.iterdir()} if folder.exists() else {}


@jax.jit
def a_step(x):
    return dict(n_bad=jnp.sum(x @ x))


def trained(workdir, settings, n_steps, first_step=0):
    """Steps of a matmul, as the loop gives them to the devices."""
    goodput = Goodput()
    profiler, before, x = Profiler(epath.Path(workdir), settings, goodput), None, jnp.ones([64, 64])
    for step in range(first_step + 1, n_steps + 1):
        with profiler.step(step, before):
            metrics = a_step(x)
        profiler.end_step(step, metrics)
        before = metrics
    profiler.close()
    return goodput.record()["seconds"]


@pytest.mark.slow(12)
def test_a_trace_has_the_steps_that_were_asked_for_and_no_others(tmp_path):
    seconds = trained(tmp_path, ProfileSettings(at_step=3, num_steps=2, every_steps=5), 14)
    assert seconds["profile"] > 0
    found = {name: steps_in(path) for name, path in traces(tmp_path).items()}
    assert found == {"step_3": [3, 4], "step_8": [8, 9], "step_13": [13, 14]}
    names = {event["name"] for event in events(traces(tmp_path)["step_3"])}
    assert {"PjitFunction(a_step)", "train 3", "train 4"} <= names


def test_the_devices_have_done_all_steps_before_a_trace_begins_and_its_own_before_it_ends(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax, "block_until_ready", lambda metrics: calls.append(f"done {metrics}"))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, profiler_options: calls.append("begin"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("end"))
    profiler = Profiler(epath.Path(tmp_path), ProfileSettings(at_step=2, num_steps=2), Goodput())
    for step in range(1, 5):
        with profiler.step(step, step - 1):
            calls.append(step)
        profiler.end_step(step, step)
    profiler.close()
    assert calls == [1, "done 1", "begin", 2, 3, "done 3", "end", 4]


@pytest.mark.slow(2)
def test_operations_have_the_names_of_the_phases_that_the_plan_has_too():
    mesh = make_mesh(MeshSettings())
    settings = dataclasses.replace(SETTINGS, train=dataclasses.replace(SETTINGS.train, ema_decay=0.9))
    arrays = abstract_train_state(settings, mesh), abstract_batch(settings, mesh)
    program = make_train_step(settings, mesh).lower(*arrays).as_text(debug_info=True)
    paths = set(re.findall(r'loc\("(jit\(train_step\)[^"]*)"', program))
    sources = {source_of(Instruction("x", "f32[]", "fusion", f'op_name="{path}"')) for path in paths}
    phases = {part for source in sources for part in re.split(r"[ /]", source)}
    assert {"embed", "loss", "optimizer", "metrics", "bad_steps", "ema", "digest"} <= phases
    # of a layer, whose paths the lowered program has without the pass
    assert {"layers", "unit0.projected", "quantizer", "cache", "unit1._attend_at_once"} <= {
        part for path in re.findall(r'loc\("([^"]*)"', program) for part in path.split("/")
    } | phases


@pytest.mark.slow(2)
def test_a_trace_that_the_end_or_a_later_start_cuts_off(tmp_path):
    settings = ProfileSettings(at_step=3, num_steps=5)
    trained(tmp_path / "short", settings, 4)
    assert {name: steps_in(path) for name, path in traces(tmp_path / "short").items()} == {"step_3": [3, 4]}
    trained(tmp_path / "later", settings, 8, first_step=3)
    assert traces(tmp_path / "later") == {}


@pytest.mark.slow(3)
def test_a_trace_goes_into_a_bucket(tmp_path, monkeypatch, server):
    reached_at(monkeypatch, server)
    trained("gs://bucket/traced", ProfileSettings(at_step=1, num_steps=1), 2)
    (path,) = traces("gs://bucket/traced").values()
    local = tmp_path / "process_0.xplane.pb"
    local.write_bytes(path.read_bytes())
    assert steps_in(local) == [1]


@pytest.mark.slow(2)
def test_only_chosen_processes_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(traces_module.jax, "process_index", lambda: 1)
    trained(tmp_path, ProfileSettings(at_step=1, num_steps=1, hosts="0,2"), 2)
    assert traces(tmp_path) == {}
    for hosts in ("all", "1", "0,1"):
        trained(tmp_path / hosts, ProfileSettings(at_step=1, num_steps=1, hosts=hosts), 2)
        (path,) = (tmp_path / hosts).rglob("*.pb")
        assert path.name == "process_1.xplane.pb"


@pytest.mark.parametrize(
    ("index", "given", "writes"),
    [
        (0, dict(at_step=1, hosts="all"), True),
        (1, dict(at_step=1, hosts="all"), False),
        (2, dict(at_step=1, hosts="3,2"), True),
        (3, dict(at_step=1, hosts="3,2"), False),
        (0, dict(at_step=1, hosts="3,2"), False),
        (0, dict(), False),
    ],
)
def test_one_of_the_processes_that_trace_writes_the_table_of_operations(index, given, writes, tmp_path, monkeypatch):
    monkeypatch.setattr(traces_module.jax, "process_index", lambda: index)
    Profiler(epath.Path(tmp_path), ProfileSettings(**given), Goodput()).keep_operations(lambda: "the table")
    written = [path.read_text() for path in tmp_path.rglob("operations.tsv")]
    assert written == ["the table"] * writes


def test_a_table_of_operations_that_can_not_be_made_is_a_warning(tmp_path, capfd):
    profiler = Profiler(epath.Path(tmp_path), ProfileSettings(at_step=1), Goodput())
    profiler.keep_operations(lambda: 1 / 0)
    assert "operations.tsv can't be written (division by zero)" in capfd.readouterr().err


def test_a_process_that_is_not_there_can_not_trace(monkeypatch):
    monkeypatch.setattr(traces_module.jax, "process_count", lambda: 2)
    check_hosts(ProfileSettings(at_step=1, hosts="0,1"))
    check_hosts(ProfileSettings(at_step=1, hosts="all"))
    check_hosts(ProfileSettings(hosts="7"))  # nothing is traced
    with pytest.raises(UserError, match=r"config.profile.hosts=0,2: this job has no process 2; the last is 1"):
        check_hosts(ProfileSettings(at_step=1, hosts="0,2"))


@pytest.fixture
def limit():
    """Sets how large a file may become; None: as large as before. jax finds it as it finds a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow(4)
def test_a_full_disk_costs_its_traces_and_later_ones_are_taken(tmp_path, limit, monkeypatch, capfd):
    local, made = tmp_path / "local", traces_module.tempfile.mkdtemp
    local.mkdir()
    monkeypatch.setattr(traces_module.tempfile, "mkdtemp", lambda prefix: made(prefix=prefix, dir=local))
    settings, x, before = ProfileSettings(at_step=1, num_steps=1, every_steps=3), jnp.ones([64, 64]), None
    profiler = Profiler(epath.Path(tmp_path), settings, Goodput())
    a_step(x)  # is compiled, and kept, while there is room
    for step in range(1, 9):
        limit(1000 if step < 7 else None)
        with profiler.step(step, before):
            metrics = a_step(x)
        profiler.end_step(step, metrics)
        assert step >= 7 or not list(local.iterdir())
        before = metrics
    profiler.close()
    assert {name: steps_in(path) for name, path in traces(tmp_path).items()} == {"step_7": [7]}
    assert not list(local.iterdir())
    told = [line for line in capfd.readouterr().err.splitlines() if "trace" in line and "step" in line]
    assert told[0].startswith("WARNING: the trace of step 1 can't be written ("), told
    assert told[1].startswith("WARNING: the trace of step 4 can't be written (")
    assert told[2:] == [f"trace: {traces(tmp_path)['step_7']}"]


@pytest.mark.slow(2)
def test_a_trace_that_is_still_written_outlives_the_next_that_can_not_be_taken(tmp_path, monkeypatch):
    ended, moved, x = threading.Event(), traces_module._move, jnp.ones([64, 64])
    monkeypatch.setattr(traces_module, "_move", lambda *paths: ended.wait(30) and moved(*paths))
    profiler = Profiler(epath.Path(tmp_path), ProfileSettings(at_step=1, num_steps=1, every_steps=1), Goodput())
    for step in (1, 2):
        with profiler.step(step, None):
            metrics = a_step(x)
        profiler.end_step(step, metrics)
        monkeypatch.setattr(traces_module.tempfile, "mkdtemp", lambda prefix: (tmp_path / "no/room").mkdir())
    ended.set()
    profiler.close()
    assert {name: steps_in(path) for name, path in traces(tmp_path).items()} == {"step_1": [1]}


def test_without_room_for_temporary_files_there_is_a_warning(tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patched:  # capfd, too, makes temporary files
        patched.setattr(traces_module.tempfile, "tempdir", str(tmp_path / "nowhere"))
        trained(tmp_path, ProfileSettings(at_step=1, num_steps=1), 2)
    assert "WARNING: the trace of step 1 is not taken (" in capfd.readouterr().err
    assert traces(tmp_path) == {}


def test_a_folder_that_can_not_be_written_is_a_warning(tmp_path, capfd):
    (tmp_path / "profile").write_text("in the way")
    trained(tmp_path, ProfileSettings(at_step=1, num_steps=1), 2)
    assert "process_0.xplane.pb can't be written" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(at_step=1001), "config.profile.at_step=1001: is after the last step, config.train.num_steps=1000; give"),
        (dict(at_step=9, num_steps=4, every_steps=3), "config.profile.every_steps=3: must be at least config.profile."),
        (dict(hosts="first"), "config.profile.hosts=first: must be all, or process indices, as in 0,3"),
        (dict(hosts="0,"), "config.profile.hosts=0,: must be all, or process indices, as in 0,3"),
    ],
)
def test_settings_that_do_not_go_together_are_named(given, message):
    config = default_config()
    config.profile.update(given)
    with pytest.raises(UserError) as error:
        resolve(config)
    assert str(error.value).startswith(message)


def test_the_last_step_may_be_traced():
    config = default_config()
    config.profile.at_step = config.train.num_steps
    assert resolve(config).profile.begins_at(1000)


def test_the_wrong_step_on_the_command_line_is_one_line_and_writes_nothing(tmp_path, config_file):
    flags = f"--config={config_file}", f"--workdir={tmp_path / 'run'}", "--config.profile.at_step=41"
    code, _, err = finish(start(*flags))
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith("error: config.profile.at_step=41: is after the last step, config.train.num_steps=40; ")
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--profiler_port={port}: can't be opened \(.*\); give another port"):
            start_server(port)


@pytest.mark.slow(41)
def test_a_trace_can_be_captured_while_the_program_runs(tmp_path):
    """By jax's own command, which is a client of xprof, over the port."""
    from jax.collect_profile import collect_profile

    with socket.socket() as trial:
        trial.bind(("", 0))
        port = trial.getsockname()[1]
    start_server(port)
    ended = threading.Event()

    def compute():
        for step in itertools.takewhile(lambda _: not ended.is_set(), itertools.count(1)):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                jax.block_until_ready(a_step(jnp.ones([64, 64])))

    training = threading.Thread(target=compute)
    training.start()
    try:
        collect_profile(port, 100, "localhost", tmp_path, no_perfetto_link=True)
    finally:
        ended.set()
        training.join()
        jax.profiler.stop_server()
    (path,) = tmp_path.rglob("*.xplane.pb")
    numbers = steps_in(path)
    assert numbers == list(range(numbers[0], numbers[-1] + 1))


@pytest.mark.slow
def test_a_training_traces_its_steps_and_what_it_does_besides(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(train_module, "compiled_train_step", made_up_step)
    monkeypatch.setattr(restore, "create_train_state", first_state)
    settings = settings_for(corpus)
    profile = ProfileSettings(at_step=4, num_steps=3)  # a checkpoint is saved after step 5
    train_module.train(dataclasses.replace(settings, profile=profile), epath.Path(tmp_path), NoSignals())
    ((name, path),) = traces(tmp_path).items()
    assert (name, steps_in(path)) == ("step_4", [4, 5, 6])
    assert {"data", "saves"} <= {event["name"] for event in events(path)}
