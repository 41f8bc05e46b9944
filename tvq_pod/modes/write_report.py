"""--mode=report: all that is known of a run, in one page."""

from etils import epath

from tvq_pod.config.settings import Settings
from tvq_pod.run.report import write_report


def report(settings: Settings, workdir: epath.Path) -> None:
    """Writes WORKDIR/eval/report.html, and prints its path. Needs no lock: a run may train meanwhile."""
    print(write_report(settings, workdir), flush=True)
