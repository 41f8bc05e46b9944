"""Measuring: every figure that is asked for, and the two attentions in turns."""

import json

import pytest
from etils import epath

from tests.command import finish, start
from tvq_pod.config.settings import Settings
from tvq_pod.errors import UserError
from tvq_pod.modes.bench import bench

QUICK = ["--config.model.n_layer=1", "--config.model.head_type=mqa", "--config.model.reduction=serial"]  # to compile


@pytest.fixture(scope="module")
def measured(tmp_path_factory, config_file) -> tuple[dict, str]:
    """Both attentions at a length that fits and at one that does not: twelve gigabytes of address space for 2 ** 22
    tokens a row, a real lack of memory, in the first call."""
    folder = tmp_path_factory.mktemp("bench")
    limited = ["bash", "-c", 'ulimit -v 12000000; exec "$@"', "-"]
    flags = ["--mode=bench", f"--config={config_file}", f"--workdir={folder}", "--lengths=16,4194304", "--rounds=2"]
    code, _, err = finish(start(*flags, *QUICK, "--against=full", prefix=limited))
    assert code == 0, err
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "bench.json").read_text()), err


@pytest.mark.slow
def test_both_attentions_are_measured_at_every_length(measured):
    result, err = measured
    assert [(row["attn_type"], row["update_len"]) for row in result["rows"]] == [
        ("vq", 16), ("full", 16), ("vq", 4194304), ("full", 4194304),
    ]  # fmt: skip
    for row in result["rows"][:2]:
        for name in ("train_step_seconds", "eval_step_seconds", "sampling_1_seconds", "sampling_64_seconds"):
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
        tokens = 8 * row["update_len"]
        assert row["train_tokens_per_second"] == pytest.approx(tokens / row["train_step_seconds"]["median"])
        one, many = row["sampled_tokens_per_second"]["1"], row["sampled_tokens_per_second"]["64"]
        assert one == pytest.approx(256 / row["sampling_1_seconds"]["median"])
        assert many == pytest.approx(64 * 32 / row["sampling_64_seconds"]["median"])
        assert row["train_flops_per_second"] > 0
        assert row["peak_bytes"] > 0
        assert row["compile_seconds"] > 0
    assert "T = 16: full takes" in err


@pytest.mark.slow
def test_ratios_are_of_the_medians(measured):
    result, _ = measured
    vq, full = (row["train_step_seconds"]["median"] for row in result["rows"][:2])
    assert result["ratios"] == {"16": pytest.approx(full / vq)}


@pytest.mark.slow
def test_a_length_that_does_not_fit_is_a_row_and_the_others_are_kept(measured):
    result, err = measured
    for row in result["rows"][2:]:
        assert "RESOURCE_EXHAUSTED" in row["error"]
    assert err.count("does not fit") == 2


@pytest.mark.slow
def test_a_folder_that_cannot_be_used_is_found_out_first(tmp_path, config_file):
    (tmp_path / "file").write_text("")
    code, _, err = finish(start("--mode=bench", f"--config={config_file}", f"--workdir={tmp_path / 'file'}"))
    assert code == 1
    assert err.splitlines()[-1].startswith(f"error: --workdir={tmp_path / 'file'}: can't be used")


def test_a_length_that_is_no_multiple_of_the_blocks_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^--lengths=200: must be a multiple of config.model.block_len=128$"):
        bench(Settings(), epath.Path(tmp_path / "x"), None, [128, 200], 1)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_lengths_that_are_no_numbers_are_one_line(tmp_path, config_file):
    flags = ["--mode=bench", f"--config={config_file}", f"--workdir={tmp_path / 'x'}"]
    code, _, err = finish(start(*flags, "--lengths=many"))
    assert code == 1
    assert err.splitlines()[-1].startswith("error: --lengths=many: must be numbers of tokens")
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_written_costs_the_files_and_not_the_figures(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    workdir = epath.Path(tmp_path / "file/run")

    def measured(variants, mesh, rounds):
        speeds = ("train_tokens", "train_flops", "eval_tokens")
        row = dict(attn_type="vq", peak_bytes=1, compile_seconds=1.0, train_step_seconds=dict(median=1, min=1, max=1))
        row |= dict(sampled_tokens_per_second={1: 1.0, 64: 1.0})
        return [row | {f"{name}_per_second": 1.0 for name in speeds} | dict(update_len=variants[0].train.update_len)]

    monkeypatch.setattr("tvq_pod.modes.bench.measure", measured)
    lengths = [128, 256]
    assert [row["update_len"] for row in bench(Settings(), workdir, None, lengths, 1)["rows"]] == lengths
    *rows, last = capsys.readouterr().err.splitlines()
    assert [row.split()[:3] for row in rows] == [["vq", "T", "128:"], ["vq", "T", "256:"]]
    assert last == f"WARNING: {workdir}/bench.json, {workdir}/bench.png can't be written (Not a directory)"
