"""Bad steps: which are, that they change nothing, and that a run goes back from many of them and skips their data."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tests.common import small_config
from tests.data.made_streams import made_streams
from tests.made_up import first_state, made_up_step
from tvq_pod.config.settings import (
    BadStepsSettings,
    CheckpointSettings,
    DataSettings,
    EvalSettings,
    MetricsSettings,
    OptimizerSettings,
    SampleSettings,
    Settings,
    TrainSettings,
)
from tvq_pod.data import streams
from tvq_pod.data.loader import Feed
from tvq_pod.data.store import TokenStore
from tvq_pod.errors import Preempted, UserError
from tvq_pod.modes import train as train_module
from tvq_pod.modes.train import train
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.planning.module import Module
from tvq_pod.run.checkpoint import Checkpoints
from tvq_pod.run.checkpoint_reader import CheckpointReader
from tvq_pod.run.hashes import sha256_of
from tvq_pod.run.preemption import Preemption
from tvq_pod.run.skipped import Skip, Skipped
from tvq_pod.training import bad_steps, restore
from tvq_pod.training.step import abstract_batch, abstract_train_state, make_train_step

STEPS, EVERY, UPDATE_LEN = 24, 5, 8
GOOD = dict(
    loss=2.0,
    l_commit=1.0,
    grad_norm=1.0,
    code_perplexity=np.array([4.0, 3.0]),
    dead_codes=np.array([0.0, 0.5]),
    code_count_max=np.array([9.0, 8.0]),
)
SUMS = [np.ones([2, 3]), np.ones([2, 3, 4])]


def judged(history=(), changes=None, sums=SUMS, **settings):
    """Whether a step is good that comes after good ones with these losses."""
    settings = BadStepsSettings(**settings)
    known = bad_steps.start()
    for loss in history:
        good, known = bad_steps.judge(known, jax.tree.map(jnp.float32, GOOD | dict(loss=loss)), SUMS, settings)
        assert good
    good, after = bad_steps.judge(known, jax.tree.map(jnp.float32, GOOD | (changes or {})), sums, settings)
    assert int(after["n_bad"]) == int(not good)
    if not good:
        assert all(after[name] == known[name] for name in ("loss_mean", "loss_var", "n_losses"))
    return bool(good)


def test_a_step_like_those_before_is_good():
    assert judged()
    assert judged(history=[2.0, 2.1, 1.9] * 40, spike_after_steps=100)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["loss", "l_commit", "grad_norm"])
def test_what_is_not_finite_is_bad(name, value):
    assert not judged(changes={name: value})


@pytest.mark.parametrize("which", [0, 1])
def test_codebook_sums_that_are_not_finite_are_bad(which):
    sums = [array.copy() for array in SUMS]
    sums[which].flat[-1] = np.nan
    assert not judged(sums=sums)
    assert not judged(changes=dict(code_count_max=np.array([1.0, np.inf])))


@pytest.mark.slow(1)
def test_a_spike_is_a_loss_so_many_deviations_above_the_mean():
    rng = np.random.default_rng(0)
    history = (2.0 + 0.1 * rng.standard_normal(300)).tolist()
    # about 0.1, of which the last hundred count the most
    assert judged(history, dict(loss=2.4), spike_deviations=6.0)
    assert not judged(history, dict(loss=3.0), spike_deviations=6.0)
    assert judged(history, dict(loss=0.5), spike_deviations=6.0)  # below is no spike
    assert judged(history, dict(loss=3.0), spike_deviations=0.0)
    assert judged(history[:50], dict(loss=3.0), spike_deviations=6.0)  # too early to tell


def test_a_loss_that_hardly_varies_makes_no_spike_of_a_small_change():
    assert judged([2.0] * 200, dict(loss=2.05), spike_deviations=6.0)
    assert not judged([2.0] * 200, dict(loss=2.2), spike_deviations=6.0)


def test_a_codebook_that_collapses_in_any_layer_is_bad():
    assert judged(min_code_perplexity=2.5)
    assert not judged(min_code_perplexity=3.5)
    assert judged(max_dead_codes=0.6)
    assert not judged(max_dead_codes=0.4)


def stacks_of(fill: float) -> dict:
    """Three layers of states of some dtypes, with what is not equal to itself among them."""
    values = np.arange(3 * 512, dtype=np.float32).reshape(3, 2, 256) + fill
    values[1, 0, :2] = np.nan, -0.0
    return dict(mean=jnp.array(values), cache=dict(v=jnp.array(values, jnp.bfloat16), z=jnp.array(values[..., 2], int)))


def test_states_of_a_good_step_are_the_new_ones_and_of_a_bad_step_the_old_ones():
    new, old = stacks_of(1.0), stacks_of(1000.0)
    choose = jax.jit(bad_steps.choose_stacks)
    assert sha256_of(choose(True, new, old)) == sha256_of(new)
    assert sha256_of(choose(False, new, old)) == sha256_of(old) != sha256_of(new)


def test_a_good_step_copies_no_state():
    """The program has no memory for a copy, and its only loop makes no turn, by plan's count."""
    stacks = dict(mean=stacks_of(1.0)["mean"])  # a CPU computes bfloat16 in float32
    compiled = jax.jit(bad_steps.choose_stacks, donate_argnums=1).lower(True, stacks, stacks).compile()
    memory, size = compiled.memory_analysis(), sum(leaf.nbytes for leaf in jax.tree.leaves(stacks))
    assert memory is not None
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 4
    module = Module(compiled.as_text() or "")
    loops = [instruction for body in module.computations() for instruction in body if instruction.opcode == "while"]
    assert [module.turns(loop) for loop in loops] == [0]


# ------------------------------------------------------------------ whole runs, whose data is poisoned


def settings_for(corpus, **bad_step_settings) -> Settings:
    return Settings(
        model=small_config(
            n_layer=1, n_vocab=260, block_len=8, mem_len=8, p_dropres=0.1, dtype="float32", param_dtype="float32",
            head_type="mqa",
        ),
        data=DataSettings(source=str(corpus), validation_share=0.0, test_share=0.0),
        train=TrainSettings(batch_size=8, update_len=UPDATE_LEN, num_steps=STEPS, log_every_steps=1),
        optimizer=OptimizerSettings(warmup_steps=0, learning_rate=0.01),
        checkpoint=CheckpointSettings(every_steps=EVERY, keep=0),
        bad_steps=BadStepsSettings(rollback_after=3, **bad_step_settings),
        eval=EvalSettings(at_end=False),
        sample=SampleSettings(length=0),
        metrics=MetricsSettings(tensorboard=False),
    )  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for n in range(20):
        (folder / f"{n}.txt").write_text(f"document {n} says {n * n}, and no more than that. " * 8)
    return folder


real_step = functools.cache(make_train_step)


@pytest.fixture(autouse=True)
def make_step(request, monkeypatch):
    """What makes the steps of a run: made up, or the real ones for tests that say so."""
    make_step = getattr(request, "param", made_up_step)
    monkeypatch.setattr(train_module, "compiled_train_step", make_step)
    monkeypatch.setattr(restore, "create_train_state", first_state)
    return make_step


@pytest.fixture
def poison(monkeypatch):
    """Updates of the streams whose third row makes the loss NaN."""
    updates, request_row = set(), streams.request_row

    def poisoned(tokens, plan, row, begin, *rest):
        arrays = request_row(tokens, plan, row, begin, *rest)()
        if begin // UPDATE_LEN in updates and row == 2:
            arrays["loss_mask"] = np.full_like(arrays["loss_mask"], np.nan)
        return lambda: arrays

    monkeypatch.setattr(streams, "request_row", poisoned)
    return updates


class NoSignals(Preemption):
    """None comes, and none is watched for."""

    def __init__(self):
        self.can_save = False

    @property
    def requested(self):
        return False

    def take_save(self):
        return False


def run(settings, workdir):
    train(settings, epath.Path(workdir), NoSignals())
    return state_of(settings, workdir, STEPS)


def state_of(settings, workdir, step):
    checkpoints = CheckpointReader(epath.Path(workdir))
    state = jax.device_get(checkpoints.restore(step, abstract_train_state(settings, make_mesh(settings.mesh))))
    checkpoints.close()
    return state


def by_hand(settings, workdir, updates, bad=(), make_step=made_up_step):
    """The slow, obvious way: these updates, one after the other; of those in `bad`, only the step is counted."""
    mesh = make_mesh(settings.mesh)
    split = TokenStore(f"{workdir}/store").split("train")
    plan = made_streams(split, settings.train.batch_size, settings.seed)
    state, step_fn = first_state(settings, mesh), make_step(settings, mesh)
    for update in updates:
        if update in bad:
            state = state.replace(step=state.step + 1)
            continue
        (batch,) = Feed(split, plan, mesh, 8, UPDATE_LEN, threads=1, ahead=1).batches(update, update + 1)
        state, _ = step_fn(state, batch)
    return jax.device_get(state)


def assert_same(ours, others):
    for name in ("step", "params", "opt_state", "recurrent"):
        assert sha256_of(getattr(ours, name)) == sha256_of(getattr(others, name)), name


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("forget_state", [False, True])
def test_a_bad_step_changes_nothing_but_its_count(corpus, forget_state):
    """The real step. With forget_state, the streams' states begin anew. The rate that is told is the one in use."""
    settings = settings_for(corpus, forget_state=forget_state)
    mesh = make_mesh(settings.mesh)
    tokens = np.random.default_rng(0).integers(0, 260, size=[8, UPDATE_LEN]).astype(np.int32)
    mask = np.ones(tokens.shape, np.float32)
    batch = dict(inputs=tokens, targets=tokens, doc_ids=np.zeros_like(tokens), loss_mask=mask)
    step_fn = real_step(settings, mesh)
    fresh = first_state(settings, mesh).recurrent
    before, _ = step_fn(first_state(settings, mesh), batch)
    assert sha256_of(before.recurrent) != sha256_of(fresh)
    kept = jax.device_get(before)
    after, metrics = step_fn(before, batch | dict(loss_mask=np.where(tokens == tokens[2, 0], np.nan, mask)))
    assert all(array.is_deleted() for array in jax.tree.leaves(before.recurrent))
    assert (int(metrics["n_bad"]), int(after.step)) == (1, 2)
    for name in ("params", "opt_state"):
        assert sha256_of(getattr(after, name)) == sha256_of(getattr(kept, name)), name
    assert sha256_of(after.recurrent) == sha256_of(fresh if forget_state else kept.recurrent)
    rate = float(metrics["learning_rate"])
    following, metrics = step_fn(after, batch)
    assert int(metrics["n_bad"]) == 0
    assert float(metrics["learning_rate"]) == rate  # the schedule stood still, too
    _, metrics = step_fn(following, batch)
    assert float(metrics["learning_rate"]) != rate


@pytest.mark.slow(2)
@pytest.mark.parametrize("forget_state", [False, True])
def test_a_step_overwrites_the_states_of_before_only_if_nothing_needs_them(corpus, forget_state):
    """With forget_state there is no second copy of the states."""
    settings = settings_for(corpus, forget_state=forget_state)
    mesh = make_mesh(settings.mesh)
    lowered = make_train_step(settings, mesh).lower(
        abstract_train_state(settings, mesh), abstract_batch(settings, mesh)
    )
    state, recurrent, batch = ({info.donated for info in jax.tree.leaves(part)} for part in lowered.args_info[0])
    assert (state, recurrent, batch) == ({True}, {forget_state}, {False})


@pytest.mark.slow
def test_a_bad_step_is_not_applied_and_the_run_goes_on(corpus, tmp_path, poison):
    settings = settings_for(corpus)
    poison |= {6, 14, 15}
    state = run(settings, tmp_path)
    assert [line["step"] for line in lines_of(tmp_path) if line["bad_steps"]] == [7, 15, 16]
    # step 15 was bad: its checkpoint had to wait for the next good one
    assert CheckpointReader(epath.Path(tmp_path)).steps() == [5, 10, 17, 20, 24]
    assert_same(state, by_hand(settings, tmp_path, range(STEPS), poison))
    assert not (tmp_path / "skipped.jsonl").exists()


@pytest.mark.parametrize("make_step", [made_up_step, pytest.param(real_step, marks=pytest.mark.slow)], indirect=True)
@pytest.mark.slow
def test_after_several_in_a_row_the_run_goes_back_and_skips_their_data(corpus, tmp_path, poison, make_step):
    settings = settings_for(corpus)
    poison |= {12, 13, 14}
    state = run(settings, tmp_path)
    (line,) = [json.loads(text) for text in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert (line["update"], line["count"], line["bad_steps"], line["back_to"]) == (12, 3, [13, 15], 10)
    logged = [line["step"] for line in lines_of(tmp_path) if line["split"] == "train"]
    assert logged == [*range(1, 15), *range(11, STEPS + 1)]  # and no line of the steps that were left comes late
    left = [update for update in range(STEPS + 3) if update not in poison]
    expected = by_hand(settings, tmp_path, left, make_step=make_step)
    assert_same(state, expected)
    assert sha256_of(state.digest) == sha256_of(expected.digest)  # the tokens that were skipped are not among them
    # A run that falls back to a checkpoint of before skips the same data.
    for step in (15, 20, 24):
        (tmp_path / f"checkpoints/{step}").rename(tmp_path / f"checkpoints/{step}.gone")
    assert_same(run(settings, tmp_path), expected)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_the_last_steps_are_no_exception(corpus, tmp_path, poison):
    """Bad to the end: it goes back all the same. Not often enough: what is saved then drives out no good step."""
    settings = settings_for(corpus)
    settings = dataclasses.replace(settings, checkpoint=dataclasses.replace(settings.checkpoint, keep=1, keep_best=0))
    poison |= {22, 23}
    run(settings, tmp_path / "few")
    assert CheckpointReader(epath.Path(tmp_path / "few")).steps() == [20, 24]
    poison |= {21, 22, 23}
    state = run(settings, tmp_path / "many")
    left = [update for update in range(STEPS + 3) if update not in poison]
    assert_same(state, by_hand(settings, tmp_path / "many", left))


@pytest.mark.slow
def test_going_back_holds_one_state_and_not_two(corpus, tmp_path, poison, monkeypatch):
    settings, live = settings_for(corpus), []
    restore = Checkpoints.restore

    def restored(*args, **kwargs):
        live.append(sum(array.nbytes for array in jax.live_arrays()))
        return restore(*args, **kwargs)

    monkeypatch.setattr(Checkpoints, "restore", restored)
    poison |= {12, 13, 14}
    of_state = sum(array.nbytes for array in jax.tree.leaves(first_state(settings, make_mesh(settings.mesh))))
    before = sum(array.nbytes for array in jax.live_arrays())
    train(settings, epath.Path(tmp_path), NoSignals())
    assert live[0] - before < of_state / 2


def test_a_skipped_line_that_was_cut_off_is_none_and_a_damaged_one_is_said(tmp_path):
    path = epath.Path(tmp_path)
    Skipped(path).add(Skip(0, 8, 8, 12, 3), (13, 15), 10)
    line = (tmp_path / "skipped.jsonl").read_text()
    (tmp_path / "skipped.jsonl").write_text(line + line[:20])
    assert Skipped(path).count() == 1
    (tmp_path / "skipped.jsonl").write_text(line[:20] + "\n" + line)
    with pytest.raises(UserError, match=r"skipped.jsonl is damaged"):
        Skipped(path)


@pytest.mark.slow
def test_a_checkpoint_and_metrics_of_other_tokens_are_not_of_one_run(corpus, tmp_path):
    settings = settings_for(corpus)
    run(settings, tmp_path)
    lines = lines_of(tmp_path)
    lines[-1]["digest"] = "0" * 16
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"metrics.jsonl has digest 0{16} of the tokens up to step 24"):
        run(settings, tmp_path)


@pytest.mark.slow
def test_saves_that_fail_are_not_the_last(corpus, tmp_path, monkeypatch):
    """Two in the middle of a run can't be written; the one after them is."""
    settings = settings_for(corpus)
    monkeypatch.setattr("tvq_pod.run.checkpoint.RETRY_SECONDS", 0.0)
    save, has_room, steps = Checkpoints.save, Checkpoints._has_room, []

    def noted(self, state, step, *args, **kwargs):
        steps.append(step)
        save(self, state, step, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "save", noted)
    monkeypatch.setattr(
        Checkpoints, "_has_room", lambda self, state: steps[-1] not in (10, 15) and has_room(self, state)
    )
    run(settings, tmp_path)
    assert CheckpointReader(epath.Path(tmp_path)).steps() == [5, 20, 24]


class AskedAt(NoSignals):
    """SIGTERM that comes in a step: after each, the run asks once."""

    def __init__(self, step):
        super().__init__()
        self._left = step

    @property
    def requested(self):
        self._left -= 1
        return self._left <= 0


@pytest.mark.slow
def test_a_run_that_is_preempted_between_bad_steps_can_still_go_back(corpus, tmp_path, poison):
    """Its only regular checkpoint is of before them, and is not driven out by the one of SIGTERM."""
    settings = settings_for(corpus)
    settings = dataclasses.replace(settings, checkpoint=dataclasses.replace(settings.checkpoint, keep=1, keep_best=0))
    poison |= {12, 13, 14}
    with pytest.raises(Preempted, match="saved step 14"):
        train(settings, epath.Path(tmp_path), AskedAt(14))
    assert CheckpointReader(epath.Path(tmp_path)).steps() == [10, 14]
    state = run(settings, tmp_path)
    assert (tmp_path / "checkpoints/14.undone").exists()
    assert_same(state, by_hand(settings, tmp_path, [update for update in range(STEPS + 3) if update not in poison]))


@pytest.mark.slow
def test_a_run_that_goes_back_too_often_gives_up(corpus, tmp_path, poison):
    poison |= set(range(2, 100))
    settings = settings_for(corpus, max_rollbacks=2)
    with pytest.raises(UserError, match=r"config.bad_steps.max_rollbacks=2: steps 3 to 5 were bad"):
        run(settings, tmp_path)
    lines = [json.loads(text) for text in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["update"], line["count"], line["back_to"]) for line in lines] == [(2, 3, 0), (5, 3, 0)]
    # started again it gives up again, and more may be allowed
    with pytest.raises(UserError, match="already gone back this many times"):
        run(settings, tmp_path)
    poison &= set(range(8))
    more = dataclasses.replace(settings, bad_steps=dataclasses.replace(settings.bad_steps, max_rollbacks=3))
    run(more, tmp_path)
