"""The model and run that a checkpoint belongs to: which settings make another model, another run, or neither.

A checkpoint keeps the first two kinds in its record. If its record differs, it is refused, with the setting's name.
"""

from tvq_pod.config.settings import Settings

FINGERPRINT = "config.data.store, fingerprint"
SEED = "config.seed"
OPTIMIZER_STATE = "config.optimizer.name, state"
# The version of each optimizer's state. A checkpoint with another version is refused: adafactor 1 had one scale for all
# layers.
STATE_VERSIONS = dict(adamw="1", lion="1", adafactor="2", muon="1", nadamw="1", sgd="1")
# Fields of TransformerConfig that change the shape of a parameter or of the state, or the function that the model
# computes.
MODEL_IDENTITY = (
    *("d_model", "d_k", "d_v", "n_head", "n_code", "n_layer", "n_vocab", "mem_len", "agg_cache", "d_ff"),
    *("window_bias", "temperature", "key_shift", "attn_type", "head_type", "pe_abs", "e_tie", "e_norm", "e_scale"),
)
# Fields that a run keeps, but that an evaluation or a sample may change.
RUN_IDENTITY = ("dtype", "param_dtype")
# Fields that may change from one start to the next, and why. A test checks that every field is in one of the three
# groups.
MAY_CHANGE = {
    "block_len": "any length gives the same outputs; only gradients depend on it (docs/design.md)",
    "grad_thru_cache": "changes gradients, not the function",
    "attention": "chooses among implementations of one function",
    "reduction": "chooses among implementations of one function",
    "remat": "trades memory for time",
    "unroll": "trades compile time for time",
    "p_dropemb": "only training drops",
    "p_dropsin": "only training drops",
    "p_dropres": "only training drops",
    "p_droplyr": "only training drops",
    "c_beta": "a weight of the training loss",
    "c_gamma": "the decay of a moving average that only training moves",
    "c_revive": "moves codes, which only training does",
    "is_train": "the mode decides",
}
# Fields of MODEL_IDENTITY that may differ between a run and the one that it takes its weights from (config.init_from).
# They change no weight's shape, or only the number of layers.
MAY_DIFFER_AT_A_WARM_START = ("mem_len", "agg_cache", "n_layer")
# Entries that the first checkpoints lack, with the values that they had then.
LATER = {
    "config.model.window_bias": "0.0",
    "config.model.temperature": "fixed",
    "config.model.key_shift": "False",
    OPTIMIZER_STATE: "1",
}


def model_record(settings: Settings, vocab_name: str) -> dict[str, str]:
    """The settings that parameters belong to, as {setting's name: value}."""
    record = _record_of(settings, MODEL_IDENTITY)
    # d_ff=0 stands for a width, too; without an MLP it means nothing. The width follows from the other settings, so it
    # comes last: an error names the first setting that differs.
    del record["config.model.d_ff"]
    record["config.model.d_ff"] = "0" if settings.model.head_type == "shga" else str(settings.model.hidden_width)
    return record | {"config.data.vocab": vocab_name}


def warm_start_record(settings: Settings, vocab_name: str) -> dict[str, str]:
    """The settings that another run's parameters must belong to so that this run can start from them: those of the
    model, except for MAY_DIFFER_AT_A_WARM_START."""
    may_differ = [f"config.model.{name}" for name in MAY_DIFFER_AT_A_WARM_START]
    record = model_record(settings, vocab_name)
    return {name: value for name, value in record.items() if name not in may_differ}


def run_record(settings: Settings, vocab_name: str, fingerprint: str) -> dict[str, str]:
    """The settings that a complete checkpoint belongs to: those of the model, and all that the data depends on except
    its schedule."""
    return (
        model_record(settings, vocab_name)
        | _record_of(settings, RUN_IDENTITY)
        | {
            "config.optimizer.name": settings.optimizer.name,
            OPTIMIZER_STATE: STATE_VERSIONS[settings.optimizer.name],
            SEED: str(settings.seed),
            FINGERPRINT: fingerprint,
        }
    )


def _record_of(settings: Settings, names: tuple[str, ...]) -> dict[str, str]:
    return {f"config.model.{name}": str(getattr(settings.model, name)) for name in names}


def differing(record: dict[str, str], saved: dict[str, str]) -> tuple[str, str, str] | None:
    """The name, value and saved value of the first setting that differs between `record` and a checkpoint's; None if
    none does.

    An entry that a checkpoint of an older version lacks is compared only if LATER has it.
    """
    for name, value in record.items():
        made_with = saved.get(name, LATER.get(name, value))
        if made_with != value:
            return name, value, made_with
    return None
