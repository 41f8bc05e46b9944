"""What each difference from the original Transformer-VQ code does to the loss (docs/fidelity.md). Not a test.

    python -m tests.fidelity --workdir=DIR

Trains configs/stdlib.py for 400 steps as it is, and once with each difference turned back, for three seeds, one run
after the other: 24 runs of about a minute on two CPU cores that do nothing else. A run that is complete in DIR is not
trained again. Prints a table: held-out bits per byte, mean and standard error over seeds, and the difference from the
first arm with the same seed. --arms and --seeds choose some; the arms of SPREAD are trained only if they are asked for.

Some differences have no setting. A run with such a one is made by patching the package in a process of its own.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import statistics
import subprocess
import sys
from collections.abc import Callable

COMMON = {
    "train.num_steps": 400,
    "train.log_every_steps": 20,
    "eval.max_tokens": 150_000,
    "checkpoint.every_steps": 0,
    "sample.length": 0,
    "metrics.tensorboard": False,
}


def initial_codes() -> None:
    """The original's codes begin with a variance of 1 / (H S), whatever the keys' is."""

    def scale(config) -> float:
        return config.d_k**0.25 / (config.n_key_head * config.n_code) ** 0.5

    _scale_initial("codebook", scale)


def initial_outputs() -> None:
    """The original's output projections begin as wide as other kernels."""
    _scale_initial("w_o", lambda config: (2 * config.n_layer) ** 0.5)


def _scale_initial(name: str, factor: Callable) -> None:
    import jax

    from tvq_pod.training import step

    ours = step.initial_params

    def initial_params(settings):
        def scaled(path, leaf):
            is_named = any(getattr(key, "key", None) == name for key in path)
            return leaf * factor(settings.model) if is_named else leaf

        return jax.tree_util.tree_map_with_path(scaled, ours(settings))

    step.initial_params = initial_params


def other_weights() -> None:
    """The initial weights of another seed; documents stay in the order of the run's own."""
    from tvq_pod.training import step

    ours = step.initial_params
    step.initial_params = lambda settings: ours(dataclasses.replace(settings, seed=settings.seed + 100))


def sinusoid_table() -> None:
    """The original's wavelengths are 2 pi lam^(2 i / D); the longest is shorter than 2 pi lam."""
    import jax.numpy as jnp

    from tvq_pod.nn import attn

    def sinusoids(positions, width):
        angles = jnp.outer(positions, 1e5 ** -(jnp.arange(0, width, 2) / width))
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    attn.sinusoids = sinusoids


def scaled_u_and_v() -> None:
    """The original multiplies u and v by K^(-1/4), as it does queries and keys."""
    from tvq_pod.nn.attn import VQAttention

    ours = VQAttention.biases

    def biases(self, table=None):
        made = ours(self, table)
        return made | {name: made[name] * self.config.d_k**-0.25 for name in ("u", "v")}

    VQAttention.biases = biases


def more_biases() -> None:
    """The original's norms have a bias beside the gain, and so have its logits."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from tvq_pod.nn import attn, layers, model
    from tvq_pod.nn.scores import as_last_axes

    class Norm(layers.RMSNorm):
        @nn.compact
        def __call__(self, x, inverse=None):
            y = x * layers.inverse_rms(x)
            if self.use_scale:
                for name, init in (("scale", nn.initializers.ones), ("bias", nn.initializers.zeros)):
                    vector = self.param(name, layers.with_names(init, "residual"), x.shape[-1:], jnp.float32)
                    vector = as_last_axes(vector, y)
                    y = y * vector if name == "scale" else y + vector
            return y.astype(self.config.dtype)

    attn.RMSNorm = model.RMSNorm = Norm
    of_logits = []

    def param(self, name, *args):
        if name == "w_out":
            init = layers.with_names(nn.initializers.zeros, "vocab")
            of_logits[:] = [nn.Module.param(self, "b_out", init, (self.config.n_vocab,), jnp.float32)]
        return nn.Module.param(self, name, *args)

    def token_losses(x, output, targets, scale, with_log_z):
        assert not with_log_z  # the original has no such loss
        logits = model.logits_of(x, output, 1.0)
        logits = (logits + as_last_axes(of_logits[0], logits)) * scale
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return dict(losses=jax.nn.logsumexp(logits, axis=-1) - chosen)

    model.Transformer.param = param
    model.token_losses = token_losses


def packed_documents() -> None:
    """The original's attention does not know where documents end."""
    from tvq_pod.data.streams import TrainStreams

    ours = TrainStreams.segments

    def segments(self, row, begin, end):
        for segment in ours(self, row, begin, end):
            yield dataclasses.replace(segment, doc_id=0)

    TrainStreams.segments = segments


@dataclasses.dataclass(frozen=True)
class Arm:
    """settings: what differs, below `config.`. patches: of the package, where there is no setting. config: its name."""

    settings: dict = dataclasses.field(default_factory=dict)
    patches: tuple[Callable[[], None], ...] = ()
    config: str = "stdlib"


PACKED = {"train.context_schedule": "0:1024"}  # 16 blocks, as in the original's scripts: 8,192 tokens in blocks of 512
NO_LEAD = {"model.window_bias": 0.0}
BASE = "as it is"
ARMS = {
    BASE: Arm(),
    "window_bias=0": Arm(NO_LEAD),
    "initial codes": Arm(patches=(initial_codes,)),
    "initial output projections": Arm(patches=(initial_outputs,)),
    "sinusoids": Arm(patches=(sinusoid_table,)),
    "u and v scaled, eps=1e-9": Arm({"optimizer.eps": 1e-9}, (scaled_u_and_v,)),
    "biases of norms and logits": Arm(patches=(more_biases,)),
    "sequences": Arm(PACKED, (packed_documents,)),
    "all of these": Arm(
        PACKED | NO_LEAD | {"optimizer.eps": 1e-9},
        (initial_codes, initial_outputs, sinusoid_table, scaled_u_and_v, more_biases, packed_documents),
    ),
}
REVIVED = NO_LEAD | {"model.c_revive": 0.1, "model.c_gamma": 0.9}
SHORT = {"train.num_steps": 300}
SPREAD = {
    "window_bias=0, revived codes": Arm(REVIVED),
    "novels, window_bias=0": Arm(NO_LEAD | SHORT, config="novels"),
    "novels, window_bias=0, other weights": Arm(NO_LEAD | SHORT, (other_weights,), config="novels"),
    "novels, window_bias=0, revived codes": Arm(REVIVED | SHORT, config="novels"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--arms", default=";".join(ARMS), help="names with semicolons")
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas")
    asked = parser.parse_args()
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    found = {}
    for seed in seeds:  # each seed for all arms, so that a table can be made of what there is
        for arm in asked.arms.split(";"):
            found.setdefault(arm, []).append(trained(arm, seed, asked.workdir))
    print("\n".join(table(found)))


def trained(arm: str, seed: int, folder: pathlib.Path) -> float:
    """Bits per byte on held-out documents, after training, or of a run that was trained before."""
    workdir = folder / re.sub(r"[^\w.=]+", "_", arm) / f"seed_{seed}"
    if not (workdir / "complete").exists():
        print(f"{arm}, seed {seed}", file=sys.stderr, flush=True)
        chosen = (ARMS | SPREAD)[arm]
        shared = {"data.store": str(folder / f"store_{chosen.config}"), "compile_cache": str(folder / "compile_cache")}
        settings = {"seed": seed} | shared | COMMON | chosen.settings
        flags = [f"--config.{name}={value}" for name, value in settings.items()]
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / "log").open("ab") as log:
            command = [sys.executable, "-m", "tests.fidelity", "--patched", arm, f"--config=configs/{chosen.config}.py"]
            subprocess.run([*command, f"--workdir={workdir}", *flags], check=True, stdout=log, stderr=log)
        (workdir / "complete").touch()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "validation"][-1]["bits_per_byte"]


def table(found: dict[str, list[float]]) -> list[str]:
    """A Markdown table of the runs of each arm, which have the same seeds in the same order."""
    lines = ["| undone | bits per byte | difference |", "| --- | --- | --- |"]
    base = found.get(BASE)
    for arm, bits in found.items():
        apart = "" if base is None or arm == BASE else _mean([x - y for x, y in zip(bits, base, strict=True)], "+")
        lines.append(f"| {arm} | {_mean(bits)} | {apart} |")
    return lines


def _mean(values: list[float], sign: str = "") -> str:
    mean = f"{statistics.mean(values):{sign}.3f}"
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else mean


def run_patched(arm: str, argv: list[str]) -> None:
    """tvq_pod's command line, with an arm's patches. A step without dropout draws nothing, so it needs no seed of the
    run: all seeds share one compiled program."""
    from tvq_pod import main
    from tvq_pod.training import step

    ours = step.make_train_step
    step.make_train_step = lambda settings, mesh: ours(dataclasses.replace(settings, seed=0), mesh)
    for patch in (ARMS | SPREAD)[arm].patches:
        patch()
    sys.argv[1:] = argv
    main.run()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--patched"]:
        run_patched(sys.argv[2], sys.argv[3:])
    else:
        main()
