"""The digest of tokens consumed: it sees every token, every place and every order."""

import jax
import numpy as np
import pytest

from tvq_pod.data import digest


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return dict(
        targets=rng.integers(0, 259, [8, 16]).astype(np.int32),
        doc_ids=np.sort(rng.integers(0, 4, [8, 16])).astype(np.int32),
    )


def rolled(*batches):
    value = digest.start()
    for batch in batches:
        value = digest.roll(value, batch)
    return digest.as_text(value)


def test_equal_batches_give_equal_digests_wherever_they_lie(batch, eight_devices):
    mesh = jax.make_mesh(
        (4, 2), ("rows", "tokens"), devices=eight_devices, axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    spread = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("rows", "tokens")))
    assert digest.as_text(jax.jit(digest.roll)(digest.start(), spread)) == rolled(batch)
    assert len(rolled(batch)) == 16


def test_any_other_token_place_or_border_gives_another(batch):
    seen = {rolled(batch)}
    for row, column in np.ndindex(2, 16):
        for name in batch:
            other = batch | {name: batch[name].copy()}
            other[name][row, column] += 1
            seen.add(rolled(other))
    seen.add(rolled(batch | dict(targets=batch["targets"][::-1])))
    seen.add(rolled(batch | dict(targets=np.roll(batch["targets"], 1, axis=1))))
    swapped = batch["targets"].copy()
    swapped[0, 1], swapped[1, 0] = batch["targets"][1, 0], batch["targets"][0, 1]
    assert swapped[0, 1] != swapped[1, 0]
    seen.add(rolled(batch | dict(targets=swapped)))
    assert len(seen) == 1 + 64 + 3


def test_the_order_of_batches_counts(batch):
    other = batch | dict(targets=batch["targets"] + 1)
    assert len({rolled(batch, other), rolled(other, batch), rolled(batch), rolled(batch, batch)}) == 4
