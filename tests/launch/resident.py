"""The programs on the PATH of a test, quickly: one process has imported them and runs each call in a fork of itself.
What lies on the PATH is a shell script that says who it is and waits for the exit code.

    python resident.py        prints its port, and serves until its standard input is closed
"""

import contextlib
import os
import pathlib
import select
import signal
import socket
import sys
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # a program: nobody says where its modules are

from tests.launch import gcloud_program, machine_program  # noqa: E402

PROGRAMS = dict(
    gcloud=gcloud_program.gcloud,
    systemctl=machine_program.systemctl,
    journalctl=machine_program.journalctl,
    python=machine_program.python,
)


def script(name: str, port: int) -> str:
    """The lines of a bash script that has a program run in its own environment, folder and streams."""
    return (  # its own streams are others while it writes and reads
        f"exec 3<>/dev/tcp/127.0.0.1/{port} 4<&0 5>&1 6>&2\n"
        f'printf \'%s\\0\' "$$" "$PPID" {name} "$@" end >&3\n'
        'read -r -u 3 code && exit "$code"'
    )


def answer(connection: socket.socket) -> None:
    """Runs what is asked for. Never returns."""
    asked = b""
    while not asked.endswith(b"\0end\0"):
        asked += connection.recv(65536) or os._exit(1)  # whoever asked was killed
    pid, parent, name, *arguments, _ = map(os.fsdecode, asked.split(b"\0")[:-1])
    code = 1
    try:
        there = pathlib.Path("/proc", pid)
        variables = (there / "environ").read_bytes().split(b"\0")
        os.environ.clear()
        os.environ.update(dict(os.fsdecode(line).split("=", 1) for line in variables if b"=" in line))
        os.environ["STANDIN_CALLER"] = parent
        os.chdir(there / "cwd")
        for number in range(3):
            stream = os.open(there / f"fd/{4 + number}", os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY)
            os.dup2(stream, number)
            os.close(stream)
        PROGRAMS[name](arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
            connection.sendall(f"{code}\n".encode())
        os._exit(code)


def main() -> None:
    server = socket.create_server(("127.0.0.1", 0), backlog=100)
    print(server.getsockname()[1], flush=True)
    machine_program.versions_here()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        ready, _, _ = select.select([server, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = server.accept()
        with connection:
            if not os.fork():
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  as long as the process lives
                answer(connection)


if __name__ == "__main__":
    main()
