"""Which of a run's checkpoints stay."""

from tvq_pod.config.settings import CheckpointSettings
from tvq_pod.run.step_folders import stale_steps


def test_which_steps_need_not_stay():
    steps = list(range(10, 101, 10))

    def stale(losses=None, **settings):
        return stale_steps(steps, CheckpointSettings(**settings), losses or {})

    assert stale(keep=0) == []
    assert stale(keep=3) == steps[:-3]
    assert stale(keep=1, keep_every_steps=40) == [10, 20, 30, 50, 60, 70, 90]
    losses = {20: 1.5, 50: 1.2, 70: 1.3, 90: 1.4}
    assert stale(losses, keep=2, keep_best=1) == [10, 20, 30, 40, 60, 70, 80]
    assert stale(losses, keep=1, keep_best=2) == [10, 20, 30, 40, 60, 80, 90]
    assert 100 not in stale(losses, keep=1, keep_best=0)
