"""Which settings make another model: no field is forgotten, and each is on the list where it belongs."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from tests.common import model_params, small_config
from tvq_pod.config.identity import MAY_CHANGE, MODEL_IDENTITY, RUN_IDENTITY, differing, model_record, run_record
from tvq_pod.config.settings import Settings
from tvq_pod.nn.model import Transformer

FIELDS = [field.name for field in dataclasses.fields(Settings().model)]
CONFIG = small_config(n_layer=2, head_type="mha", d_ff=16, block_len=4, mem_len=2)
OTHER = dict(  # another value of each field, that a run of CONFIG could have
    d_model=12, d_k=4, d_v=12, n_head=1, n_code=7, n_layer=1, n_vocab=13, block_len=2, mem_len=4, window_bias=8.0,
    agg_cache=False, grad_thru_cache=False, attn_type="full", attention="plain", head_type="mqa", d_ff=24,
    reduction="serial", remat="full", unroll=2, dtype="bfloat16", param_dtype="bfloat16", pe_abs=True, p_dropemb=0.5,
    p_dropsin=0.5, p_dropres=0.5, p_droplyr=0.5, e_tie=True, e_norm=False, e_scale=2.0, c_beta=0.5, c_gamma=0.5,
    c_revive=0.5, temperature="learned", key_shift=True,
    is_train=True,
)  # fmt: skip


TOKENS = np.arange(24).reshape(2, 12) % 11
DOC_IDS = np.repeat([[0, 1], [0, 0]], 6, axis=1)


def init(config):
    return Transformer(config).init(jax.random.key(0), Transformer.initial_state(config, 2), TOKENS, DOC_IDS)


def logits(config, params):
    return Transformer(config).apply(params, Transformer.initial_state(config, 2), TOKENS, DOC_IDS)[1]["logits"]


@functools.cache
def kinds_of(config):
    """The shapes and dtypes of a model's parameters and state."""
    return jax.eval_shape(lambda: (init(config), Transformer.initial_state(config, 2)))


@functools.cache
def program_of(config):
    """What a model computes, as text."""
    program = str(jax.make_jaxpr(functools.partial(logits, config))(kinds_of(config)[0]))
    return re.sub("0x[0-9a-f]+", "an address", program)


@functools.cache
def logits_of_the_same_parameters(config):
    return np.asarray(jax.jit(functools.partial(logits, config))(dict(params=model_params(CONFIG))))


def test_every_field_of_the_model_is_on_exactly_one_list():
    listed = [*MODEL_IDENTITY, *RUN_IDENTITY, *MAY_CHANGE]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(FIELDS), "list every field in tvq_pod/config/identity.py, and give its OTHER value here"
    assert set(listed) == set(OTHER)
    assert all(reason.strip() for reason in MAY_CHANGE.values())


@pytest.mark.slow(4)
@pytest.mark.parametrize("name", [*MODEL_IDENTITY, *RUN_IDENTITY])
def test_a_field_of_the_identity_changes_a_shape_or_the_program_and_is_refused_by_name(name):
    other = CONFIG.replace(**{name: OTHER[name]})
    assert kinds_of(other) != kinds_of(CONFIG) or program_of(other) != program_of(CONFIG)
    then = run_record(Settings(model=CONFIG), "bytes", "corpus")
    now = run_record(Settings(model=other), "bytes", "corpus")
    found = differing(now, then)
    assert found is not None
    assert found[0] == f"config.model.{name}" or name == "head_type"
    assert found == (found[0], now[found[0]], then[found[0]])
    assert (f"config.model.{name}" in model_record(Settings(model=CONFIG), "bytes")) == (name in MODEL_IDENTITY)


MAY = {name: OTHER[name] for name in MAY_CHANGE if name != "is_train"}


# The plain implementation has no reduction: those that have one are asked without it.
ALL_BUT_PLAIN = {name: MAY[name] for name in MAY if name != "attention"}


@pytest.mark.slow(2)
@pytest.mark.parametrize("changes", [dict(attention="plain"), pytest.param(ALL_BUT_PLAIN, marks=pytest.mark.slow)])
def test_fields_that_may_change_make_the_same_function_of_the_same_parameters(changes):
    other = CONFIG.replace(**changes)
    assert kinds_of(other) == kinds_of(CONFIG)
    assert program_of(other) != program_of(CONFIG)  # another program for the same function
    expected = logits_of_the_same_parameters(CONFIG)
    np.testing.assert_allclose(logits_of_the_same_parameters(other), expected, rtol=1e-4, atol=1e-5)


def test_fields_that_may_change_are_no_part_of_a_run():
    expected = run_record(Settings(model=CONFIG), "bytes", "corpus")
    for name, value in MAY.items():
        assert run_record(Settings(model=CONFIG.replace(**{name: value})), "bytes", "corpus") == expected, name


def test_d_ff_counts_by_the_width_it_stands_for():
    def record(**changes):
        return model_record(Settings(model=CONFIG.replace(**changes)), "bytes")

    assert record(d_ff=0) == record(d_ff=CONFIG.replace(d_ff=0).hidden_width)
    assert record(head_type="shga", d_ff=8) == record(head_type="shga", d_ff=9)  # has no MLP


def test_another_head_type_is_named_and_not_the_width_that_follows_from_it():
    def record(head_type):
        return model_record(Settings(model=CONFIG.replace(head_type=head_type, d_ff=0)), "bytes")

    for head_type, other in (("shga", "mha"), ("mha", "shga"), ("mqa", "shga")):
        assert differing(record(head_type), record(other)) == ("config.model.head_type", head_type, other)


def test_what_an_older_checkpoint_does_not_name_is_not_compared():
    record = model_record(Settings(model=CONFIG), "bytes")
    older = {name: value for name, value in record.items() if name != "config.model.d_ff"}
    assert differing(record, older) is None
    assert differing(record, older | {"config.model.d_k": "9"}) == ("config.model.d_k", "6", "9")
