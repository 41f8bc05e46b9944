"""Settings: their names, types, defaults and meanings. The frozen dataclasses below are the one place where they are
defined; `resolve.py` turns a config file into them, and says what is refused.
"""

import dataclasses

from tvq_pod.config.model import TransformerConfig


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
class BadStepsSettings:
    spike_deviations: float = 12.0  # a loss this many deviations above the mean makes a step bad; 0: never
    spike_after_steps: int = 100  # steps that mean and deviation are taken from, before that
    min_code_perplexity: float = 0.0  # of any unit's codes in an update; below it, the codebook has collapsed. 0: never
    max_dead_codes: float = 1.0  # share of any unit's codes; above it, the codebook has collapsed. 1: never
    # After a bad step streams begin with empty states, in the middle of a document, instead of those from before it.
    forget_state: bool = False  # a second copy of the state then needs no memory
    rollback_after: int = 5  # in a row, then the run goes back to the last good step and skips their data
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
    top_p: float = 0.95  # sample from the likeliest tokens that have this probability together; 1: from all
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
    bad_steps: BadStepsSettings = BadStepsSettings()
    eval: EvalSettings = EvalSettings()
    sample: SampleSettings = SampleSettings()
    metrics: MetricsSettings = MetricsSettings()


NOT_IN_CONFIG = ("is_train",)  # the mode decides
IMAGE_SHAPE = (64, 64, 3)  # of imagenet64: rows, columns, colors
IMAGE_BYTES = 64 * 64 * 3
FORMATS = ("auto", "stdlib", "novels", "folder", "lines", "jsonl", "parquet", "enwik8", "pg19", "imagenet64")
OWN_SPLITS = ("enwik8", "pg19", "imagenet64")  # corpora that say themselves what is held out
