"""Lines of evaluations: the subject of an evaluation, and which lines in metrics.jsonl are the run's own."""

from collections.abc import Callable

from etils import epath

from tvq_pod.config.settings import Settings
from tvq_pod.data.mixture import Mixture
from tvq_pod.data.store import TokenStore
from tvq_pod.data.streams import PackedDocuments
from tvq_pod.host.terminal import say
from tvq_pod.inference.evaluator import Result
from tvq_pod.run.metrics import all_lines


def subject(settings: Settings, store: TokenStore | Mixture, checkpoint: str, weights: str) -> dict:
    """The subject of an evaluation, for its line in metrics.jsonl. checkpoint: see Checkpoints.identity. weights: ema
    for the moving average, or raw."""
    return dict(checkpoint=checkpoint, fingerprint=store.fingerprint, dtype=str(settings.model.dtype), weights=weights)


def own_losses(
    workdir: epath.Path, settings: Settings, store: TokenStore | Mixture, identity: Callable[[int], str]
) -> dict[int, float | None]:
    """Validation losses of a run by step, None where one was not finite: from the lines in metrics.jsonl about the
    tokens that the run itself evaluates and about its own states.

    Evaluations of another corpus or split, of more or fewer documents, in another dtype, without the cache, of other
    weights (the moving average, or not), and of checkpoints of another branch are left out. identity: returns the
    identity of the run's state at a step, see Checkpoints.identity.
    """
    if not store.meta["splits"]["validation"]["n_documents"]:
        return {}
    n_tokens = PackedDocuments(store.split("validation").starts, 1, settings.eval.max_tokens).n_tokens
    losses = {}
    for line in all_lines(workdir):
        step = line["step"]
        about = subject(settings, store, identity(step), "ema" if settings.train.ema_decay else "raw")
        expected = about | dict(split="validation", tokens=n_tokens)
        known = dict(weights="raw") | line  # older versions had no average and no such field
        if expected["checkpoint"] and known.items() >= expected.items():
            losses[step] = line.get("loss")
    return losses


def report(result: Result, step: int, split: str) -> None:
    """Prints a result in one line."""
    words = f"word perplexity {result.word_perplexity:.2f}, " if result.word_perplexity else ""
    say(
        f"step {step}: {split} loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits per byte, {words}"
        f"over {result.tokens:,} tokens of {result.documents:,} document{'s' * (result.documents != 1)} "
        f"({result.seconds:.1f} s)"
    )
