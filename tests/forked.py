"""Real processes that start quickly. `Popen` is subprocess.Popen, except that `python -m MODULE` and `python -c CODE`
run in a fork of one process that has imported all packages already, which is most of the time that a start takes.

The forks have their own environment, folder, streams and signals, as any process has. Three things differ from a
process that Python starts anew, so one test of every program starts it with subprocess.Popen: the options of Python
itself and the variables that jax reads when it is imported are those of the first process, and at its end the process
runs what is registered with atexit, but does not take the interpreter apart.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import warnings

MAX_BYTES = 200_000  # of a request
_Anew = subprocess.Popen  # which may have been replaced by the one below when it is called
# Not the programs themselves: each has flags of its own.
IMPORTED = (
    "fsspec.asyn",
    "gcsfs.core",
    "google.cloud.storage",
    "launch.gcloud",
    "matplotlib.figure",
    "ml_collections.config_flags",
    "tarfile",
    "tensorboardX",
    "tvq_pod.config.mode_flags",
    "tvq_pod.config.resolve",
    "tvq_pod.modes.evaluate",
    "tvq_pod.modes.inspect_run",
    "tvq_pod.modes.prepare",
    "tvq_pod.modes.sample",
    "tvq_pod.modes.train",
)


class Popen(_Anew):
    """A process; see above for what is different."""

    _status: socket.socket | None = None  # from which its exit status can be read, once it has ended
    _reading = threading.Lock()

    # The arguments are those of Python 3.11 to 3.13.
    def _execute_child(
        self,
        args,
        executable,
        preexec_fn,
        close_fds,
        pass_fds,
        cwd,
        env,
        startupinfo,
        creationflags,
        shell,
        p2cread,
        p2cwrite,
        c2pread,
        c2pwrite,
        errread,
        errwrite,
        restore_signals,
        gid,
        gids,
        uid,
        umask,
        start_new_session,
        process_group,
    ):
        command = [] if isinstance(args, (str, bytes, os.PathLike)) else list(map(os.fsdecode, args))
        if command[:1] != [sys.executable] or command[1:2] not in (["-m"], ["-c"]) or preexec_fn:
            return vars(_Anew)["_execute_child"](
                self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
                start_new_session, process_group,
            )  # fmt: skip
        streams = [own if given == -1 else given for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        group = "session" if start_new_session else os.getpgid(0) if process_group == -1 else process_group
        program = dict(
            arguments=command[1:],
            environment=dict(os.environ if env is None else env),
            folder=os.path.abspath(cwd or "."),
            group=group,
        )
        self.pid, self._status = _zygote().fork(program, streams)
        for ours, theirs in ((p2cwrite, p2cread), (c2pread, c2pwrite), (errread, errwrite)):
            if theirs != -1 and ours != -1:
                os.close(theirs)
        self._closed_child_pipe_fds = True

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None."""
        if self._status is None:
            return super().poll()
        with self._reading:
            if self.returncode is None and select.select([self._status], [], [], 0)[0]:
                self.returncode = int(self._status.recv(100))
                self._status.send(b"read")  # now its process id may be another one's
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        if self._status is None:
            return super().wait(timeout)
        if self.poll() is None and not select.select([self._status], [], [], timeout)[0]:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        code = self.poll()
        assert code is not None
        return code


class _Zygote:
    """The process that has imported everything, seen from one that asks it for forks, which may be a fork itself."""

    address = ""  # in forks: where it listens

    def __init__(self):
        self._variables = _of_jax(os.environ)
        if self.address:
            return
        folder = tempfile.mkdtemp()
        self.address = f"{folder}/socket"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            listening.bind(self.address)
            listening.listen(100)
            command = [sys.executable, "-m", "tests.forked", str(listening.fileno())]
            root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
            inherited, null = [listening.fileno()], subprocess.DEVNULL
            process = _Anew(command, pass_fds=inherited, cwd=root, stdin=subprocess.PIPE, stdout=null)
        atexit.register(shutil.rmtree, folder)
        atexit.register(process.communicate)  # it ends when its standard input does

    def fork(self, program: dict, streams: list[int]) -> tuple[int, socket.socket]:
        """The process id of a fork, and a socket from which its exit status can be read."""
        assert _of_jax(program["environment"]) == self._variables, "jax reads them when it is imported"
        status = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        status.connect(self.address)
        socket.send_fds(status, [json.dumps(program).encode()], streams)
        return int(status.recv(100)), status


_zygote = functools.cache(_Zygote)


def _of_jax(environment) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("JAX_")}


def _fork() -> int:
    with warnings.catch_warnings():  # jax warns of forks: this process has no threads, and no backend of jax
        warnings.simplefilter("ignore")
        return os.fork()


def _become(program: dict, streams: list[int], own_files: frozenset[int]) -> None:
    """Runs a program in this process, which is a fork, and ends. own_files: that stay open, besides the streams."""
    if program["group"] == "session":
        os.setsid()
    else:
        with contextlib.suppress(PermissionError):  # a group of another session
            os.setpgid(0, program["group"])
    for number, stream in enumerate([os.dup(stream) for stream in streams]):  # a stream may have another one's number
        os.dup2(stream, number)
    for other in map(int, os.listdir("/proc/self/fd")):
        if other not in own_files:
            with contextlib.suppress(OSError):  # the folder that was looked in
                os.close(other)
    encoding = sys.stdout.encoding
    sys.stdin = os.fdopen(0, encoding=encoding, closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding=encoding, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding, "backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(program["environment"])
    os.chdir(program["folder"])
    sys.path[0] = program["folder"]
    subprocess.Popen = Popen
    kind, name, *arguments = program["arguments"]
    sys.argv = [kind, *arguments]
    code = 0
    try:
        if kind == "-m":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(name, main.__dict__)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    vars(threading)["_shutdown"]()  # joins the threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = 120  # as Python has it
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _serve(listening: socket.socket) -> None:
    """Forks on request, and tells how each fork ended, until standard input is closed."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork that looked through these objects would copy them
    gc.set_threshold(20_000, 20, 50)  # as in conftest.py
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run in the background, or under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    _Zygote.address = listening.getsockname()
    files = [name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")]
    own_files = frozenset(map(int, files)) - {listening.fileno()}
    running: dict[int, socket.socket] = {}  # by process id, where to tell how it ends
    told: dict[socket.socket, int] = {}  # those whose end is known and not read yet: as zombies, they keep their id
    ended, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    while True:
        ready, _, _ = select.select([listening, ended, 0, *told], [], [])
        if 0 in ready:
            return
        for status in told.keys() & set(ready):
            os.waitpid(told.pop(status), 0)
            status.close()
        if ended in ready:
            os.read(ended, 1000)
            for pid in list(running):
                found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if found:
                    code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
                    status = running.pop(pid)
                    with contextlib.suppress(BrokenPipeError):
                        status.send(str(code).encode())
                    told[status] = pid
        if listening not in ready:
            continue
        asked, _ = listening.accept()
        message, streams, _, _ = socket.recv_fds(asked, MAX_BYTES, 3)
        if not message:  # who asked has ended
            asked.close()
            continue
        pid = _fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _become(json.loads(message), streams, own_files)
        running[pid] = asked
        for stream in streams:
            os.close(stream)
        asked.send(str(pid).encode())


if __name__ == "__main__":
    from tests import forked  # the module that a program finds, too

    forked._serve(socket.socket(fileno=int(sys.argv[1])))
