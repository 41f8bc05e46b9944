"""Recall by distance: counted position by position, on any mesh, and shown as a table and in files."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath

from tests.command import metrics_of, run
from tests.common import model_params, small_config
from tvq_pod.config.settings import DataSettings, EvalSettings, MeshSettings, Settings, TrainSettings
from tvq_pod.data.build import make_store
from tvq_pod.data.corpora import documents
from tvq_pod.data.vocab import END_OF_DOC, N_SPECIAL, ByteVocab
from tvq_pod.inference import evaluator as eval_module
from tvq_pod.inference import recall as recall_module
from tvq_pod.inference.evaluator import Evaluator, make_eval_state, make_eval_step
from tvq_pod.nn.model import Transformer
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.parallel.sharding import batch_sharding, replicated

WINDOW = 2
SETTINGS = Settings(
    model=small_config(n_vocab=ByteVocab.n_vocab, block_len=4, mem_len=WINDOW, n_layer=1),
    train=TrainSettings(batch_size=8, update_len=12),
)
DATA = DataSettings(
    source="recall", recall_documents=5, recall_held_out=11, recall_bytes=1200, recall_pairs=6, recall_values=8
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("recall") / "store", lambda: documents(DATA), ByteVocab(), DATA)


def guess(inputs, targets):
    """Losses and hits of something that is no model: each depends on the pair of tokens alone."""
    return 0.01 * targets + 0.5, (3 * inputs + targets) % 5 == 0


def evaluate(store, monkeypatch, n_devices, n_rows):
    """With `guess` for a model."""
    mesh = make_mesh(MeshSettings(), jax.devices()[:n_devices])

    def made_up_step(settings, mesh, n_rows, with_hits):
        assert with_hits

        def step(params, state, batch):
            losses, hits = guess(batch["inputs"], batch["targets"])
            return state, losses * batch["loss_mask"], hits

        return jax.jit(step, out_shardings=(None, replicated(mesh), replicated(mesh)))

    monkeypatch.setattr(eval_module, "make_eval_step", made_up_step)
    monkeypatch.setattr(eval_module, "make_eval_state", lambda *args: {})
    settings = dataclasses.replace(SETTINGS, eval=EvalSettings(batch_size=n_rows))
    evaluator = Evaluator(settings, mesh, store, "validation")
    evaluator.evaluate({})
    result = evaluator.evaluate({})  # the second counts nothing of the first
    assert result is not None
    return result


@pytest.mark.slow(2)
@pytest.mark.parametrize(("n_devices", "n_rows"), [(1, 3), (8, 16)])
def test_each_value_counts_once_in_the_class_of_its_distance(store, monkeypatch, n_devices, n_rows):
    """The oracle reads documents letter by letter. On 16 rows for 11 documents, five are nothing but padding."""
    n_values, hits, nats = np.zeros([3, 6])
    letters = set(bytes(range(33, 127))) - set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    for document in documents(DATA):
        if document.split != "validation":
            continue
        last, text = {}, bytes(document.text)
        for at in range(1, len(text)):
            key, value = text[at - 1], text[at]
            if value not in letters:
                continue
            if key in last:
                back = (at - last[key]) / WINDOW
                kind = next((k for k, end in enumerate((1, 4, 16, 64, 256)) if back <= end), 5)
                loss, hit = guess(key + N_SPECIAL, value + N_SPECIAL)
                n_values[kind] += 1
                hits[kind] += hit
                nats[kind] += loss
            last[key] = at
    result = evaluate(store, monkeypatch, n_devices, n_rows)
    found = result.recall
    assert found is not None
    np.testing.assert_array_equal(found.n_values, n_values)
    np.testing.assert_array_equal(found.hits, hits)
    np.testing.assert_allclose(found.nats, nats, rtol=1e-5)
    assert min(n_values) > 0
    assert 0.05 < hits.sum() / n_values.sum() < 0.5
    numbers = result.numbers()
    assert numbers["accuracy_4_to_16"] == hits[2] / n_values[2]
    assert numbers["accuracy"] == hits.sum() / n_values.sum()
    json.dumps(numbers)


@pytest.mark.slow(4)
def test_a_hit_is_the_likeliest_of_all_tokens_and_losses_are_the_same(eight_devices):
    """On a mesh that splits rows and heads; the oracle is the model on one device."""
    mesh = make_mesh(MeshSettings(data=2, model=2), eight_devices[:4])
    config, rng, shape = SETTINGS.model.replace(is_train=False), np.random.default_rng(0), (4, 12)
    inputs = rng.integers(N_SPECIAL, ByteVocab.n_vocab, shape).astype(np.int32)
    inputs[:, 0] = END_OF_DOC
    doc_ids, mask = np.zeros(shape, np.int32), np.ones(shape, np.float32)
    mask[3, 8:] = 0
    params = model_params(config)
    apply = jax.jit(Transformer(config).apply)
    _, out = apply({"params": params}, Transformer.initial_state(config, len(inputs)), inputs, doc_ids)
    logits = np.asarray(out["logits"], np.float64)
    likeliest = logits.argmax(-1)
    is_hit = rng.random(shape) < 0.5
    targets = np.where(is_hit, likeliest, (likeliest + 1) % ByteVocab.n_vocab).astype(np.int32)
    expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], -1)[..., 0] * mask
    batch = jax.device_put(dict(inputs=inputs, targets=targets, doc_ids=doc_ids, loss_mask=mask), batch_sharding(mesh))
    step, state = make_eval_step(SETTINGS, mesh, len(inputs), True), make_eval_state(SETTINGS, mesh, len(inputs))
    _, losses, hits = step(jax.device_put(params, replicated(mesh)), state, batch)
    np.testing.assert_array_equal(hits, is_hit)
    np.testing.assert_allclose(losses, expected, atol=1e-4, rtol=1e-4)


def test_the_table_and_files_say_what_was_found(tmp_path):
    counts = np.array([400, 200, 100, 0, 40, 3])
    found = recall_module.Recall(counts, counts // 2, counts * 0.25, 16, 1 / 32)
    head, *lines, last = found.table()
    assert head.split() == ["windows", "since", "the", "key", "values", "loss", "accuracy"]
    assert [line.split()[-3:] for line in lines] == [
        [str(n), "0.2500", f"{n // 2 / n:.2%}"] for n in counts.tolist() if n
    ]
    assert [line.split("  ")[0] or line.strip().split("  ")[0] for line in lines] == [
        "inside the window", "1 to 4", "4 to 16", "64 to 256", "beyond 256",
    ]  # fmt: skip
    assert "3.12%" in last
    assert set(found.numbers()) == {"accuracy", *(f"accuracy_{name}" for name in recall_module.NAMES)} - {
        "accuracy_16_to_64"
    }
    recall_module.write_recall(found, epath.Path(tmp_path / "eval"), "step_1_test_recall")
    rows = [line.split("\t") for line in (tmp_path / "eval/step_1_test_recall.tsv").read_text().splitlines()]
    assert rows[0] == ["windows", "values", "loss", "accuracy"]
    assert [row[0] for row in rows[1:]] == list(recall_module.NAMES)
    assert rows[3] == ["4_to_16", "100", "0.250000", "0.500000"]
    assert rows[4] == ["16_to_64", "0", "", ""]
    assert (tmp_path / "eval/step_1_test_recall.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow(25)
@pytest.mark.parametrize("source", ["recall", "passkey"])
def test_a_run_is_evaluated_by_distance(tmp_path, config_file, source):
    workdir = tmp_path / "run"
    sizes = dict(documents=20, held_out=4, bytes=600, pairs=5)
    flags = [f"--config.data.recall_{name}={value}" for name, value in sizes.items()]
    flags += ["--config.train.num_steps=2", "--config.sample.length=0"]
    run(f"--config={config_file}", f"--workdir={workdir}", f"--source={source}", *flags)
    out, err = run(f"--workdir={workdir}", "--mode=eval")
    (during, after) = metrics_of(workdir, "validation")
    result = json.loads(out)
    assert result["accuracy_1_to_4"] == after["accuracy_1_to_4"] == during["accuracy_1_to_4"]
    assert result["documents"] == 4
    assert "windows since the key" in err
    assert "16 to 64" in err
    tsv = (workdir / "eval/step_2_validation_recall.tsv").read_text().splitlines()
    assert len(tsv) == 7
    assert (workdir / "eval/step_2_validation.tsv").exists()
