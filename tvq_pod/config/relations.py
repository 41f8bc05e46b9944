"""Rules between several settings. The values that one setting may have are defined with it, in settings.py and
model.py."""

import re

from tvq_pod.config.context_schedule import stages_of
from tvq_pod.config.mixture_schedule import n_stores, weights_of
from tvq_pod.config.settings import (
    IMAGE_BYTES,
    KEY_LETTERS,
    DataSettings,
    OptimizerSettings,
    ProfileSettings,
    Settings,
    generated,
)
from tvq_pod.config.stop_strings import stop_strings
from tvq_pod.errors import UserError


def check_relations(settings: Settings) -> None:
    """Raises UserError for settings that contradict each other, with the name of one of them."""
    model, train, data = settings.model, settings.train, settings.data
    if train.update_len % model.block_len:
        divisors = [n for n in range(1, train.update_len + 1) if train.update_len % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - model.block_len))
        raise UserError(
            f"config.model.block_len={model.block_len}: must divide config.train.update_len={train.update_len}, "
            f"as {nearest} does"
        )
    if (n_tokens := settings.eval.update_len) % model.block_len:
        raise UserError(
            f"config.eval.update_len={n_tokens}: must be a multiple of config.model.block_len={model.block_len}, for "
            f"example {-(-n_tokens // model.block_len) * model.block_len}; or 0, for that of training"
        )
    if train.batch_size % train.microbatches:
        raise UserError(
            f"config.train.microbatches={train.microbatches}: must divide config.train.batch_size={train.batch_size}"
        )
    stages_of(train.context_schedule)
    _check_warm_start(settings)
    if data.mixture_schedule and not data.mixture:
        raise UserError(
            f"config.data.mixture_schedule={data.mixture_schedule}: is for config.data.mixture, which is empty"
        )
    weights_of(data.mixture_schedule, n_stores(data))
    _check_schedule(settings.optimizer, train.num_steps)
    _check_profile(settings.profile, train.num_steps)
    if data.validation_share + data.test_share >= 1:
        raise UserError(
            f"config.data.validation_share={data.validation_share}: with config.data.test_share={data.test_share} "
            "nothing is left to train on; their sum must be below 1"
        )
    if stop_strings(settings.sample.stop) and data.format == "imagenet64":
        raise UserError(f"config.sample.stop={settings.sample.stop}: images have no text; leave it out")
    if data.format == "imagenet64":
        if data.vocab != "bytes":
            raise UserError(f"config.data.vocab={data.vocab}: must be bytes with config.data.format=imagenet64")
        if settings.sample.length not in (0, IMAGE_BYTES):
            raise UserError(
                f"config.sample.length={settings.sample.length}: must be {IMAGE_BYTES}, an image, with "
                "config.data.format=imagenet64; or 0"
            )
    if settings.eval.cache == "off" and model.attn_type != "vq":
        raise UserError(
            f"config.eval.cache=off: there is no cache with config.model.attn_type={model.attn_type}; give on"
        )
    if kind := generated(data.format, data.source):
        if data.vocab != "bytes":
            raise UserError(f"config.data.vocab={data.vocab}: must be bytes with the corpus {kind}")
        check_recall(data, kind)
    _check_sequence_axis(settings)
    _check_model_axis(settings)


def _check_warm_start(settings: Settings) -> None:
    for name in ("init_optimizer", "init_layers"):
        if (value := getattr(settings, name)) and not settings.init_from:
            raise UserError(f"config.{name}={value}: is for config.init_from, which is empty; leave it out")
    if settings.init_layers > settings.model.n_layer:
        raise UserError(
            f"config.init_layers={settings.init_layers}: must be at most config.model.n_layer={settings.model.n_layer}"
        )


def _check_schedule(optimizer: OptimizerSettings, num_steps: int) -> None:
    """Raises UserError if the parts of a learning-rate schedule don't fit into it.

    A warm-up that a short run does not finish is allowed if no schedule length is given: this is how a config for a
    long run is tried for a few steps. See `unfinished_warmup`.
    """
    end, warmup, decay = optimizer.end_of_schedule(num_steps), optimizer.warmup_steps, optimizer.decay_steps
    named = "config.optimizer.schedule_steps" if optimizer.schedule_steps else "config.train.num_steps"
    if optimizer.schedule == "wsd":
        if not decay:
            raise UserError(
                "config.optimizer.decay_steps=0: must be at least 1 with config.optimizer.schedule=wsd, for example "
                f"{max(end // 10, 1)}; a schedule that does not decay is config.optimizer.schedule=constant"
            )
        if warmup + decay > end:
            raise UserError(
                f"config.optimizer.decay_steps={decay}: with config.optimizer.warmup_steps={warmup} the schedule's "
                f"parts have {warmup + decay} steps, and {named}={end}; give fewer of these, or more steps"
            )
    elif optimizer.schedule_steps and warmup > end:
        raise UserError(
            f"config.optimizer.schedule_steps={end}: must be at least config.optimizer.warmup_steps={warmup}"
        )


def _check_profile(profile: ProfileSettings, num_steps: int) -> None:
    """Raises UserError if there is no step to trace, or if hosts does not name processes."""
    if profile.hosts != "all" and not re.fullmatch(r"\d+(,\d+)*", profile.hosts, re.ASCII):
        raise UserError(f"config.profile.hosts={profile.hosts}: must be all, or process indices, as in 0,3")
    if profile.at_step > num_steps:
        raise UserError(
            f"config.profile.at_step={profile.at_step}: is after the last step, config.train.num_steps={num_steps}; "
            "give at most that, or 0 for no trace"
        )
    if 0 < profile.every_steps < profile.num_steps:
        raise UserError(
            f"config.profile.every_steps={profile.every_steps}: must be at least config.profile.num_steps="
            f"{profile.num_steps}, so that a trace ends before the next begins; or 0 for one trace"
        )


def unfinished_warmup(settings: Settings) -> str:
    """A warning if the learning rate never reaches its full value because the run is shorter than the warm-up; else
    ""."""
    warmup, num_steps = settings.optimizer.warmup_steps, settings.train.num_steps
    if warmup < num_steps:
        return ""
    return (
        f"config.optimizer.warmup_steps={warmup}: config.train.num_steps={num_steps} ends the run before the learning "
        "rate reaches its full value; give fewer warm-up steps, unless this is a trial"
    )


def check_recall(data: DataSettings, kind: str) -> None:
    """Raises UserError unless a generated corpus has enough different keys, and room for them in a document."""
    most = KEY_LETTERS**data.recall_key_bytes
    if data.recall_keys > most:
        more = " or give config.data.recall_key_bytes=2" if data.recall_key_bytes == 1 else ""
        raise UserError(
            f"config.data.recall_keys={data.recall_keys}: there are {most} keys of config.data.recall_key_bytes="
            f"{data.recall_key_bytes}; give at most that{more}"
        )
    if data.recall_pairs > data.recall_keys:
        raise UserError(
            f"config.data.recall_pairs={data.recall_pairs}: a document can't have more different keys than there are; "
            f"give at most config.data.recall_keys={data.recall_keys}"
        )
    if kind == "recall":
        least = (data.recall_pairs + 1) * (data.recall_key_bytes + 1)
        needs = "its table and one more query of a key"
    else:
        least = 16 + 4 * data.recall_pairs * (data.recall_key_bytes + 2)
        needs = "its pairs and the text that hides them"
    if data.recall_bytes < least:
        raise UserError(
            f"config.data.recall_bytes={data.recall_bytes}: has no room for {needs}; give at least {least}, or fewer "
            "config.data.recall_pairs"
        )


def _check_sequence_axis(settings: Settings) -> None:
    """Raises UserError if a size does not divide over the mesh's axis `sequence`, whatever the devices."""
    model, mesh = settings.model, settings.mesh
    if mesh.sequence == 1:
        return
    here = f"config.mesh.sequence={mesh.sequence}"
    if model.attn_type != "vq":
        raise UserError(f"{here}: must be 1 with config.model.attn_type={model.attn_type}")
    least = mesh.sequence * model.block_len
    for name, update_len in (("train", settings.train.update_len), ("eval", settings.eval.update_len)):
        if update_len % least:
            raise UserError(
                f"config.{name}.update_len={update_len}: must be a multiple of {least}, so that each part of "
                f"{here} has complete blocks of {model.block_len}, for example {-(-update_len // least) * least}"
            )
        if 0 < update_len < model.mem_len * mesh.sequence:
            raise UserError(
                f"{here}: each part of config.{name}.update_len={update_len} has {update_len // mesh.sequence} tokens, "
                f"which must be at least config.model.mem_len={model.mem_len}; give at most "
                f"{max(1, update_len // model.mem_len)}"
            )
    if model.n_code % mesh.sequence:
        raise UserError(f"{here}: must divide config.model.n_code={model.n_code}")


def _check_model_axis(settings: Settings) -> None:
    """Raises UserError if a size does not divide over the mesh's axis `model`."""
    model, here = settings.model, f"config.mesh.model={settings.mesh.model}"
    has_heads = model.n_head > 1 or model.head_type == "mqa"
    name, size = ("n_head", model.n_head) if has_heads else ("d_v", model.d_v)
    if size % settings.mesh.model:
        raise UserError(f"{here}: must divide config.model.{name}={size}")
    if model.head_type != "shga" and model.hidden_width % settings.mesh.model:
        raise UserError(f"{here}: must divide the MLP's width, {model.hidden_width} (config.model.d_ff)")


def check_vocab_fits(settings: Settings, n_vocab: int) -> None:
    """Raises UserError if the model has fewer token ids than the vocabulary. n_vocab: the vocabulary's size."""
    if settings.model.n_vocab < n_vocab:
        raise UserError(
            f"config.model.n_vocab={settings.model.n_vocab}: must be at least {n_vocab}, the size of the vocabulary "
            f"{settings.data.vocab}"
        )
