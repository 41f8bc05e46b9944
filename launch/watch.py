"""The supervisor of one run: starts it again when it was preempted, when its slice was taken back, and a few times when
it failed, until it is done. The supervisor's state is in the record, the queue and the run's own status file, so it may
be killed at any point and started again."""

from tvq_pod.errors import UserError

from .clock import ago
from .gcloud import GcloudError
from .machines import MISSING, WAITING, Machines, Queued, Said
from .record import ASKED, DONE, PREPARED, STARTED, STOPPED, Gone
from .show import progress

PREEMPTED = "75"  # exit code: saved, run me again
BACK_OFF_SECONDS, LONGEST_BACK_OFF_SECONDS = 30.0, 900.0
LOST = ("PREEMPTED", "TERMINATED", "gone")  # states of a slice whose request is still ACTIVE
END_SECONDS = 240.0  # time in which all processes of a job end after one has


class GivenUp(UserError):
    """Restarting does not help."""


class Watch:
    """Watches one run's machines."""

    def __init__(self, machines: Machines, max_restarts: int):
        """max_restarts: the limit for failures without a newer checkpoint, and for failed requests for a slice."""
        self.machines, self.max_restarts = machines, max_restarts
        self._last_line, self._said_at = None, 0.0
        self._ending_since = None

    def run(self) -> None:
        """Returns when the run is done, or was stopped by hand. Raises GivenUp; and UserError for problems that only a
        person can fix, such as a missing login, if they exist from the beginning."""
        record, first = self.machines.record, True
        if record.failures > self.max_restarts:
            raise GivenUp(f"--name={record.name}: gave up after {record.failures} failures; `run` starts over")
        while not self._finished():
            try:
                pause = self.step()
            except GcloudError as error:
                if first and error.kind in ("login", "denied"):
                    raise
                self._say(f"{error}; trying again")
                pause = self.machines.poll_seconds
            first = False
            if self.machines.gcloud.dry_run:
                return
            self.machines.clock.sleep(pause)

    def step(self) -> float:
        """Checks once, and acts. Returns the seconds until the next check."""
        machines, status = self.machines, self._status()
        if status and status["state"] == "done":
            machines.note(phase=DONE)
            return 0.0
        queued = machines.queue()
        if machines.gcloud.dry_run:
            self._show()
            return 0.0
        if queued.state == "ACTIVE":
            return self._supervise(status)
        if queued.state == MISSING:
            return self._ask()
        if queued.state in ("SUSPENDED", "FAILED"):
            return self._give_back(queued)
        self._say(queued.state + ("" if queued.state in WAITING else ": waiting until it is gone"))
        return self.machines.poll_seconds

    def _status(self) -> dict | None:
        """Returns the run's status. A newer checkpoint is progress: failures and restarts count from there."""
        status = self.machines.status()
        if status and (status.get("saved_step") or -1) > self.machines.record.saved_step:
            self.machines.note(saved_step=status["saved_step"], failures=0, restarts=0)
        return status

    def _finished(self) -> bool:
        if self.machines.gcloud.dry_run:
            return False
        fresh = self.machines.records.load(self.machines.record.name)  # `stop`, `run` and `down` also write it
        if fresh is None:
            raise Gone(f"--name={self.machines.record.name}: was deleted in the meantime")
        self.machines.record = fresh
        return fresh.phase in (DONE, STOPPED)

    # ------------------------------------------------------------------ the slice

    def _ask(self) -> float:
        record = self.machines.record
        self._say("requesting a slice")
        try:
            self.machines.ask()
        except GcloudError as error:
            waiting_helps = error.kind in ("capacity", "quota", "passing", "login")
            return self._refused(str(error), None if waiting_helps else self.max_restarts)
        self._say(f"requested {record.slices} x {record.accelerator}")
        return self.machines.poll_seconds

    def _give_back(self, queued: Queued) -> float:
        """Deletes the request for slices that were taken back or not available. Without force, so that slices that
        became ACTIVE are kept."""
        record = self.machines.record
        why = queued.why or queued.state
        self._say(f"{queued.state}: {queued.why or 'was taken back'}; deleting the request, and requesting it again")
        self.machines.gcloud.delete(record.name)
        if record.phase != ASKED:
            self.machines.note(phase=ASKED)
            return 0.0
        return self._refused(why, None if queued.may_help else self.max_restarts)

    def _refused(self, why: str, limit: int | None) -> float:
        """Handles a refused request. limit: None if waiting helps."""
        refusals = self.machines.record.refusals + 1
        self.machines.note(refusals=refusals)
        if limit is not None and refusals > limit:
            raise GivenUp(f"--name={self.machines.record.name}: requested a slice {refusals} times: {why}")
        pause = _back_off(refusals)
        self._say(f"{why}; requesting it again in {ago(pause)}")
        return pause

    # ------------------------------------------------------------------ the training

    def _supervise(self, status: dict | None) -> float:
        machines, record = self.machines, self.machines.record
        if record.phase != STARTED:
            return self._start()
        # If one process of a job ends, all do, so one machine is asked. The others are asked if it is not running.
        said = next(iter(machines.states("0", "0").values()), None)
        if said is None:
            return self._unreachable()
        attempt = f"{record.run_id}-{record.attempt}"
        if said == Said("running", attempt):
            self._ending_since = None
            self._say(progress(status))
            return self.machines.poll_seconds
        if said.word == "none" or said.rest.split()[:1] != [attempt]:  # it is a different machine
            machines.note(phase=ASKED)
            return self._start()
        return self._ended()

    def _unreachable(self) -> float:
        """Handles an ACTIVE slice whose first machine does not answer: it may be gone although the request is
        ACTIVE."""
        machines, record = self.machines, self.machines.record
        states = {name: node.get("state", "gone") for name, node in machines.nodes().items()}
        lost = [f"{name} is {state}" for name, state in states.items() if state in LOST]
        if not lost:
            self._say(f"its first machine does not answer; gcloud has {states}")
            return machines.poll_seconds
        self._say(f"{', '.join(lost)}; deleting what is left, and requesting a slice again")
        machines.gcloud.delete(record.name, force=True)
        machines.note(phase=ASKED)
        return 0.0

    def _start(self) -> float:
        machines, record = self.machines, self.machines.record
        states = {name: node.get("state", "gone") for name, node in machines.nodes().items()}
        if any(state in LOST for state in states.values()):
            return self._unreachable()
        if any(state != "READY" for state in states.values()):
            self._say(f"ACTIVE, but not ready: {states}")
            return machines.poll_seconds
        try:
            if record.phase == ASKED:
                machines.granted()
                machines.prepare()
            machines.start()
        except (GcloudError, Gone):
            raise
        except UserError as error:
            if machines.queue().state != "ACTIVE":  # taken back in the meantime
                return 0.0
            return self._failed(str(error), then=ASKED if record.phase == ASKED else PREPARED)
        return self.machines.poll_seconds

    def _ended(self) -> float:
        """Worker 0 has ended: waits for the others, and starts again or gives up."""
        machines = self.machines
        states = machines.states()
        running = [where for where, said in states.items() if said.word == "running"]
        now = machines.clock.now()
        self._ending_since = self._ending_since or now
        if running and now - self._ending_since < END_SECONDS:
            self._say(f"{len(running)} of {machines.expected} processes have not ended yet")
            return min(10.0, self.machines.poll_seconds)
        if running:
            machines.stop()
        self._ending_since = None
        status = self._status()  # it may have saved since this step began
        codes = {where: said.rest.split()[-1] for where, said in states.items() if said.word == "exited"}
        if codes and len(codes) == machines.expected and set(codes.values()) == {"0"}:
            machines.note(phase=DONE)
            return 0.0
        if PREEMPTED in codes.values() or any(said.word == "gone" for said in states.values()):
            machines.note(phase=PREPARED, restarts=machines.record.restarts + 1)
            again = machines.record.restarts - 1  # without a newer checkpoint since
            pause = _back_off(again) if again else min(10.0, machines.poll_seconds)
            self._say(f"was preempted; starting again in {ago(pause)}")
            return pause
        where, code = next(((w, c) for w, c in codes.items() if c != "0"), ("a machine", "unknown"))
        why = f"{where} ended with {code}" + (f": {status['error']}" if status and status.get("error") else "")
        return self._failed(why, then=PREPARED)

    def _failed(self, why: str, then: str) -> float:
        """Counts a failure. then: the phase from which to try again."""
        machines, record = self.machines, self.machines.record
        machines.note(failures=record.failures + 1, phase=then)
        record = machines.record
        if record.failures > self.max_restarts:
            raise GivenUp(
                f"--name={record.name}: {why}; failed {record.failures} times with no checkpoint after step "
                f"{max(record.saved_step, 0)}; `python -m launch.pod logs --name={record.name}` says more, and `run` "
                "starts counting again. Its slice still exists and costs money"
            )
        pause = _back_off(record.failures)
        self._say(f"{why}; failure {record.failures} without a newer checkpoint; trying again in {ago(pause)}")
        return pause

    # ------------------------------------------------------------------ messages

    def _say(self, line: str) -> None:
        """Prints a line unless it repeats the last one; a repeated line is printed once an hour."""
        now = self.machines.clock.now()
        if (line, now < self._said_at + 3600) != (self._last_line, True):
            self.machines.say(f"{self.machines.record.name}: {line}")
            self._last_line, self._said_at = line, now

    def _show(self) -> None:
        """Prints, for a dry run, what would happen if the slice had been taken back."""
        machines = self.machines
        machines.say("# if it is SUSPENDED or FAILED:")
        machines.gcloud.delete(machines.record.name)
        machines.ask()
        machines.say("# once it is ACTIVE:")
        machines.prepare()
        machines.start()


def _back_off(times: int) -> float:
    return min(BACK_OFF_SECONDS * 2 ** (times - 1), LONGEST_BACK_OFF_SECONDS)
