"""Settings: their names, types, bounds, defaults and meanings. These frozen dataclasses, and the model's in model.py,
are the one place where they are defined. docs/settings.md is generated from them.
"""

import dataclasses
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from tvq_pod.config.bounds import Except, Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, Seed
from tvq_pod.config.model import TransformerConfig


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The corpus, its vocabulary and the token store that is made from it."""

    source: str = ""
    """The corpus: `stdlib`, `novels`, `ansible`, `recall` or `passkey`; a path, which may be in a bucket; `hf:NAME`; or
    several paths and globs, separated by commas. See [data.md](data.md)."""
    format: Literal[
        "auto",
        "stdlib",
        "novels",
        "ansible",
        "recall",
        "passkey",
        "text",
        "folder",
        "lines",
        "jsonl",
        "parquet",
        "arrayrecord",
        "enwik8",
        "pg19",
        "imagenet64",
    ] = "auto"
    """What the source is. auto: recognized by the names of the files. See [data.md](data.md)."""
    text_field: str = "text"
    """The field (jsonl, arrayrecord) or column (parquet) that has the text; `meta.text` is the field `text` of the
    field `meta`. Empty: a record of an ArrayRecord file is the text, even if it is JSON."""
    glob: str = "**/*"
    """Which files of a folder are read."""
    exclude: str = ""
    """Files and folders to leave out, of a folder or of what a glob matches: globs, separated by commas. One without a
    slash, such as `*.log`, is compared with names at any depth."""
    hidden: bool = False
    """Read files and folders whose names begin with a dot, too."""
    vocab: str = "bytes"
    """`bytes`; the path of a SentencePiece model or of a Hugging Face tokenizer.json; or `sentencepiece`: BPE with byte
    fallback, trained on the training documents when the store is made."""
    vocab_size: Annotated[int, Ge(300)] = 32_000
    """Size of the vocabulary that `sentencepiece` trains."""
    mixture: str = ""
    """Several stores to train on instead of one: `STORE=WEIGHT,STORE=WEIGHT`. Weights are shares of tokens."""
    mixture_schedule: str = ""
    """Other weights of the mixture's stores, in their order, from given steps on: `STEP:WEIGHT/WEIGHT,...`, as in
    `1000:0.5/0.5,2000:0/1`. Empty: the weights of the mixture hold for all steps. See docs/data.md."""
    invalid_utf8: Literal["error", "replace", "skip"] = "error"
    """What happens to text that is not UTF-8 if the vocabulary is a SentencePiece model. Byte models take any bytes."""
    bad_rows: Literal["error", "skip"] = "error"
    """What happens to a row (jsonl, parquet, arrayrecord) without valid text: null, a missing field, another type, not
    UTF-8, half of a surrogate pair, broken JSON. skip: it is left out and counted."""
    holdout: Literal["auto", "hash", "position", "names", "validation", "test"] = "auto"
    """How documents are held out. hash: by a hash of their content. position: the last lines of each text file. names:
    each file is in the split named by the file or its folder. validation, test: all are in that split, for a store that
    is only evaluated. auto: position for a single text file, names if all files have them, else hash."""
    store: str = ""
    """Folder of the token store; empty: WORKDIR/store."""
    validation_share: Fraction = 0.02
    """Share of the documents, or of each text's bytes (see holdout), held out for validation."""
    test_share: Fraction = 0.02
    """Share held out for the test, chosen in the same way."""
    recall_documents: PositiveInt = 2000
    """recall, passkey: documents to train on."""
    recall_held_out: PositiveInt = 64
    """recall, passkey: documents for validation, and the same number of others for the test."""
    recall_bytes: PositiveInt = 4096
    """recall, passkey: length of a document."""
    recall_pairs: PositiveInt = 32
    """recall, passkey: different keys in a document, each with its value."""
    recall_keys: PositiveInt = 32
    """recall, passkey: keys that the documents draw from."""
    recall_values: Annotated[int, Ge(2), Le(32)] = 32
    """recall, passkey: values that the documents draw from; each is a byte."""
    recall_smaller: Annotated[int, Ge(0), Le(16)] = 0
    """recall: training documents also have this many shorter lengths: half of recall_bytes, a quarter, and so on, with
    as many of the pairs as fit in four times. A model learns to recall from the short ones."""
    recall_key_bytes: Annotated[int, Ge(1), Le(2)] = 1
    """recall, passkey: length of a key."""
    recall_seed: Seed = 0
    """recall, passkey: seed of the documents."""
    prepare_processes: NonNegativeInt = 0
    """Processes that prepare a store; 0: one per core. The store does not depend on their number."""
    num_threads: PositiveInt = 2
    """Threads that read batches ahead."""
    prefetch_batches: PositiveInt = 8
    """Batches that are read ahead."""


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The batch, and how long training lasts."""

    batch_size: PositiveInt = 8
    """B: rows of a batch, over all hosts. Each row is a stream, which reads documents one after the other."""
    update_len: PositiveInt = 512
    """T: tokens that one step consumes from each stream."""
    microbatches: PositiveInt = 1
    """Parts of the batch's rows that are computed one after another, to save memory; their gradients are added."""
    on_batch_change: Literal["refuse", "restart_streams"] = "refuse"
    """What happens if a run resumes with another batch_size or update_len. refuse: an error. restart_streams: new
    streams with empty states read the rest of the epoch. See [durability.md](durability.md)."""
    on_data_change: Literal["refuse", "restart_streams"] = "refuse"
    """What happens if a run resumes with another store, mixture, or weights of a mixture. refuse: an error.
    restart_streams: new streams with empty states read the other data. See [durability.md](durability.md)."""
    context_schedule: str = ""
    """The most tokens of a stream that attention sees, by step: `STEP:LENGTH,STEP:LENGTH`, where length 0 is no limit,
    as in `0:1024,500:4096,1000:0`. Empty: no limit. See docs/data.md."""
    num_steps: PositiveInt = 1000
    """Step at which training ends. Step n has consumed updates 0 to n - 1."""
    z_loss: NonNegativeFloat = 0.0
    """Weight, in the training loss, of log(Z)^2 averaged over predicted tokens, where Z is the sum of exp(logits); PaLM
    uses 1e-4. 0: none. Reported losses do not include it. See docs/optimizer.md."""
    ema_decay: Fraction = 0.0
    """Decay, per step, of a moving average of the weights, which evaluations and samples use; for example 0.999. 0: no
    average is kept. See docs/optimizer.md."""
    log_every_steps: PositiveInt = 20
    """Steps between two lines of training metrics."""
    detail_every_steps: NonNegativeInt = 0
    """Steps between two lines of norms by layer: of gradients, of weights, and of a step's update as a share of the
    weights'; 0: never."""


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and its learning-rate schedule; see docs/optimizer.md."""

    name: Literal["adamw", "lion", "adafactor", "muon", "nadamw", "sgd"] = "adamw"
    """The optimizer."""
    learning_rate: NonNegativeFloat = 1e-3
    """Learning rate at the end of warm-up."""
    schedule: Literal["cosine", "linear", "inverse_sqrt", "wsd", "constant"] = "cosine"
    """How the learning rate falls after warm-up. wsd: it stays constant, and falls in the last decay_steps."""
    schedule_steps: NonNegativeInt = 0
    """Step at which the schedule ends (cosine, linear, wsd); later steps keep its last learning rate. 0:
    train.num_steps."""
    warmup_steps: NonNegativeInt = 100
    """Steps in which the learning rate rises from 0, at the first step, to its full value."""
    decay_steps: NonNegativeInt = 0
    """Steps at the end of the schedule in which the learning rate falls to its last value (wsd, which needs it)."""
    final_fraction: NonNegativeFloat = 0.1
    """The learning rate at the end of the schedule, as a share of learning_rate (cosine, linear, wsd)."""
    b1: Fraction = 0.9
    """Decay of the first moment (adamw, nadamw, lion; muon's vectors, embedding and output). The original code uses
    0.95 with lion."""
    b2: Fraction = 0.98
    """Decay of the second moment (adamw, nadamw; muon's vectors, embedding and output), or of lion's moment."""
    eps: NonNegativeFloat = 1e-8
    """Added to the denominator of Adam's direction (adamw, nadamw, muon)."""
    momentum: Fraction = 0.95
    """Decay of the momentum (sgd, and muon's matrices)."""
    multiply_by_parameter_scale: bool = True
    """adafactor: the learning rate is relative to the root mean square of each matrix, as in the paper. False: it is
    the absolute size of a step, and must be far smaller."""
    weight_decay: NonNegativeFloat = 0.0
    """Share of each matrix that is lost at every step, independent of the schedule. Vectors are not decayed."""
    clip_norm: NonNegativeFloat = 1.0
    """The largest global norm of the gradient; 0: no clipping."""

    def end_of_schedule(self, num_steps: int) -> int:
        """The step at which the schedule ends, in a run that ends at num_steps."""
        return self.schedule_steps or num_steps

    def decay_begins(self, num_steps: int) -> int:
        """The last step whose learning rate wsd has not lowered, in a run that ends at num_steps."""
        return self.end_of_schedule(num_steps) - self.decay_steps


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """The number of devices on each axis of the mesh; see docs/parallel.md."""

    data: Annotated[int, Ge(-1), Except(0, "a number of devices, or -1 for all")] = -1
    """Devices that split the batch's rows and store the parameters; -1: all remaining devices of a slice."""
    sequence: PositiveInt = 1
    """Devices that split the tokens of an update."""
    model: PositiveInt = 1
    """Devices that split the heads; with one head, the width of its values."""
    slices: PositiveInt = 1
    """Slices, which split the batch's rows. The network between them is slow."""
    fsdp: bool = True
    """Spread parameters and optimizer state over the data axis. False: each of its devices has a full copy, which is
    faster for a small model."""


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are saved, and which are kept; see docs/durability.md."""

    every_steps: NonNegativeInt = 500
    """Steps between two saves; the last step is always saved. 0: only the last."""
    keep: NonNegativeInt = 3
    """How many of the newest checkpoints are kept; 0: all."""
    keep_every_steps: NonNegativeInt = 0
    """One checkpoint in this many steps is kept forever; 0: none."""
    keep_best: NonNegativeInt = 1
    """How many checkpoints with the lowest validation loss in the run's own evaluations are kept; 0: none."""
    timeout_seconds: PositiveInt = 600
    """Time that a save may take in the background."""
    restore_timeout_seconds: PositiveInt = 1800
    """Time that verifying or reading a checkpoint may take; then the job ends."""
    grace_seconds: NonNegativeFloat = 120.0
    """Time from SIGTERM, SIGINT or SIGHUP until the process ends, whether it has saved or not."""


@dataclasses.dataclass(frozen=True)
class BadStepsSettings:
    """Which steps are bad and so not applied, and when a run rolls back; see docs/durability.md."""

    spike_deviations: NonNegativeFloat = 12.0
    """A step is bad if its loss is this many standard deviations above the mean; 0: never."""
    spike_after_steps: Annotated[int, Ge(2)] = 100
    """Steps that the mean and the deviation need before any loss can be a spike."""
    min_code_perplexity: NonNegativeFloat = 0.0
    """A step is bad if the perplexity of any unit's codes is below this: its codebook has collapsed. 0: never."""
    max_dead_codes: NonNegativeFloat = 1.0
    """A step is bad if a larger share of any unit's codes is dead: its codebook has collapsed. 1: never."""
    forget_state: bool = False
    """After a bad step, streams continue in the middle of a document from empty states, instead of from the states
    before the step. This saves the memory of a second copy of the states."""
    rollback_after: PositiveInt = 5
    """Bad steps in a row after which the run rolls back to the last good step, and skips their data."""
    max_rollbacks: NonNegativeInt = 10
    """The most rollbacks in a run. If it needs another one, it gives up."""


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """Evaluation, with --mode=eval and during training."""

    every_steps: NonNegativeInt = 0
    """Steps between two evaluations of the validation split during training; 0: never."""
    at_end: bool = True
    """Evaluate the validation split after the last step."""
    batch_size: NonNegativeInt = 0
    """Rows that documents are laid out on. 0: as many as keep padding to at most 5% of the positions, and no more than
    train.batch_size."""
    update_len: NonNegativeInt = 0
    """Tokens that are read at once from each row; 0: train.update_len. Quadratic attention (attn_type=full) sees its
    own update and the window before it. With 0 it reads as it was trained; otherwise every document begins a new
    update, so give at least as many tokens as the longest document has."""
    cache: Literal["on", "off"] = "on"
    """off: evaluate without the compressed cache, so that attention ends with the window."""
    weights: Literal["ema", "raw"] = "ema"
    """Weights that evaluations and samples use. ema: the moving average, if the checkpoint has one
    (config.train.ema_decay). raw: those after the last step."""
    max_tokens: NonNegativeInt = 0
    """Stop adding documents once there are this many tokens; 0: the complete split."""
    suite_longest: Annotated[int, Ge(512)] = 131_072
    """Tokens of the longest documents of --suite. passkey and needle also have documents of half this length, a
    quarter, and so on down to 512."""
    suite_depths: Annotated[int, Ge(2), Le(101)] = 5
    """Number of depths at which passkey and needle hide an answer, spread evenly from the beginning of a document to
    its end."""
    suite_trials: PositiveInt = 4
    """Documents of --suite: for each length and depth, or for recall in all."""
    suite_seed: Seed = 0
    """Seed of the documents of passkey and needle; those of recall have config.data.recall_seed."""


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """Samples, with --mode=sample and at the end of training."""

    prompt: str = ""
    """Prompt of the sample at the end of training, and of --mode=sample without --prompt."""
    length: NonNegativeInt = 512
    """The most tokens of a sample, which ends earlier at end-of-document; 0: no sample at the end of training."""
    count: PositiveInt = 1
    """Samples of each prompt, or images."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0: always the likeliest token."""
    top_p: Annotated[float, Gt(0), Le(1)] = 0.95
    """Sample from the likeliest tokens that together have this probability; 1: from all."""
    top_k: NonNegativeInt = 0
    """Sample from this many of the likeliest tokens, before top_p chooses among them; 0: from all."""
    min_p: Fraction = 0.0
    """Sample from tokens that have at least this share of the likeliest token's probability; 0: from all."""
    repetition_penalty: Annotated[float, Gt(0), Le(100)] = 1.0
    """Makes tokens that are already in the prompt or the sample less likely: it divides their logits, and multiplies
    negative ones. 1: no penalty. See docs/sampling.md."""
    stop: str = ""
    r"""Text that ends a sample and is not part of it. `\n` is a newline, and `\,` stands between several; empty: none.
    See docs/sampling.md."""
    logprobs: bool = False
    """Write the log-probability of each token, with --mode=sample and JSON lines."""
    max_rows: PositiveInt = 64
    """The most rows that a device samples side by side."""
    seed: Seed = 0
    """Seed of sampling."""


@dataclasses.dataclass(frozen=True)
class MetricsSettings:
    """Metrics writers, besides WORKDIR/metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb_project: str = ""
    """Project of Weights & Biases, which needs the extra [wandb]; empty: off."""


@dataclasses.dataclass(frozen=True)
class ProfileSettings:
    """Traces of training steps, for xprof; see docs/profiling.md."""

    at_step: NonNegativeInt = 0
    """First step of the trace; 0: no trace."""
    num_steps: PositiveInt = 3
    """Steps in a trace."""
    every_steps: NonNegativeInt = 0
    """Steps from the beginning of one trace to that of the next; 0: one trace only."""
    hosts: str = "0"
    """Processes that trace: `all`, or their indices, as in `0,3`."""

    def begins_at(self, step: int) -> bool:
        """Whether a trace begins with this step."""
        if not self.every_steps:
            return step == self.at_step
        return step >= self.at_step and (step - self.at_step) % self.every_steps == 0

    def traced_hosts(self) -> tuple[int, ...] | None:
        """The indices of the processes that trace; None: all do. Raises ValueError if `hosts` is neither."""
        return None if self.hosts == "all" else tuple(int(index) for index in self.hosts.split(","))


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run: the groups, and the settings outside of them."""

    seed: Seed = 0
    """Seed of parameters, dropout and the order of documents."""
    compile_cache: str = "auto"
    """Folder of compiled programs, for faster restarts. `auto`: WORKDIR/compile_cache; empty: none."""
    init_from: str = ""
    """Another run, as WORKDIR or WORKDIR@STEP, local or gs://: the first start takes its weights and codebooks. Later
    starts resume from the run's own checkpoints and don't need it. See docs/warm_start.md."""
    init_optimizer: bool = False
    """Take the state of the other run's optimizer as well. The learning-rate schedule starts over in any case."""
    init_layers: NonNegativeInt = 0
    """Take only this many of the other run's layers, the first ones; other layers of this model are drawn from the
    seed. 0: take all layers, and both models must have the same number."""
    model: TransformerConfig = TransformerConfig()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    mesh: MeshSettings = MeshSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    bad_steps: BadStepsSettings = BadStepsSettings()
    eval: EvalSettings = EvalSettings()
    sample: SampleSettings = SampleSettings()
    metrics: MetricsSettings = MetricsSettings()
    profile: ProfileSettings = ProfileSettings()


NOT_IN_CONFIG = ("is_train",)  # fields that the mode decides
IMAGE_SHAPE = (64, 64, 3)  # of imagenet64: rows, columns, colors
IMAGE_BYTES = 64 * 64 * 3
GENERATED = ("recall", "passkey")  # corpora that depend on settings alone; as a source or a format
KEY_LETTERS = 62  # letters that their keys are made from
OWN_SPLITS = ("enwik8", "pg19", "imagenet64", *GENERATED)  # corpora that come with their own splits


def generated(format: str, source: str) -> str:
    """The name of the generated corpus that the settings of config.data choose; "" for any other corpus."""
    kind = source if format == "auto" else format
    return kind if kind in GENERATED else ""
