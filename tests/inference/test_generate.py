"""generate.py of an exported folder: NumPy and safetensors alone say what the model says, for every kind of model."""

import jax
import numpy as np
import pytest

from tests.common import model_params, small_config
from tests.data.test_vocab import byte_level, trained, with_dummy_prefix
from tests.exporting import bare, bare_environment, export_to, logits_of
from tvq_pod.config.settings import DataSettings, MeshSettings, Settings
from tvq_pod.data.vocab import END_OF_DOC, ByteVocab
from tvq_pod.inference import exported, generate
from tvq_pod.nn.model import Transformer
from tvq_pod.parallel.mesh import make_mesh
from tvq_pod.training.step import abstract_train_state

KINDS = dict(
    shga=dict(window_bias=2.0, pe_abs=True, temperature="learned", d_model=9),  # an odd width has one sinusoid less
    one_head=dict(n_head=1, e_tie=True, e_norm=False, e_scale=0.3, mem_len=1, block_len=8),
    mqa=dict(head_type="mqa", n_head=4, mem_len=17, temperature="learned", key_shift=True),
    mha=dict(head_type="mha", agg_cache=False, window_bias=1.0),
)
BOUNDS = "--length, --seed and --temperature must be at least 0, and --top_p above 0 and at most 1"
DOCUMENTS = (30, 3, 47)  # tokens; the window is at most 17 of them


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return bare_environment(tmp_path_factory.mktemp("bare") / "packages")


def documents():
    rng = np.random.default_rng(0)
    return [[END_OF_DOC, *rng.integers(3, 11, size=length - 1).tolist()] for length in DOCUMENTS]


def logits_of_the_model(config, params):
    """Of one stream with all documents, [tokens, n_vocab], computed in float32."""
    config = config.replace(dtype="float32", attention="xla")
    tokens = np.concatenate(documents()).astype(np.int32)[None]
    doc_ids = np.repeat(np.arange(len(DOCUMENTS), dtype=np.int32), DOCUMENTS)[None]

    @jax.jit
    def apply(params):
        state = Transformer.initial_state(config, 1)
        return Transformer(config).apply({"params": params}, state, tokens, doc_ids)[1]["logits"]

    return np.asarray(apply(params))[0]


@pytest.mark.slow(2)
@pytest.mark.parametrize("kind", ["shga", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(KINDS)[1:])])
def test_its_logits_are_the_model_s_and_it_needs_no_other_package(kind, environment, tmp_path):
    config = small_config(mem_len=5).replace(**KINDS[kind])
    folder = export_to(tmp_path / "out", config)
    found, packages = logits_of(environment, folder, documents())
    np.testing.assert_allclose(found, logits_of_the_model(config, model_params(config)), atol=1e-4, rtol=0)
    assert packages == ["generate", "numpy", "safetensors"]


@pytest.mark.slow
def test_weights_in_bfloat16_are_those_of_the_model_too(environment, tmp_path):
    """Of a model that was trained in bfloat16, and that is computed in float32."""
    config = small_config(mem_len=5, n_head=1, dtype="bfloat16", param_dtype="bfloat16")
    folder = export_to(tmp_path / "out", config, dtype="bfloat16")
    abstract = abstract_train_state(Settings(model=config), make_mesh(MeshSettings(), jax.devices()[:1])).params
    params = exported.params_of(exported.read_exported(folder).tensors, abstract, folder)
    found, _ = logits_of(environment, folder, documents())
    np.testing.assert_allclose(found, logits_of_the_model(config, params), atol=1e-4, rtol=0)


def test_it_is_short_enough_to_read():
    assert len(exported.PROGRAM.read_text().splitlines()) <= 200


def test_its_state_does_not_grow(tmp_path):
    model = generate.Model(export_to(tmp_path / "out", small_config(mem_len=5)))
    state, sizes = model.start(), []
    for step in range(60):
        model.step(state, 3 + step % 8)
        sizes.append(sum(array.nbytes for kept in state["units"] for array in kept.values()))
    assert sizes[0] < sizes[5] == sizes[-1]


def a_model(folder):
    return generate.Model(export_to(folder, small_config(n_vocab=264, n_layer=1, n_head=1)))


def test_tokens_are_drawn_by_their_shares_from_the_likeliest(tmp_path, monkeypatch):
    model = a_model(tmp_path / "out")
    logits = np.full(264, -20.0, np.float32)
    logits[[70, 80, 90, 0, 2, 262]] = np.log([0.5, 0.3, 0.2, 9.0, 9.0, 9.0])  # three ids that stand for no text
    monkeypatch.setattr(model, "step", lambda state, token: logits)
    drawn = np.array(list(model.generate([], 3000, 1.0, 1.0, seed=1)))
    np.testing.assert_allclose([np.mean(drawn == id_) for id_ in (70, 80, 90)], [0.5, 0.3, 0.2], atol=0.04)
    assert set(drawn) == {70, 80, 90}
    assert set(model.generate([], 300, 1.0, 0.7, seed=1)) == {70, 80}
    assert set(model.generate([], 100, 0.0, 1.0, seed=1)) == {70}
    sharp = np.array(list(model.generate([], 3000, 0.5, 1.0, seed=1)))
    assert np.mean(sharp == 70) == pytest.approx(0.25 / 0.38, abs=0.04)
    logits[END_OF_DOC] = 20.0
    assert list(model.generate([], 10, 1.0, 0.95, seed=1)) == []


def test_it_reads_the_prompt_before_it_draws(tmp_path):
    model = a_model(tmp_path / "out")
    state = model.start()
    for token in (END_OF_DOC, 50, 60):
        logits = model.step(state, token)
    likeliest = 3 + int(np.argmax(logits[3:259]))
    assert next(model.generate([50, 60], 1, 0.0, 1.0, seed=0)) == likeliest


@pytest.mark.parametrize("make", [trained, with_dummy_prefix, byte_level, lambda folder: ByteVocab()])
def test_text_and_tokens_are_those_of_the_vocabulary(make, tmp_path, monkeypatch):
    vocab = make(tmp_path)
    model = generate.Model(export_to(tmp_path / "out", small_config(n_layer=1), vocab))
    monkeypatch.setattr(generate, "FOLDER", tmp_path / "out")
    to_tokens, to_text = generate.text_functions(model.about)
    for text in ("the quick brown fox", "don't jump over été 漢字", "x <|endoftext|> \n  indented"):
        tokens = to_tokens(text)
        np.testing.assert_array_equal(tokens, vocab.encode(text.encode()))
        if make is not with_dummy_prefix:  # whose model takes spaces away
            assert to_text(tokens) == text


def test_the_command_line_takes_text_or_tokens(environment, tmp_path):
    folder = export_to(tmp_path / "out", small_config(n_vocab=264, n_layer=1, n_head=1))
    how = ("--length=12", "--temperature=0")
    done = bare(environment, folder, "generate.py", "--prompt=ab", *how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ab")
    in_tokens = bare(environment, folder, "generate.py", "--tokens=100 101", *how).stdout.split()
    assert 0 < len(in_tokens) <= 12
    text = bytes(int(token) - 3 for token in in_tokens).decode(errors="replace")
    assert done.stdout == f"ab{text}\n"


def test_text_of_other_vocabularies_needs_their_package_and_tokens_need_none(environment, tmp_path):
    folder = export_to(tmp_path / "out", small_config(n_vocab=320, n_layer=1, n_head=1), trained(tmp_path))
    done = bare(environment, folder, "generate.py", "--prompt=ab")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: text needs pip install sentencepiece; or give token ids, as in --tokens='5 6 7'\n"
    done = bare(environment, folder, "generate.py", "--tokens=100 101", "--length=3", "--temperature=0")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) in range(1, 4)


def test_a_model_of_images_draws_one_whatever_the_model_says_of_ends(tmp_path, monkeypatch, capfdbinary):
    folder = export_to(
        tmp_path / "out", small_config(n_vocab=264, n_layer=1, n_head=1), data=DataSettings(format="imagenet64")
    )
    logits = np.where(np.arange(264) == END_OF_DOC, 9.0, 0.0).astype(np.float32)
    logits[200] = 5.0
    monkeypatch.setattr(generate.Model, "step", lambda self, state, token: logits)
    monkeypatch.setattr(generate, "FOLDER", folder)
    monkeypatch.setattr("sys.argv", ["generate.py", "--temperature=0"])
    generate.main()
    out, _ = capfdbinary.readouterr()
    assert out == b"P6 64 64 255\n" + bytes([197]) * (64 * 64 * 3)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--tokens=5 264", "--tokens: 264 is not a token id; the model has 0 to 258"),
        ("--tokens=5 -1", "--tokens: -1 is not a token id; the model has 0 to 258"),
        ("--tokens=a", "--tokens: a is not a token id; the model has 0 to 258"),
        ("--top_p=0", BOUNDS),
        ("--top_p=nan", BOUNDS),
        ("--temperature=-1", BOUNDS),
        ("--temperature=inf", BOUNDS),
        ("--length=-1", BOUNDS),
        ("--seed=-1", BOUNDS),
    ],
)
def test_what_can_not_be_drawn_is_one_line(flag, message, tmp_path, monkeypatch):
    folder = export_to(tmp_path / "out", small_config(n_vocab=264, n_layer=1, n_head=1))
    monkeypatch.setattr(generate, "FOLDER", folder)
    monkeypatch.setattr("sys.argv", ["generate.py", flag])
    with pytest.raises(SystemExit) as ended:
        generate.main()
    assert ended.value.code == f"error: {message}"


def test_a_prompt_and_a_terminal_may_have_any_bytes(environment, tmp_path):
    folder = export_to(tmp_path / "out", small_config(n_vocab=264, n_layer=1, n_head=1))
    for prompt, said in (("a\udcff", "a?"), ("é", "?")):
        done = bare(
            environment | dict(PYTHONIOENCODING="ascii"), folder, "generate.py", f"--prompt={prompt}", "--length=0"
        )
        assert (done.returncode, done.stdout) == (0, f"{said}\n"), done.stderr


def test_values_far_below_zero_are_no_overflow():
    x = np.linspace(-300, 300, 601, dtype=np.float32)
    with np.errstate(all="raise"):
        np.testing.assert_allclose(generate.silu(x), x * (np.tanh(x.astype(float) / 2) + 1) / 2, rtol=1e-5, atol=1e-5)
