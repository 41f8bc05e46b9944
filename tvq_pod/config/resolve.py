"""From a config file to settings, checked.

`default_config()` turns the dataclasses of settings.py into the ml_collections ConfigDict that every file in configs/
starts from; `resolve()` turns a ConfigDict, overrides included, back into them.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import ml_collections

from tvq_pod.config.names import GROUPS, unknown
from tvq_pod.config.settings import FORMATS, IMAGE_BYTES, NOT_IN_CONFIG, Settings
from tvq_pod.errors import UserError

CHOICES = {
    "model.attn_type": ("vq", "full"),
    "model.attention": ("auto", "plain", "xla"),
    "model.head_type": ("shga", "mqa", "mha"),
    "model.reduction": ("cumulative", "serial"),
    "model.remat": ("projections", "dots", "full", "none"),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "data.format": FORMATS,
    "eval.cache": ("on", "off"),
    "data.invalid_utf8": ("error", "replace", "skip"),
    "train.on_batch_change": ("refuse", "restart_streams"),
    "optimizer.name": ("adamw", "lion", "adafactor"),
    "optimizer.schedule": ("cosine", "linear", "inverse_sqrt"),
}
AT_LEAST = {  # everything else that is a number must be at least 0
    **{
        f"model.{name}": 1
        for name in ("d_model", "d_k", "d_v", "n_head", "n_code", "n_layer", "block_len", "mem_len", "unroll")
    },
    "model.n_vocab": 4,
    "data.num_threads": 1,
    "data.vocab_size": 300,
    "sample.count": 1,
    "data.prefetch_batches": 1,
    "train.batch_size": 1,
    "train.update_len": 1,
    "train.microbatches": 1,
    "train.num_steps": 1,
    "train.log_every_steps": 1,
    "mesh.data": -1,
    "mesh.sequence": 1,
    "mesh.model": 1,
    "mesh.slices": 1,
    "checkpoint.timeout_seconds": 1,
    "checkpoint.restore_timeout_seconds": 1,
    "bad_steps.rollback_after": 1,
    "bad_steps.spike_after_steps": 2,
}
BELOW_ONE = ("model.p_dropemb", "model.p_dropsin", "model.p_dropres", "model.p_droplyr", "model.c_gamma",
             "data.validation_share", "data.test_share", "optimizer.b1", "optimizer.b2")  # fmt: skip


class UnknownSettingError(UserError, KeyError):
    """A name that is not a setting. It is a KeyError, too, since ml_collections expects one."""

    __str__ = UserError.__str__


class Config(ml_collections.ConfigDict):
    """The ConfigDict of a config file. A name that it does not have is refused by its full path, with the nearest
    setting that there is; so is a value of another type."""

    if TYPE_CHECKING:  # config files read and write groups and settings as attributes, whatever their types

        def __getattr__(self, attribute: str) -> Any: ...

    def __getitem__(self, key):
        try:
            return super().__getitem__(key)
        except UnknownSettingError:
            raise
        except KeyError:
            raise self._unknown(key) from None

    def __setitem__(self, key, value):
        if self.is_locked and key not in self:
            raise self._unknown(key)
        try:
            super().__setitem__(key, value)
        except TypeError:
            kind = _kind_name(type(self[key]))
            raise UserError(f"{self._path()}.{key}={value!r}: must be {kind}") from None

    def _unknown(self, key) -> UnknownSettingError:
        return UnknownSettingError(unknown(f"{self._path()}.{key}"))

    def _path(self) -> str:
        """Where this group is. Each group has names of its own, so they say which it is, of a copy too."""
        own = set(self.keys())
        return next((path for path, names in GROUPS.items() if own == set(names)), "config")


def default_config() -> Config:
    """A locked ConfigDict with every setting at its default. Files in configs/ change values, never add names."""
    tree = dataclasses.asdict(Settings())
    for name in NOT_IN_CONFIG:
        del tree["model"][name]
    return config_of(tree)


def config_of(tree: dict) -> Config:
    groups = {name: Config(value) if isinstance(value, dict) else value for name, value in tree.items()}
    return Config(groups).lock()


def resolve(config: ml_collections.ConfigDict) -> Settings:
    """A ConfigDict as Settings. Raises UserError, naming the setting, for what no machine could run."""
    tree = config.to_dict()
    settings = build(Settings, tree, "config")
    for path, choices in CHOICES.items():
        value = _get(tree, path)
        if value not in choices:
            raise UserError(f"config.{path}={value}: must be one of {', '.join(choices)}")
    for path, value in _leaves(tree):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not value >= AT_LEAST.get(path, 0):
            raise UserError(f"config.{path}={value}: must be at least {AT_LEAST.get(path, 0)}")
        if path in BELOW_ONE and value >= 1:
            raise UserError(f"config.{path}={value}: must be below 1")
    _check_relations(settings)
    return settings


def _check_relations(settings: Settings) -> None:
    model, train, data = settings.model, settings.train, settings.data
    if train.update_len % model.block_len:
        divisors = [n for n in range(1, train.update_len + 1) if train.update_len % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - model.block_len))
        raise UserError(
            f"config.model.block_len={model.block_len}: must divide config.train.update_len={train.update_len}, "
            f"as {nearest} does"
        )
    if data.validation_share + data.test_share >= 1:
        raise UserError(
            f"config.data.validation_share={data.validation_share}: with config.data.test_share={data.test_share} "
            "nothing is left to train on; their sum must be below 1"
        )
    for name, seed in (("seed", settings.seed), ("sample.seed", settings.sample.seed)):
        if seed >= 2**31:
            raise UserError(f"config.{name}={seed}: must be below 2 ** 31")
    if not 0 < settings.sample.top_p <= 1:
        raise UserError(f"config.sample.top_p={settings.sample.top_p}: must be above 0 and at most 1")
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
    _check_mesh(settings)
    if settings.mesh.data == 0:
        raise UserError("config.mesh.data=0: must be a number of devices, or -1 for all")


def _check_mesh(settings: Settings) -> None:
    """What must divide over axes of the mesh, whatever devices there are."""
    model, train, mesh = settings.model, settings.train, settings.mesh
    if train.batch_size % train.microbatches:
        raise UserError(
            f"config.train.microbatches={train.microbatches}: must divide config.train.batch_size={train.batch_size}"
        )
    if mesh.sequence > 1:
        here = f"config.mesh.sequence={mesh.sequence}"
        if model.attn_type != "vq":
            raise UserError(f"{here}: must be 1 with config.model.attn_type={model.attn_type}")
        if train.update_len % (mesh.sequence * model.block_len):
            least = mesh.sequence * model.block_len
            raise UserError(
                f"config.train.update_len={train.update_len}: must be a multiple of {least}, so that each part of "
                f"{here} has whole blocks of {model.block_len}, for example {-(-train.update_len // least) * least}"
            )
        if train.update_len // mesh.sequence < model.mem_len:
            raise UserError(
                f"{here}: each part has {train.update_len // mesh.sequence} tokens, which must be at least "
                f"config.model.mem_len={model.mem_len}; give at most {max(1, train.update_len // model.mem_len)}"
            )
        if model.n_code % mesh.sequence:
            raise UserError(f"{here}: must divide config.model.n_code={model.n_code}")
    heads = {"n_head": model.n_head} if model.n_head > 1 or model.head_type == "mqa" else {"d_v": model.d_v}
    for name, size in heads.items():
        if size % mesh.model:
            raise UserError(f"config.mesh.model={mesh.model}: must divide config.model.{name}={size}")
    if model.head_type != "shga" and model.hidden_width % mesh.model:
        raise UserError(
            f"config.mesh.model={mesh.model}: must divide the MLP's width, {model.hidden_width} (config.model.d_ff)"
        )


def check_vocab_fits(settings: Settings, n_vocab: int) -> None:
    """Raises UserError if the model has fewer tokens than the vocabulary."""
    if settings.model.n_vocab < n_vocab:
        raise UserError(
            f"config.model.n_vocab={settings.model.n_vocab}: must be at least {n_vocab}, the size of the vocabulary "
            f"{settings.data.vocab}"
        )


def build(cls, tree: dict, path: str):
    """A dataclass from a dict that must have exactly its fields."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in NOT_IN_CONFIG}
    for name in tree:
        if name not in fields:
            raise UserError(unknown(f"{path}.{name}"))
    for name in fields:
        if name not in tree:
            raise UserError(f"{path}.{name}: is missing; start the config from tvq_pod.config.default_config()")
    values = {}
    for name, value in tree.items():
        default = fields[name].default
        kind = dict if dataclasses.is_dataclass(default) else type(default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"{path}.{name}={value!r}: must be {_kind_name(kind)}")
        values[name] = build(type(default), value, f"{path}.{name}") if kind is dict else value
    return cls(**values)


def _leaves(tree: dict, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _get(tree: dict, path: str):
    for name in path.split("."):
        tree = tree[name]
    return tree


def _kind_name(kind: type) -> str:
    return "a group of settings" if issubclass(kind, dict | ml_collections.ConfigDict) else kind.__name__
