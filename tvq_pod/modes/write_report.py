"""--mode=report: writing everything known about a run to one page."""

from etils import epath

from tvq_pod.config.settings import Settings
from tvq_pod.run.report import write_report


def report(settings: Settings, workdir: epath.Path) -> None:
    """Writes WORKDIR/eval/report.html and prints its path. It needs no lock: the run may be training."""
    print(write_report(settings, workdir), flush=True)
