"""``distclip audit``: what it says of right scripts and of wrong ones, which it leaves as they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.audit.launching import SCRIPTS, launch
from tests.starting import python, torchrun

SCRIPT = SCRIPTS / "trains.py"
PAGE = SCRIPTS.parents[2] / "docs" / "audit.md"
ON_THE_PAGE = {"fsdp1", "stages", "ddp_no_sync", "amp_scaled", "left_out"}
LINES = SCRIPT.read_text().splitlines()
RIGHT = {
    "single": 1, "amp": 1, "split": 1, "value": 1, "ddp": 2, "fsdp2": 2, "fsdp1_method": 2, "hsdp": 4,
}  # fmt: skip
# By kind: ranks, and the finding that it must come to.
WRONG = {
    "amp_scaled": (1, "scaled"),
    "twice": (1, "listed-twice"),
    "iterator": (1, "iterator"),
    "left_out": (1, "not-clipped"),
    "before": (1, "before-backward"),
    "after": (1, "after-step"),
    "too_early": (1, "too-early"),
    "muon": (1, "muon"),
    "amp_half_unscaled": (1, "scaled"),
    "late_nan": (1, "nonfinite"),
    "backward_after": (1, "too-early"),
    "stages": (2, "ranks-differ"),
    "tp": (2, "ranks-differ"),
    "fsdp1": (2, "norm"),
    "ddp_no_sync": (2, "not-synchronised"),
    "ddp_one_rank": (2, "absent"),
}


def audited(ranks: int, folder: Path, *script: str | Path, options: tuple[str, ...] = ()) -> Any:
    """What it has found, as JSON, and how it ended."""
    found = folder / "found.json"
    ended = launch(ranks, "audit", "--json", found, *options, *script)
    return json.loads(found.read_text()), ended


def findings_of(judged: Any) -> dict[str, Any]:
    return {f["kind"]: f for f in [f for c in judged["calls"] for f in c["findings"]] + judged["findings"]}


def weights(folder: Path, ranks: int) -> list[Any]:
    return [torch.load(folder / f"weights.{rank}", weights_only=True) for rank in range(ranks)]


@pytest.mark.parametrize("kind", RIGHT)
def test_right(kind: str, tmp_path: Path) -> None:
    ranks = RIGHT[kind]
    judged, ended = audited(ranks, tmp_path, SCRIPT, kind, "25")
    assert ended.codes == [0] * ranks, ended.err
    assert judged["verdict"] == "right", judged
    assert not [f for f in findings_of(judged).values() if f["severity"] == "wrong"]
    assert [c["calls"] for c in judged["calls"]] == [25] * len(judged["calls"])
    assert judged["world_size"] == ranks
    assert all(out.strip() == "done" for out in ended.out), "the script's own output, and nothing else"
    for call in judged["calls"]:
        if call["norm"] is not None and call["true_norm"] is not None:
            assert call["norm"] == pytest.approx(call["true_norm"], rel=1e-5)


@pytest.mark.parametrize("kind", WRONG)
def test_wrong(kind: str, tmp_path: Path) -> None:
    ranks, expected = WRONG[kind]
    judged, ended = audited(ranks, tmp_path, SCRIPT, kind, "25")
    assert ended.codes == [0] * ranks, ended.err
    assert judged["verdict"] == "wrong", judged
    found = findings_of(judged)
    assert expected in found, found
    assert found[expected]["severity"] == "wrong"
    assert found[expected]["remedy"]
    for call in judged["calls"]:
        path, line = call["where"].rsplit(":", 1)
        assert Path(path).name == "trains.py"
        assert "clip" in LINES[int(line) - 1] or "norm" in LINES[int(line) - 1]
    said = _without_numbers(found[expected]["message"])
    assert said in _without_numbers(ended.err[0])
    if kind in ON_THE_PAGE:
        assert said in _without_numbers(PAGE.read_text())


def _without_numbers(text: str) -> str:
    """Nor line breaks."""
    return re.sub(r"[\d.]+", "#", " ".join(text.split()))


@pytest.mark.parametrize("kind", ["single", "amp", "ddp", "fsdp2", "fsdp1_method", "fsdp1", "ddp_no_sync"])
def test_the_script_trains_bit_for_bit_as_without(kind: str, tmp_path: Path) -> None:
    ranks = {**RIGHT, **{k: r for k, (r, _) in WRONG.items()}}[kind]
    watched, alone = tmp_path / "watched", tmp_path / "alone"
    watched.mkdir()
    alone.mkdir()
    launch(ranks, "audit", SCRIPT, kind, "6", watched / "weights")
    launch(ranks, "alone", SCRIPT, kind, "6", alone / "weights")
    for one, other in zip(weights(watched, ranks), weights(alone, ranks), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_exit_codes_are_the_scripts(tmp_path: Path) -> None:
    assert audited(1, tmp_path, SCRIPT, "exits")[1].codes == [7]
    judged, ended = audited(1, tmp_path, SCRIPT, "raises")
    assert ended.codes == [1]
    assert "RuntimeError: this script fails" in ended.err[0]
    assert "distclip/audit" not in ended.err[0], "the traceback is the script's own"
    assert judged["verdict"] == "right"


def test_strict(tmp_path: Path) -> None:
    assert audited(1, tmp_path, SCRIPT, "twice", options=("--strict",))[1].codes == [3]
    assert audited(1, tmp_path, SCRIPT, "single", options=("--strict",))[1].codes == [0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_so_many_steps(ranks: int, tmp_path: Path) -> None:
    judged, ended = audited(
        ranks, tmp_path, SCRIPT, "ddp" if ranks > 1 else "single", "100", options=("--steps", "5")
    )
    assert ended.codes == [0] * ranks
    assert [call["calls"] for call in judged["calls"]] == [5]


def test_a_file_in_a_folder_that_there_is_not(tmp_path: Path) -> None:
    """Before the script has run, and not after."""
    ended = launch(1, "audit", "--json", tmp_path / "none" / "found.json", SCRIPT, "single")
    assert ended.codes == [2]
    assert f"there is no folder {tmp_path / 'none'}" in ended.err[0]
    assert ended.out == [""]


def test_what_distclip_takes_for_the_same(tmp_path: Path) -> None:
    """Without anybody who joins in: one rank calls alone."""
    for kind, ranks in (("single", 1), ("ddp", 2), ("fsdp2", 2), ("ddp_one_rank", 2)):
        judged, ended = audited(ranks, tmp_path, SCRIPT, kind, "5")
        (call,) = judged["calls"]
        assert 0 < call["distclip_seconds"] < 1
        assert not judged["troubles"]
        assert "distclip's" in ended.err[0]


def test_samples(tmp_path: Path) -> None:
    """The first 20 calls, and each 30th."""
    history = tmp_path / "norms.jsonl"
    options = ("--every", "30", "--history", str(history), "--html", str(tmp_path / "page.html"))
    audited(1, tmp_path, SCRIPT, "single", "100", options=options)
    records = [json.loads(line) for line in history.read_text().splitlines()]
    assert [record["step"] for record in records] == [*range(20), 30, 60, 90]
    from distclip.monitor.run import read

    assert len(read(history)) == 23
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http-equiv", ""), "it needs nothing but a browser"


def test_nothing_that_clips(tmp_path: Path) -> None:
    script = tmp_path / "empty.py"
    script.write_text("print('hello')\n")
    judged, ended = audited(1, tmp_path, script)
    assert judged["verdict"] == "unknown"
    assert list(findings_of(judged)) == ["no-call"]
    assert ended.out == ["hello\n"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp1"])
def test_under_torchrun(kind: str, tmp_path: Path) -> None:
    """As users start it; the store is then that of torchrun's agent."""
    found = tmp_path / "found.json"
    python(*torchrun(2), "-m", "distclip", "audit", "--json", str(found), SCRIPT, kind, "6")
    assert json.loads(found.read_text())["verdict"] == ("right" if kind == "ddp" else "wrong")


def test_help_lists_what_is_watched() -> None:
    said = python("-m", "distclip", "audit", "--help").stdout
    assert "torch.nn.utils.clip_grad_norm_" in said
    assert "Accelerator.clip_grad_norm_" in said


@pytest.mark.parametrize(
    ("kind", "ranks", "function"),
    [
        ("accelerate", 1, "Accelerator.clip_grad_norm_"),
        ("accelerate", 2, "Accelerator.clip_grad_norm_"),
        ("trainer", 1, "Accelerator.clip_grad_norm_"),
        ("lightning", 1, "clip_grad_norm_"),
    ],
)
def test_frameworks_that_are_right(kind: str, ranks: int, function: str, tmp_path: Path) -> None:
    judged, ended = audited(ranks, tmp_path, SCRIPTS / "frameworks.py", kind, tmp_path / "run")
    assert ended.codes == [0] * ranks, ended.err
    assert judged["verdict"] == "right", judged
    (call,) = judged["calls"]
    assert call["function"].endswith(function)
    assert call["norm"] == pytest.approx(call["true_norm"], rel=1e-5)


ALONE = (
    "two_models", "replaced", "bf16", "two_optimizers", "autograd_grad", "skipped_steps", "manual", "lbfgs",
    "logged", "per_layer", "two_scalers", "scaler_of_before", "compiled", "norm_zero", "goes_elsewhere",
)  # fmt: skip
ON_TWO = ("averaged_on_one_rank", "by_hand", "branches", "without_a_group", "joined")
ALSO_RIGHT = dict.fromkeys(ALONE, 1) | dict.fromkeys(ON_TWO, 2)


@pytest.mark.parametrize("kind", ALSO_RIGHT)
def test_no_false_alarm(kind: str, tmp_path: Path) -> None:
    ranks = ALSO_RIGHT[kind]
    judged, ended = audited(ranks, tmp_path, SCRIPTS / "right.py", kind)
    assert ended.codes == [0] * ranks, ended.err
    assert not [f for f in findings_of(judged).values() if f["severity"] == "wrong"], judged
    assert judged["verdict"] in ("right", "unknown")
    assert not judged["troubles"]
