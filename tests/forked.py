"""Command lines of tvq_pod, one after the other, in forks of one process: imports, most of a short run's time, are done
once. A program: it reads a JSON list of flags a line, and prints [exit code, output, messages] for each.
"""

import json
import os
import subprocess
import sys
import tempfile


def run_all(commands: list[tuple[str, ...]], **settings) -> list[tuple[int, str, str]]:
    """Exit code, output and messages of each command. settings: of subprocess.run."""
    lines = "".join(json.dumps(list(map(str, flags))) + "\n" for flags in commands)
    program = [sys.executable, "-m", "tests.forked"]
    done = subprocess.run(program, input=lines, text=True, stdout=subprocess.PIPE, check=True, **settings)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def main() -> None:
    from tvq_pod.inference import evaluator as eval  # noqa: F401
    from tvq_pod.main import run
    from tvq_pod.modes import inspect_run, train  # noqa: F401

    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if not child:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.argv[1:] = json.loads(line)
                return run()
            _, status = os.waitpid(child, 0)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
        print(json.dumps([os.waitstatus_to_exitcode(status), *texts]), flush=True)


if __name__ == "__main__":
    main()
