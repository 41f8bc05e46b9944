"""Settings: their names, defaults and meanings, the way from a config file to them, and what is refused.

The frozen dataclasses below are the one place where a setting is defined. `default_config()` turns them into the
ml_collections ConfigDict that every file in configs/ starts from; `resolve()` turns a ConfigDict, overrides included,
back into them, checked.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterable

import ml_collections
from etils import epath

from tvq_pod.errors import UserError
from tvq_pod.model_config import TransformerConfig
from tvq_pod.paths import check_path, check_reached


@dataclasses.dataclass(frozen=True)
class DataSettings:
    source: str = ""  # "stdlib", "novels", or a path: see docs/data.md
    format: str = "auto"  # auto | stdlib | novels | folder | lines | jsonl | parquet | enwik8 | pg19 | imagenet64
    text_field: str = "text"  # of jsonl and parquet: the field or column with the text
    glob: str = "**/*"  # which files of a folder
    # "bytes", the path of a SentencePiece model or of a Hugging Face tokenizer.json, or "sentencepiece": BPE with
    # byte fallback, trained on the training documents when the store is made
    vocab: str = "bytes"
    vocab_size: int = 32_000  # of "sentencepiece"
    mixture: str = ""  # train on several stores, instead of one: "STORE=WEIGHT,STORE=WEIGHT", weights of tokens
    invalid_utf8: str = "error"  # with a SentencePiece model: error | replace | skip. Byte models take any bytes
    store: str = ""  # folder of the token store; "" is WORKDIR/store
    validation_share: float = 0.02  # of documents, chosen by a hash of their content
    test_share: float = 0.02
    prepare_processes: int = 0  # that encode text when a store is made; 0: one a core
    num_threads: int = 2  # that read batches ahead
    prefetch_batches: int = 8


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    batch_size: int = 8  # B: streams, over all hosts
    update_len: int = 512  # T: tokens of each stream that one step consumes
    microbatches: int = 1  # parts of the batch's rows, one after the other, whose gradients are added: less memory
    on_batch_change: str = "refuse"  # of a run that goes on with another batch_size or update_len | restart_streams
    num_steps: int = 1000  # step n has consumed updates 0 .. n - 1
    log_every_steps: int = 20


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    name: str = "adamw"  # adamw | lion | adafactor
    learning_rate: float = 1e-3  # at the end of warm-up
    schedule: str = "cosine"  # cosine | linear | inverse_sqrt
    warmup_steps: int = 100  # from 0, at the first step, to the full learning rate
    final_fraction: float = 0.1  # of the learning rate, at the last step (cosine, linear)
    b1: float = 0.9  # adamw, lion; the original code uses 0.95 with lion
    b2: float = 0.98
    eps: float = 1e-8  # adamw
    # adafactor: the learning rate is a share of the root mean square of each matrix, as in the paper; False: it is the
    # size of a step itself, which must then be far smaller
    multiply_by_parameter_scale: bool = True
    weight_decay: float = 0.0  # share of a matrix lost at every step, whatever the schedule says; vectors are spared
    clip_norm: float = 1.0  # of the gradient's global norm; 0: never


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    data: int = -1  # rows, and storage of parameters; -1: the devices that are left in a slice
    sequence: int = 1  # the tokens of an update
    model: int = 1  # heads; with one head, the width of its values
    slices: int = 1  # rows; the network between slices is slow
    fsdp: bool = True  # parameters and optimizer state spread over data; False: whole, quicker for a small model


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    every_steps: int = 500  # and at the end; 0: only at the end
    keep: int = 3  # newest steps that stay; 0: all
    keep_every_steps: int = 0  # one every so many steps stays for ever; 0: none
    keep_best: int = 1  # steps of the lowest validation loss that stay, by the run's own evaluations; 0: none
    timeout_seconds: int = 600  # that a save may take in the background
    restore_timeout_seconds: int = 1800  # that verifying or reading a checkpoint may take; then the job ends
    grace_seconds: float = 120.0  # from SIGTERM, SIGINT or SIGHUP until the process ends, saved or not


@dataclasses.dataclass(frozen=True)
class SanitySettings:
    spike_deviations: float = 12.0  # a loss this many deviations above the mean makes a step bad; 0: never
    spike_after_steps: int = 100  # steps that mean and deviation are taken from, before that
    min_code_perplexity: float = 0.0  # of any unit's codes in an update; below it, the codebook has collapsed. 0: never
    max_dead_codes: float = 1.0  # share of any unit's codes; above it, the codebook has collapsed. 1: never
    # After a bad step streams begin with empty states, in the middle of a document, instead of those from before it.
    forget_state: bool = False  # a second copy of the state then needs no memory
    bad_steps: int = 5  # in a row, then the run goes back to the last good step and skips their data
    max_rollbacks: int = 10  # of a run, then it gives up


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    every_steps: int = 0  # evaluate validation while training; 0: never
    at_end: bool = True  # evaluate validation after the last step
    # Rows that documents are laid out on. 0: as many as leave at most 5% of the positions to padding, up to
    # train.batch_size
    batch_size: int = 0
    cache: str = "on"  # off: without the compressed cache, attention ends with the window
    max_tokens: int = 0  # stop adding documents once there are so many tokens; 0: the whole split


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    prompt: str = ""  # of the sample at the end of training, and where --prompt is not given
    length: int = 512  # tokens, at most: end-of-document ends a sample; 0: no sample at the end of training
    count: int = 1  # samples of each prompt, or images
    temperature: float = 1.0  # 0: always the likeliest token
    nucleus_p: float = 0.95  # sample from the likeliest tokens that have this probability together; 1: from all
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class MetricsSettings:
    tensorboard: bool = True
    wandb_project: str = ""  # needs the extra [wandb]; "": off


@dataclasses.dataclass(frozen=True)
class Settings:
    """All of a run's settings, resolved and checked."""

    seed: int = 0  # of parameters, dropout and the order of documents
    compile_cache: str = "auto"  # folder of compiled programs, for restarts; auto: WORKDIR/compile_cache; "": none
    model: TransformerConfig = TransformerConfig()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    mesh: MeshSettings = MeshSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    sanity: SanitySettings = SanitySettings()
    eval: EvalSettings = EvalSettings()
    sample: SampleSettings = SampleSettings()
    metrics: MetricsSettings = MetricsSettings()


NOT_IN_CONFIG = ("is_train",)  # the mode decides
IMAGE_SHAPE = (64, 64, 3)  # of imagenet64: rows, columns, colors
IMAGE_BYTES = 64 * 64 * 3
FORMATS = ("auto", "stdlib", "novels", "folder", "lines", "jsonl", "parquet", "enwik8", "pg19", "imagenet64")
OWN_SPLITS = ("enwik8", "pg19", "imagenet64")  # corpora that say themselves what is held out
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
    "sanity.bad_steps": 1,
    "sanity.spike_after_steps": 2,
}
BELOW_ONE = ("model.p_dropemb", "model.p_dropsin", "model.p_dropres", "model.p_droplyr", "model.c_gamma",
             "data.validation_share", "data.test_share", "optimizer.b1", "optimizer.b2")  # fmt: skip


def _groups(cls, path: str) -> dict[str, tuple[str, ...]]:
    fields = {field.name: field.default for field in dataclasses.fields(cls) if field.name not in NOT_IN_CONFIG}
    groups = {path: tuple(fields)}
    for name, default in fields.items():
        if dataclasses.is_dataclass(default):
            groups |= _groups(type(default), f"{path}.{name}")
    return groups


GROUPS = _groups(Settings, "config")  # names of settings and groups, by the path of the group that they are in


class UnknownSettingError(UserError, KeyError):
    """A name that is not a setting. It is a KeyError, too, since ml_collections expects one."""

    __str__ = UserError.__str__


class Config(ml_collections.ConfigDict):
    """The ConfigDict of a config file. A name that it does not have is refused by its full path, with the nearest
    setting that there is; so is a value of another type."""

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
        return UnknownSettingError(_unknown(f"{self._path()}.{key}"))

    def _path(self) -> str:
        """Where this group is. Each group has names of its own, so they say which it is, of a copy too."""
        own = set(self.keys())
        return next((path for path, names in GROUPS.items() if own == set(names)), "config")


def default_config() -> ml_collections.ConfigDict:
    """A locked ConfigDict with every setting at its default. Files in configs/ change values, never add names."""
    tree = dataclasses.asdict(Settings())
    for name in NOT_IN_CONFIG:
        del tree["model"][name]
    return _config_of(tree)


def _config_of(tree: dict) -> Config:
    groups = {name: Config(value) if isinstance(value, dict) else value for name, value in tree.items()}
    return Config(groups).lock()


def resolve(config: ml_collections.ConfigDict) -> Settings:
    """A ConfigDict as Settings. Raises UserError, naming the setting, for what no machine could run."""
    tree = config.to_dict()
    settings = _build(Settings, tree, "config")
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
    if not 0 < settings.sample.nucleus_p <= 1:
        raise UserError(f"config.sample.nucleus_p={settings.sample.nucleus_p}: must be above 0 and at most 1")
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


def to_json(settings: Settings) -> str:
    """The resolved config as it is kept in a run's config.json."""
    tree = dataclasses.asdict(settings)
    for name in NOT_IN_CONFIG:
        del tree["model"][name]
    return json.dumps(tree, indent=2) + "\n"


def read_run_config(workdir) -> ml_collections.ConfigDict:
    """The config of the run in `workdir`. Raises UserError if there is none, or it has names or types of its own."""
    check_path("--workdir", str(workdir))
    check_reached("--workdir", str(workdir))
    path = epath.Path(workdir) / "config.json"
    try:
        tree = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"--workdir={workdir}: has no config.json; give the folder of a run, or --config=FILE"
        ) from None
    except OSError as error:
        raise UserError(f"--workdir={workdir}: config.json can't be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"--workdir={workdir}: config.json is not JSON ({error}); give --config=FILE") from None
    if not isinstance(tree, dict):
        raise UserError(f"--workdir={workdir}: config.json is no config; give --config=FILE")
    filled = _filled(tree, default_config().to_dict())
    try:
        _build(Settings, filled, "config")
    except UserError as error:
        raise UserError(f"{error} (in {path})") from None
    return _config_of(filled)


def _filled(tree: dict, default: dict) -> dict:
    """With the defaults of settings that the version that wrote it did not know."""
    filled = default | tree
    return {
        name: _filled(value, default[name])
        if isinstance(value, dict) and isinstance(default.get(name), dict)
        else value
        for name, value in filled.items()
    }


def _build(cls, tree: dict, path: str):
    """A dataclass from a dict that must have exactly its fields."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in NOT_IN_CONFIG}
    for name in tree:
        if name not in fields:
            raise UserError(_unknown(f"{path}.{name}"))
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
        values[name] = _build(type(default), value, f"{path}.{name}") if kind is dict else value
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


def check_name(path: str, value: str | None = None) -> None:
    """Raises UserError if there is no such setting or group of settings. path: as config.model.d_model."""
    group, _, name = path.rpartition(".")
    if path not in GROUPS and name not in GROUPS.get(group, ()):
        raise UserError(_unknown(path, value))


def _unknown(path: str, value: str | None = None) -> str:
    """What to say of a name that is not a setting: the nearest names that there are."""
    here = path if value is None else f"{path}={value}"
    *parts, last = path.split(".")
    group, rest = parts[0], [*parts[1:], last]
    while f"{group}.{rest[0]}" in GROUPS:
        group = f"{group}.{rest.pop(0)}"
    if rest[0] in GROUPS[group]:  # a setting, with something behind it
        return f"{here}: is not a setting; did you mean {group}.{rest[0]}?"
    near = [*_elsewhere(".".join(parts), last), *_within(group, rest)]
    if not near:
        return f"{here}: is not a setting; {group} has {', '.join(GROUPS[group])}"
    near = [name for name in dict.fromkeys(near) if not any(other.startswith(f"{name}.") for other in near)]
    return f"{here}: is not a setting; did you mean {' or '.join(near)}?"


def _within(group: str, names: list[str]) -> list[str]:
    """The setting or group of a group that is nearest to a path in it; none if none is near."""
    close = _closest(names[0], GROUPS[group])
    if close is None:
        return []
    path = f"{group}.{close}"
    return (len(names) > 1 and path in GROUPS and _within(path, names[1:])) or [path]


def _elsewhere(group: str, name: str) -> list[str]:
    """The setting of that very name in the group of the nearest name; none if no group has one."""
    groups = [path for path, names in GROUPS.items() if name in names and f"{path}.{name}" not in GROUPS]
    return [f"{path}.{name}" for path in sorted(groups, key=lambda path: -_likeness(path, group))[:1]]


def _closest(name: str, known: Iterable[str]) -> str | None:
    best = max(known, key=lambda other: _likeness(name, other))
    return best if _likeness(name, best) >= 0.5 else None


def _likeness(one: str, other: str) -> float:
    one, other = (name.lower().replace("-", "_") for name in (one, other))
    return difflib.SequenceMatcher(None, one, other).ratio()


def _kind_name(kind: type) -> str:
    return "a group of settings" if issubclass(kind, dict | ml_collections.ConfigDict) else kind.__name__
