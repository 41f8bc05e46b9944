"""lm-evaluation-harness: what it is told of a model is what the model says by other ways, and its tasks run as they
are written."""

import importlib.util
import json
import math
import pathlib

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from tests.command import finish, start
from tests.inference.conftest import SETTINGS
from tests.parallel.test_processes import launched
from tvq_pod.errors import UserError
from tvq_pod.inference import lm_eval_tasks
from tvq_pod.inference.batched import BatchedModel
from tvq_pod.inference.continuous import ContinuousSampler
from tvq_pod.inference.lm_eval_model import HarnessModel, SharedModel
from tvq_pod.inference.sampler import CHUNK
from tvq_pod.modes.run_lm_eval import run_lm_eval

LONG = "a text of more tokens than several updates and a window have together. "
TEXTS = ["a short one", LONG, "é", LONG * 2, "x" * 15, "x" * 16, "x" * 17, "the last of more texts than devices", LONG]
QUESTIONS = [
    dict(question="What is it?", choices=["a fox", "a dog"], answer=0),
    dict(question=LONG.strip(), choices=["an end", "another, longer end"], answer=1),
    dict(question="1 + 1 =", choices=["2", "11"], answer=0),
]
N_NEW = 12  # tokens that a task draws
TASKS = dict(
    rolling='output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
    "metric_list: [{metric: bits_per_byte}]",
    choices='output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
    "doc_to_target: answer\nmetric_list: [{metric: acc}]",
    ends='output_type: loglikelihood\ndoc_to_text: "{{question}}"\ndoc_to_target: " {{choices[0]}}"\n'
    "metric_list: [{metric: perplexity}, {metric: acc}]",
    starts='output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{drawn}}"\n'
    f"generation_kwargs: {{until: [never there], max_gen_toks: {N_NEW}}}\nmetric_list: [{{metric: exact_match}}]",
)
GROUP = "group: own\ntask: [own_choices, own_rolling]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"


@pytest.fixture(scope="module")
def batched(loaded) -> SharedModel:
    return SharedModel(BatchedModel(loaded.settings, loaded.params, loaded.vocab, loaded.mesh, shows_progress=False))


@pytest.fixture
def harness(batched, loaded) -> HarnessModel:
    return HarnessModel(batched, loaded.vocab, None, {})


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, loaded) -> dict[str, str]:
    """Paths of YAML files, by the names of their tasks. What is to be drawn is what `LoadedModel.generate` draws."""
    folder, paths = tmp_path_factory.mktemp("tasks"), {}
    drawn = loaded.generate([row["question"] for row in QUESTIONS], length=N_NEW, temperature=0.0)
    questions = [row | dict(drawn=text) for row, text in zip(QUESTIONS, drawn, strict=True)]
    (folder / "group.yaml").write_text(GROUP)
    for name, rows in (("texts", [dict(text=text) for text in TEXTS]), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        data = folder / ("texts.jsonl" if name == "rolling" else "questions.jsonl")
        path = folder / f"{name}.yaml"
        path.write_text(
            f"task: own_{name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder}/cache}}\n{text}\n"
        )
        paths[name] = str(path)
    return paths


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def expected_of(loaded) -> dict[str, float]:
    """What the harness' metrics are, by `LoadedModel.score`."""
    pairs = [("", text) for text in TEXTS]
    pairs += [(row["question"], f" {choice}") for row in QUESTIONS for choice in row["choices"]]
    scores = loaded.score([context + continuation for context, continuation in pairs])
    sums = [
        float(found[len(pair[0].encode()) :].sum(dtype=np.float64)) for pair, found in zip(pairs, scores, strict=True)
    ]
    of_texts, of_choices = sums[: len(TEXTS)], np.reshape(sums[len(TEXTS) :], [len(QUESTIONS), 2])
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    return dict(
        rolling=-sum(of_texts) / n_bytes / math.log(2),
        choices=np.mean([np.argmax(row) == each["answer"] for row, each in zip(of_choices, QUESTIONS, strict=True)]),
        ends=math.exp(-of_choices[:, 0].mean()),
        starts=1.0,
    )


def check_scores(results: dict, expected: dict[str, float]) -> None:
    metrics = dict(rolling="bits_per_byte,none", choices="acc,none", ends="perplexity,none", starts="exact_match,none")
    for name, metric in metrics.items():
        assert results[f"own_{name}"][metric] == pytest.approx(expected[name], rel=1e-4), name


@pytest.fixture
def known(tasks, monkeypatch) -> None:
    """Our own tasks can be named, and no others: to read those of the harness takes seconds."""
    folder = pathlib.Path(tasks["rolling"]).parent
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", lambda include_defaults: TaskManager(None, folder, False))


@pytest.mark.slow(8)
def test_tasks_have_the_scores_that_the_evaluator_gives(workdir, loaded, tasks, capsys, known):
    """By name, in a group, by a pattern and as a file; and the results file is in the harness' format."""
    run_lm_eval(loaded.settings, workdir, None, ["own", "own_en*", tasks["starts"]], None, None, None)
    shown = json.loads(capsys.readouterr().out)
    assert shown["step"] == 3
    (path,) = (workdir / "eval").glob("lm_eval_step_3_*.json")
    written = json.loads(path.read_text())
    assert shown["results"] == written["results"]
    assert written["config"]["step"] == 3
    assert written["n-samples"]["own_choices"] == dict(original=3, effective=3)
    check_scores(shown["results"], expected_of(loaded))
    assert written["groups"]["own"]["acc,none"] == shown["results"]["own_choices"]["acc,none"]
    run_lm_eval(loaded.settings, workdir, None, ["own_choices"], 1, 2, None)
    assert json.loads(capsys.readouterr().out)["results"]["own_choices"]["sample_len"] == 2


@pytest.mark.slow(2)
def test_a_continuation_is_greedy_if_each_of_its_tokens_is_the_likeliest(harness, loaded):
    prompt = list(b"the quick")
    (drawn,) = loaded.generate_tokens([np.add(prompt, 3)], length=3, temperature=0.0)
    other = [*drawn[:-1], drawn[-1] - 1]
    context = [1, *np.add(prompt, 3)]
    asked = [(("", ""), context, list(drawn)), (("", ""), context, other), (("", ""), context, list(drawn[:1]))]
    found = harness._loglikelihood_tokens(asked)
    assert [is_greedy for _, is_greedy in found] == [True, False, True]
    scores = loaded.score_tokens([np.array([*context[1:], *continuation]) for _, _, continuation in asked])
    for (nats, _), score, (_, _, continuation) in zip(found, scores, asked, strict=True):
        assert nats == pytest.approx(score[-len(continuation) :].sum(), abs=1e-4)


@pytest.mark.slow(6)
def test_generated_texts_end_before_the_first_stop_string(harness, loaded):
    """Of prompts of less and more than a block, more of them than devices."""
    prompts = [LONG[:length] for length in (0, 1, 3, 4, 5, 30, 2, 7, 9, 11)]
    texts = loaded.generate(prompts, length=40, temperature=0.0)
    stops = [texts[0][5:7], texts[5][20], "never there"]
    ends = [min([text.find(stop) for stop in stops if stop in text], default=len(text)) for text in texts]
    assert len(set(ends)) > 2
    how = dict(until=stops, max_gen_toks=40, do_sample=False)
    found = harness.generate_until(requests("generate_until", *((prompt, how) for prompt in prompts)))
    assert found == [text[:end] for text, end in zip(texts, ends, strict=True)]


@pytest.mark.slow(2)
def test_no_more_is_drawn_than_the_stop_strings_need(batched, monkeypatch):
    """The likeliest text of many tokens is cut off long before its end."""
    prompts = [np.array([70]), np.array([71, 72])]
    how = dict(length=400, temperature=0.0, top_p=1.0)
    texts = batched.continue_until(prompts, stops=[], **how)
    stops = [text[1] for text in texts]
    steps, draw = [], ContinuousSampler._draw_rows

    def counted(self, *arguments):
        state, seen, tokens, logprobs = draw(self, *arguments)
        steps.append(tokens.shape[1])
        return state, seen, tokens, logprobs

    monkeypatch.setattr(ContinuousSampler, "_draw_rows", counted)
    assert all(len(text) < 2 for text in batched.continue_until(prompts, stops=stops, **how))
    assert 0 < sum(steps) <= CHUNK


@pytest.mark.slow(3)
def test_max_length_cuts_what_is_read_and_never_what_is_predicted(batched, loaded):
    harness = HarnessModel(batched, loaded.vocab, 5, {})
    text = "twelve bytes"
    (found,) = harness.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    first, second, last = loaded.score([text[:5], text[5:10], text[7:]])
    assert found == pytest.approx(first.sum() + second.sum() + last[3:].sum(), rel=1e-5)
    ((found, _),) = harness.loglikelihood(requests("loglikelihood", ("a longer context", " it")))
    (scores,) = loaded.score(["xt it"])
    assert found == pytest.approx(scores[2:].sum(), rel=1e-5)


def test_nothing_is_asked_of_a_model_that_has_nothing_to_read(harness):
    assert harness.loglikelihood_rolling(requests("loglikelihood_rolling", ("",))) == [0.0]
    assert harness.loglikelihood([]) == []
    assert harness.generate_until([]) == []


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("loglikelihood", ("a", " long end"), "--max_length=4: a continuation has 9 tokens; give 9 or more"),
        ("generate_until", ("a", dict(max_gen_toks=4)), "--max_length=4: a task generates up to 4 tokens; give more"),
        ("generate_until", ("a", dict(num_beams=2)), "--tasks: a task has generation_kwargs num_beams=2, which is not"),
        ("generate_until", ("a", dict(max_gen_toks=-1)), "--tasks: a task has generation_kwargs max_gen_toks=-1: must"),
        ("generate_until", ("a", dict(max_gen_toks="x")), "--tasks: a task has generation_kwargs that can't be read ("),
        ("generate_until", ("a", dict(temperature=-1.0, do_sample=True)), "--tasks: a task has generation_kwargs temp"),
        (
            "generate_until",
            ("a", dict(top_p=0, do_sample=True)),
            "--tasks: a task has generation_kwargs top_p=0.0",
        ),
        ("generate_until", ("a", dict(until=[5])), "--tasks: a task has generation_kwargs until=[5]: must be text"),
        (
            "generate_until",
            ("a", dict(do_sample=True, top_k=9)),
            "--tasks: a task has generation_kwargs top_k=9, which is not supported",
        ),
    ],
)
def test_what_can_not_be_answered_is_one_line(batched, loaded, kind, arguments, message):
    harness = HarnessModel(batched, loaded.vocab, 4, {})
    with pytest.raises(UserError) as refused:
        getattr(harness, kind)(requests(kind, arguments))
    assert str(refused.value).startswith(message)


@pytest.mark.slow(2)
def test_tasks_that_do_not_exist_are_one_line(workdir, known, tmp_path):
    broken = tmp_path / "broken.yaml"
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe")
    broken.write_text(f"task: broken\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/none.jsonl}}\n")
    for names, message in [
        (["own_rollin"], "--tasks=own_rollin: is not a task of lm-evaluation-harness; did you mean own_rolling"),
        (["missing.yaml"], "--tasks=missing.yaml: the file does not exist"),
        ([str(binary)], f"--tasks={binary}: can't be read ('utf-8' codec can't decode"),
        ([str(broken)], f"--tasks={broken}: can't be loaded (FileNotFoundError"),
        ([], "--tasks=: must be given for --mode=lm_eval"),
    ]:
        with pytest.raises(UserError) as refused:
            run_lm_eval(SETTINGS, workdir, None, names, None, None, None)
        assert str(refused.value).startswith(message)


def test_a_harness_that_is_not_installed_is_one_line(workdir, tasks, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as refused:
        run_lm_eval(SETTINGS, workdir, None, [tasks["rolling"]], None, None, None)
    assert str(refused.value) == "--mode=lm_eval: lm-evaluation-harness needs pip install -e '.[lm-eval]'"


@pytest.mark.slow
def test_lengths_that_are_not_positive_are_one_line(workdir):
    for flag in ("--max_length=-1", "--limit=0", "--num_fewshot=-2"):
        code, out, err = finish(start("--mode=lm_eval", f"--workdir={workdir}", "--tasks=hellaswag", flag))
        assert (code, out, len(err.splitlines())) == (1, "", 1)
        assert err.startswith(f"error: {flag}: must be a ")


@pytest.mark.slow(30)
def test_all_processes_compute_what_the_first_is_asked(workdir, loaded, tasks):
    """The harness knows of one process."""
    flags = ["--mode=lm_eval", f"--workdir={workdir}", f"--tasks={','.join(tasks.values())}"]
    job = launched("--processes=2", "--devices_per_process=2", "--", *flags)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 0, output
    (line,) = [line for line in output.splitlines() if line.startswith("{")]
    check_scores(json.loads(line)["results"], expected_of(loaded))
    job = launched("--processes=2", "--devices_per_process=2", "--", *flags[:2], "--tasks=missing.yaml")
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 1
    assert output.count("--tasks=missing.yaml: the file does not exist") == 1
