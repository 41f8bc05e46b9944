"""The command line: parses the flags and calls one mode.

    tvq_pod --config=stdlib --workdir=runs/stdlib [--config.model.d_model=256 ...]
        [--mode=train|eval|lm_eval|sample|prepare|train_vocab|inspect|report|export|import|plan|bench]

`python -m tvq_pod.main` is the same command. --config takes the path of a file, or the name of a bundled config.

Exit code 0: done. 75: asked to end by a signal, and saved: run me again. 141: nobody reads the output any more. 1: an
error; if the user can fix it, one line says how. 128 + N: ended at once by signal N, see preemption.py.
"""

import functools
import gc
import os
import sys
import time
import traceback

from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from tvq_pod.config.command_line import given, overrides_of, with_config, without
from tvq_pod.config.init_from import check_init_from
from tvq_pod.config.mode_flags import check_flags, illegal_value, unknown_flag
from tvq_pod.config.names import GROUPS, check_name
from tvq_pod.config.resolve import default_config, kind_name, resolve
from tvq_pod.config.settings import Settings
from tvq_pod.config.suites import check_suites
from tvq_pod.errors import Preempted, UserError
from tvq_pod.host import terminal
from tvq_pod.host.paths import (
    check_folder,
    check_path,
    check_reached,
    check_saving,
    check_source_paths,
    is_bucket,
    may_write,
)
from tvq_pod.run.preemption import PREEMPTED, Preemption

TOGETHER = ("train", "eval", "lm_eval", "sample", "prepare")  # modes for any number of processes
MODES = (*TOGETHER, "train_vocab", "inspect", "report", "export", "import", "plan", "bench")

RUNNERS = ("DirectRunner", "DataflowRunner", "FlinkRunner", "SparkRunner", "PrismRunner", "PortableRunner")
NAMED_VOCABS = ("bytes", "sentencepiece")

_STARTED_AT = time.time()

# Parts of jax's errors when a process of the job is gone.
LOST_PEER = ("Gloo", "heartbeat", "UNAVAILABLE", "DEADLINE_EXCEEDED", "coordination service")

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, or the name of a bundled config, such as stdlib; by default the run's own config.json.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder: checkpoints, metrics, samples, config.json. Every mode needs it."
)
_MODE = flags.DEFINE_enum("mode", "train", MODES, "What to do; docs/using.md describes the modes.")
_SOURCE = flags.DEFINE_string(
    "source", None, "The corpus: files, a folder, or a name such as stdlib. Short for --config.data.source."
)
_APPEND = flags.DEFINE_bool("append", False, "prepare: add the source's new files to the store that exists.")
_RUNNER = flags.DEFINE_enum("runner", None, RUNNERS, "prepare: the Apache Beam runner whose workers write the store.")
_BEAM_OPTIONS = flags.DEFINE_string(
    "beam_options", "", "prepare: options of --runner, such as '--project=P --region=R'."
)
_SPLIT = flags.DEFINE_enum("split", "validation", ("validation", "test"), "eval: which held-out documents.")
_PER_DOCUMENT = flags.DEFINE_string("per_document", None, "eval: a file to write the loss of each document to.")
_SUITE = flags.DEFINE_list(
    "suite", [], "eval: suites of long documents to evaluate instead of a split: recall, passkey, needle, pair."
)
_STEP = flags.DEFINE_integer(
    "step",
    None,
    "train, eval, lm_eval, sample, inspect, export: which checkpoint, if not the newest. train sets newer ones aside.",
    lower_bound=0,
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "sample: text to continue. May be repeated.")
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "sample: a file whose text is a prompt; or FILE.jsonl, with one prompt in each line."
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "sample: a new file that gets a JSON line for each sample; by default stdout."
)
_TASKS = flags.DEFINE_list("tasks", [], "lm_eval: names or YAML files of lm-evaluation-harness' tasks.")
_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "lm_eval: examples before each question; by default as many as the task says.", lower_bound=0
)
_LIMIT = flags.DEFINE_integer("limit", None, "lm_eval: at most this many documents of each task.", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer(
    "max_length", None, "lm_eval: at most this many tokens of context; by default all.", lower_bound=1
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "plan: the slice, such as v5e:4x4; or cpu:8 for simulated devices.")
_SLICES = flags.DEFINE_integer("slices", 1, "plan: how many slices of that topology.", lower_bound=1)
_TOKENS = flags.DEFINE_float("tokens", None, "plan: also print how many days this many tokens take.", lower_bound=0.0)
_SWEEP = flags.DEFINE_string(
    "sweep", None, 'plan: a grid of overrides, such as "config.train.update_len=2048,8192;...".'
)
_AGAINST = flags.DEFINE_enum(
    "against", None, ("vq", "full"), "bench: another attention to measure, alternating with the config's own."
)
_LENGTHS = flags.DEFINE_list("lengths", [], "bench: update lengths, such as 1024,2048; by default the config's.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, for a job of several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes the job has, with --coordinator_address.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process's index, from 0.", lower_bound=0)
_MULTIHOST = flags.DEFINE_bool(
    "multihost", False, "Find the other processes of the job through Cloud TPU, Slurm or Open MPI."
)
_PEER_TIMEOUT = flags.DEFINE_integer(
    "peer_timeout_seconds",
    100,
    "Seconds without a heartbeat after which a process of the job is considered dead.",
    lower_bound=5,
)
_JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout_seconds", 300, "How long the job's processes wait for each other to start.", lower_bound=5
)
_WAIT_TIMEOUT = flags.DEFINE_integer(
    "wait_timeout_seconds",
    1800,
    "How long processes may wait for each other after that, outside of training steps.",
    lower_bound=1,
)
_PROFILER_PORT = flags.DEFINE_integer(
    "profiler_port",
    None,
    "train, eval, sample: a port at which xprof can capture traces of each process.",
    lower_bound=1,
    upper_bound=65535,
)
_TO = flags.DEFINE_string("to", None, "export: the folder to write.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ("float32", "bfloat16"), "export: type of the weights; by default config.model.param_dtype."
)
_FROM = flags.DEFINE_string(
    "from", None, "import: the folder of an exported model, from which the run in --workdir is made."
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "bench: turns after the warm-up.", lower_bound=1)


def main(argv: list[str], preemption: Preemption) -> None:
    """Calls the mode. Raises UserError for errors that the user can fix."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # orbax logs a page per save, and ten if it fails, which it raises anyway
    if len(argv) > 1:
        raise UserError(f"{argv[1]}: is not a flag; give flags as --name=value")
    if not _WORKDIR.value:
        raise UserError("--workdir=: is missing; give the run's folder, such as --workdir=runs/first")
    check_path("--workdir", _WORKDIR.value)
    workdir, mode = epath.Path(_WORKDIR.value), _MODE.value
    check_flags(mode, [name for name in flags.FLAGS if flags.FLAGS[name].present])
    if flags.FLAGS["suite"].present:
        check_suites(_SUITE.value)
    for name, flag, needed_by in (("to", _TO, "export"), ("from", _FROM, "import")):
        if mode == needed_by and not flag.value:
            what = "the folder to write" if name == "to" else "a folder that --mode=export wrote"
            raise UserError(f"--{name}=: must be given for --mode={mode}: {what}")
    settings = _settings()
    _check_paths(settings, mode, _WORKDIR.value)
    preemption.grace_seconds = settings.checkpoint.grace_seconds

    # Modes are imported here: the error for a wrong flag should not wait for jax.
    if mode in TOGETHER:
        from tvq_pod.parallel import processes

        processes.check_slices(settings.mesh.slices)
        job = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _MULTIHOST.value
        processes.join(*job, _PEER_TIMEOUT.value, _JOIN_TIMEOUT.value, _WAIT_TIMEOUT.value)
        _cache_compiled(settings.compile_cache, workdir)
        if _PROFILER_PORT.value:
            from tvq_pod.run.traces import start_server

            start_server(_PROFILER_PORT.value)
    elif _is_one_of_many() or _NUM_PROCESSES.value or _PROCESS_ID.value is not None:
        raise UserError(f"--mode={mode}: is for one process; leave out --multihost, --coordinator_address and others")
    if mode == "train":
        from tvq_pod.modes.train import train

        train(settings, workdir, preemption, _STEP.value, started_at=_STARTED_AT)
    elif mode == "eval" and flags.FLAGS["suite"].present:
        from tvq_pod.modes.evaluate import evaluate_suites

        evaluate_suites(settings, workdir, _SUITE.value, _STEP.value)
    elif mode == "eval":
        from tvq_pod.modes.evaluate import evaluate

        table = epath.Path(_PER_DOCUMENT.value) if _PER_DOCUMENT.value else None
        evaluate(settings, workdir, _SPLIT.value, _STEP.value, table)
    elif mode == "lm_eval":
        from tvq_pod.modes.run_lm_eval import run_lm_eval

        how = _TASKS.value, _FEWSHOT.value, _LIMIT.value, _MAX_LENGTH.value
        run_lm_eval(settings, workdir, _STEP.value, *how)
    elif mode == "sample":
        from tvq_pod.modes.sample import sample

        prompts = [os.fsencode(prompt) for prompt in _PROMPT.value]
        sample(settings, workdir, prompts, _STEP.value, _PROMPT_FILE.value, _OUTPUT.value)
    elif mode == "prepare":
        from tvq_pod.data.beam import Beam
        from tvq_pod.modes.prepare import prepare

        prepare(settings, workdir, _APPEND.value, Beam.of(_RUNNER.value, _BEAM_OPTIONS.value))
    elif mode == "train_vocab":
        from tvq_pod.modes.prepare import train_vocab

        train_vocab(settings, workdir)
    elif mode == "inspect":
        from tvq_pod.modes.inspect_run import inspect

        inspect(settings, workdir, _STEP.value)
    elif mode == "report":
        from tvq_pod.modes.write_report import report

        report(settings, workdir)
    elif mode == "export":
        from tvq_pod.modes.export_model import export

        assert _TO.value
        export(settings, workdir, epath.Path(_TO.value), _STEP.value, _DTYPE.value)
    elif mode == "import":
        from tvq_pod.modes.import_model import import_model

        assert _FROM.value
        import_model(settings, workdir, epath.Path(_FROM.value))
    elif mode == "bench":
        from tvq_pod.modes.bench import bench

        bench(settings, workdir, _AGAINST.value, _lengths(), _ROUNDS.value)
    elif mode == "plan":
        from tvq_pod.modes.plan import plan, sweep

        if not _TOPOLOGY.value:
            raise UserError("--topology=: must be given for --mode=plan, for example v5e:4x4")
        if _SWEEP.value:
            sweep(without(("sweep", "workdir"), with_config(sys.argv))[1:], workdir, _SWEEP.value)
        else:
            plan(settings, workdir, _TOPOLOGY.value, _SLICES.value, _TOKENS.value)


def _check_paths(settings: Settings, mode: str, workdir: str) -> None:
    """Raises UserError if a path can't be used, or a bucket can't be reached."""
    data = settings.data
    remote = [("--workdir", workdir), ("--to", _TO.value), ("--from", _FROM.value), ("config.data.store", data.store)]
    remote += [("--per_document", _PER_DOCUMENT.value), ("--output", _OUTPUT.value)]
    remote += [("config.data.mixture", part.strip().rpartition("=")[0]) for part in data.mixture.split(",")]
    if data.vocab not in NAMED_VOCABS:
        remote.append(("config.data.vocab", data.vocab))
    if settings.compile_cache != "auto":
        remote.append(("config.compile_cache", settings.compile_cache))
    if _PROMPT_FILE.value:
        check_path("--prompt_file", _PROMPT_FILE.value, local_only=True)
    check_source_paths("config.data.source", data.source)  # it need not be reachable if the run's store exists
    for name, path in remote:
        if path:
            check_path(name, path)
    check_folder("--workdir", workdir)
    if _TO.value:
        check_folder("--to", _TO.value)
    if mode in ("train", "import"):
        check_saving("--workdir", workdir)
        if settings.init_from:  # only a start that needs it checks whether it exists
            check_init_from(settings.init_from, workdir)
    buckets = {path.split("/")[2]: (name, path) for name, path in reversed(remote) if is_bucket(path)}
    for name, path in reversed(buckets.values()):
        check_reached(name, path)


def _cache_compiled(folder: str, workdir: epath.Path) -> None:
    """Keeps compiled programs for the next start, unless jax already has a folder for them, or the run's folder can't
    be written to (jax would warn of that for each program)."""
    import jax

    if folder == "auto":
        folder = str(workdir / "compile_cache") if is_bucket(workdir) or may_write(workdir) else ""
    name = "jax_compilation_cache_dir"
    if folder and not getattr(jax.config, name):  # jax's own types lack its settings
        jax.config.update(name, folder)


def _lengths() -> list[int]:
    if not all(length.isdigit() and int(length) for length in _LENGTHS.value):
        raise UserError(f"--lengths={','.join(_LENGTHS.value)}: must be numbers of tokens, such as 1024,2048")
    return [int(length) for length in _LENGTHS.value]


def _settings() -> Settings:
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    try:
        if not hasattr(_CONFIG.value, "to_dict"):
            given = type(_CONFIG.value).__name__
            raise UserError(f"--config={name}: get_config returns {given}; must be a changed default_config()")
        if _SOURCE.value is not None:
            _CONFIG.value.data.source = _SOURCE.value
        return resolve(_CONFIG.value)
    except OSError as error:  # config_flags delays it until the config is used
        raise UserError(f"--config={name}: can't be read; must be the path of a config file") from error


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags. absl has its own errors; config_flags raises many kinds for a wrong config file or override."""
    overrides, has_config = overrides_of(argv), given(argv, "config") is not None
    argv = with_config(argv)
    for name, value in overrides.items():
        check_name(name, value)
        if name in GROUPS:
            raise UserError(f"{name}={value}: is a group of settings; give one of them, like {name}.{GROUPS[name][0]}")
    try:
        return flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
        name = str(error).removeprefix("flag --").partition("=")[0]
        said = _wrong_type(name, overrides[name]) if name in overrides else illegal_value(str(error))
        raise UserError(said) from error
    except flags.UnrecognizedFlagError as error:
        known = [flag.name for flag in flags.FLAGS.get_flags_for_module(__name__)]
        raise UserError(unknown_flag(error.flagname, known)) from error
    except terminal.OutputError:  # of --help
        raise
    except flags.Error as error:
        raise UserError(f"flags: {error}") from error
    except Exception as error:  # from the config file, which may do anything
        raise UserError(_in_config_file(error, given(argv, "config") if has_config else None)) from error


def _wrong_type(name: str, value: str | None) -> str:
    kind = kind_name(type(default_config()[name.removeprefix("config.")]))
    return f"{name}={'' if value is None else value}: must be {kind}"


def _in_config_file(error: Exception, config: str | None) -> str:
    """The error message for a config file: our own if a setting's name or value is wrong, with the line."""
    path = (config or "").partition(":")[0]
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f" ({path}, line {lines[-1]})" if lines else ""
    cause = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return f"{cause}{where}"
    return f"--config={config}: {type(error).__name__}: {error}{where}; fix the file"


def run() -> None:
    """Runs the command line: `python -m tvq_pod.main` and the command `tvq_pod` call this."""
    preemption = Preemption()  # at once: a signal that asks to save must never end a process that is starting
    terminal.prepare()
    # Tracing makes many objects that stay: collecting garbage as often as Python does takes a sixth of a start.
    gc.set_threshold(20_000)
    try:
        try:
            app.run(functools.partial(main, preemption=preemption), flags_parser=_parse)
        except SystemExit:
            sys.stdout.flush()
            raise
    except Preempted as preempted:
        terminal.tell(" ".join(str(preempted).split()))
        _exit_alone(PREEMPTED)
    except UserError as error:
        terminal.tell("error: " + " ".join(str(error).split()))
        _exit_alone(1)
    except terminal.OutputError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            _exit_alone(terminal.PIPE_CLOSED)
        terminal.tell(f"error: stdout can't be written ({error})")
        _exit_alone(1)
    except Exception as error:
        if not _is_one_of_many():
            raise
        text = " ".join(str(error).split())
        if type(error).__name__ == "JaxRuntimeError" and any(sign in text for sign in LOST_PEER):
            terminal.tell(f"error: another process of the job has ended, or can't be reached ({text[:200]})")
        else:
            traceback.print_exc()
        _exit_alone(1)


def _is_one_of_many() -> bool:
    return flags.FLAGS.is_parsed() and (_COORDINATOR.value is not None or _MULTIHOST.value)


def _exit_alone(code: int) -> None:
    """Ends the process; one of many ends at once, since Python's normal exit would wait for the others."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, terminal.OutputError):  # Python would exit with a different code
            os._exit(code)
    if _is_one_of_many():
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
