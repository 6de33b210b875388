"""The command line: what it prints, what it refuses, and how it exits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distclip import __version__
from distclip.cli import main
from tests.monitor import synthetic


@pytest.fixture
def run(tmp_path: Path) -> Path:
    norms, _ = synthetic.spiky(5.0, 20)
    return synthetic.write(tmp_path / "run.jsonl", norms)


Capture = pytest.CaptureFixture[str]


def test_help_teaches(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("recommend", "replay", "report", "watch", "doctor"):
        assert f"distclip {command} run.jsonl" in shown
        assert main([command, "--help"]) == 0
        assert f"Example: distclip {command}" in capsys.readouterr().out
    assert 'distclip.History("run.jsonl")' in shown


def test_installed() -> None:
    script = Path(sys.executable).with_name("distclip")
    result = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("distclip ")


def test_recommend(run: Path, capsys: Capture) -> None:
    assert main(["recommend", str(run)]) == 0
    shown = capsys.readouterr().out
    assert main(["recommend", str(run), "--json"]) == 0
    advised = json.loads(capsys.readouterr().out)
    assert advised["max_norm"] == pytest.approx(synthetic.P99, rel=0.08)
    assert advised["code"] in shown
    assert "spikes, the largest 5 of 20" in shown
    assert len(advised["spikes"]) == 20


def test_replay_says_where_it_differs(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "zeros.jsonl"
    path.write_text("".join(f'{{"step": {i}, "total_norm": {i % 3}}}\n' for i in range(60)))
    assert main(["replay", str(path), "-s", "zclip"]) == 0
    assert "20 norms are 0" in " ".join(capsys.readouterr().out.split())
    assert main(["replay", str(path), "-s", "global(1.0)"]) == 0
    assert "norms are 0" not in capsys.readouterr().out


def test_replay(run: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["replay", str(run), "-s", "zclip", "-s", "percentile(95, multiplier=2)", "-s", "global(1.0)"]
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["strategy"] for row in rows] == ["zclip", "percentile(95, multiplier=2)", "global(1.0)"]
    norms, _ = synthetic.spiky(5.0, 20)
    assert rows[2]["clip_rate"] == (norms > 1).mean()
    assert rows[2]["mean_coefficient"] == pytest.approx((1 / norms[norms > 1]).mean(), rel=1e-5)
    for name in ("replay.html", "replay.png"):
        assert main([*arguments, "--last", "500", "-o", str(tmp_path / name)]) == 0
        assert (tmp_path / name).stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "500 steps of" in shown
    assert "percentile(95, multiplier=2)" in shown


def test_report_and_picture(run: Path, tmp_path: Path, capsys: Capture) -> None:
    page, png = tmp_path / "report.html", tmp_path / "report.png"
    assert main(["report", str(run), str(run), "-o", str(page), "--png", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "wrote" in capsys.readouterr().out


def test_watch(run: Path, capsys: Capture) -> None:
    assert main(["watch", str(run), "--once"]) == 0
    shown = capsys.readouterr().out
    assert "step 4,000" in shown
    assert any(bar in shown for bar in "▂▃▄▅▆▇█")


def test_watch_follows(tmp_path: Path) -> None:
    from distclip.monitor.watching import Tail

    path = synthetic.write(tmp_path / "run.jsonl", synthetic.stationary(10))
    tail = Tail(path)
    assert tail.look() == 10
    with open(path, "a") as file:
        file.write('{"step":11,"total_norm":0.5}\n{"step":12,"tot')
    assert tail.look() == 1
    with open(path, "a") as file:
        file.write('al_norm":0.25}\n')
    assert tail.look() == 1
    assert (tail.steps[-1].step, tail.steps[-1].norm) == (12, 0.25)
    synthetic.write(path, synthetic.stationary(3))  # the run went back
    assert tail.look() <= 3
    assert [seen.step for seen in tail.steps] == [1, 2, 3]


GOOD = '{"step":1,"total_norm":0.5}\n'
BAD = {
    "empty": ("", "1: no step is recorded"),
    "torn": ('{"step":1,"total_n', "1: not JSON, or torn"),
    "no json": (GOOD + "step 2: norm 0.5\n" + GOOD, "2: not a line of JSON: step 2: norm 0.5"),
    "list": (GOOD * 3 + "[1, 2]\n" + GOOD, "4: not a line of JSON"),
    "wrong fields": ('{"epoch":1,"accuracy":0.5}\n', "1: no total_norm in ['epoch', 'accuracy']"),
    "text": (GOOD + '{"step":2,"total_norm":"big"}\n', "2: total_norm='big': expected a number"),
    "nested": (GOOD + '{"step":2,"total_norm":[1]}\n', "2: total_norm=[1]: expected a number"),
    "null": (GOOD + '{"step":2,"total_norm":null}\n', "2: total_norm=None: expected a number"),
    "half a step": (GOOD + '{"step":2.5,"total_norm":1}\n', "2: step=2.5: expected an integer"),
    "no step": (GOOD + '{"total_norm":1}\n', "2: step=None: expected an integer"),
    "threshold": (GOOD + '{"step":2,"total_norm":1,"threshold":{}}\n', "2: threshold={}: expected a number"),
    "params": (GOOD + '{"step":2,"total_norm":1,"param_norms":[1]}\n', "2: param_norms: expected 0 numbers"),
    "NaN": ('{"step":1,"total_norm":NaN}\n{"step":2,"total_norm":"nan"}\n', "all 2 norms, from line 1 on"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["recommend", "replay", "report"])
def test_bad_input(name: str, command: str, tmp_path: Path, capsys: Capture) -> None:
    """One line on stderr with the line of the file; exit code 2; the file as it was, and no output."""
    text, message = BAD[name]
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    arguments = ["-o", str(tmp_path / "out.html")] if command != "recommend" else []
    assert main([command, str(path), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"distclip: {path}")
    assert message in err
    assert path.read_text() == text
    assert os.listdir(tmp_path) == ["bad.jsonl"]


def test_files_that_cannot_be_used(run: Path, tmp_path: Path, capsys: Capture) -> None:
    for arguments, message in (
        (["recommend", str(tmp_path / "none.jsonl")], "none.jsonl: No such file"),
        (["watch", str(tmp_path / "none.jsonl"), "--once"], "none.jsonl: No such file"),
        (["recommend", str(tmp_path)], "Is a directory"),
        (["report", str(run), "-o", str(run / "report.html")], "Not a directory"),
        (["report", str(run), "-o", str(tmp_path / "no" / "report.html")], "No such file"),
        (["replay", str(run), "-s", "zklip"], "unknown name 'zklip'"),
        (["replay", str(run), "-o", "x.pdf"], "ends in .html or .png"),
        (["replay", str(run), "-s", "per_parameter(1)"], "0 of 4000 steps have them"),
    ):
        assert main(arguments) == 2, arguments
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert main(["recommend"]) == 2
    assert main(["nonsense"]) == 2


def test_what_is_read(tmp_path: Path) -> None:
    """Other people's logs; the later of two lines of a step; a torn last line; blank lines."""
    from distclip.monitor import read

    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"epoch":0}\n{"step":10,"total_norm":2.5,"loss":1}\n{"eval_loss":3.0,"step":10}\n\n'
        '{"step":20,"total_norm":NaN}\n{"step":30,"total_norm":3}\n{"step":20,"total_norm":Infinity}\n{"step":4'
    )
    read_ = read(path)
    assert read_.step.tolist() == [10, 20, 30]
    assert read_.norm.tolist() == [2.5, math.inf, 3.0]
    assert read_.torn
    path.write_text('{"grad_norm":2.5}\n{"grad_norm":3.5}\n')
    assert read(path).step.tolist() == [1, 2]


def test_without_the_extra(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['typer'] = None\n"
        "import distclip; from distclip.monitor import History; from distclip.cli import main\n"
        "sys.exit(main(['recommend', 'run.jsonl']))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "distclip: the commands need typer: pip install 'distclip[cli]'\n"


@pytest.mark.parametrize("arguments", [["--version"], ["doctor"], ["audit", "{}"], ["run", "{}"]])
def test_what_needs_torch_alone(arguments: list[str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nmodel = torch.nn.Linear(2, 2)\nmodel(torch.ones(1, 2)).sum().backward()\n"
        "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n"
    )
    extras = ["typer", "rich", "orjson", "plotly", "matplotlib", "tensorboard", "accelerate", "transformers"]
    arguments = [a.format(script) for a in arguments]
    program = (
        f"import sys; sys.modules |= dict.fromkeys({extras})\n"
        f"from distclip.cli import main; sys.exit(main({arguments}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    words = {"--version": __version__, "doctor": "torch   ", "audit": "right", "run": "1 calls"}
    assert words[arguments[0]] in said


class TestDoctor:
    def problems(self, capsys: Capture, *paths: Path) -> tuple[int, list[str]]:
        code = main(["doctor", "--json", *map(str, paths)])
        found = json.loads(capsys.readouterr().out)
        return code, [f["text"] for f in found if f["level"] == "problem"]

    def test_healthy(self, run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.problems(capsys, run) == (0, [])
        assert main(["doctor", str(run)]) == 0
        shown = capsys.readouterr().out
        assert "gloo" in shown
        assert "torch" in shown

    @pytest.mark.parametrize(
        ("norms", "max_norm", "text"),
        [
            (synthetic.stationary(), 0.1, "100% of the steps are clipped: the threshold is too low"),
            (synthetic.spiky(40.0, 5)[0], 100.0, "never clipped in 4000 steps, with 5 spikes"),
            (synthetic.spiky(40.0, 5)[0], 15.0, "is far above the data"),
            (synthetic.drifting(8.0), 2.0, "grows by a factor of"),
            (
                np.where(np.arange(4000) // 20 == 50, np.nan, synthetic.stationary()),
                0.8,
                "burst 20 from step 1001",
            ),
            (np.zeros(100), 1.0, "all finite norms are 0"),
        ],
        ids=["too low", "never", "far", "growing", "nonfinite", "zero"],
    )
    def test_mistakes(self, norms, max_norm, text, tmp_path: Path, capsys: Capture) -> None:  # type: ignore[no-untyped-def]
        path = synthetic.write(tmp_path / "run.jsonl", norms, max_norm=max_norm)
        code, problems = self.problems(capsys, path)
        assert code == 1
        assert [text in problem for problem in problems] == [True], problems

    @pytest.mark.parametrize(
        ("factor", "text"), [(1.0, None), (2.0, "summed over the ranks"), (2**-0.5, "the global batch grows")]
    )
    def test_world_size(self, factor: float, text: str | None, tmp_path: Path, capsys: Capture) -> None:
        norms = synthetic.stationary()
        one = synthetic.write(tmp_path / "one.jsonl", norms, max_norm=0.8)
        two = synthetic.write(tmp_path / "two.jsonl", norms * factor, max_norm=0.8, world_size=2)
        code, problems = self.problems(capsys, one, two)
        ours = [problem for problem in problems if "first common steps differ" in problem]
        assert len(ours) == (text is not None)
        assert text is None or text in ours[0]
        assert code == 1 or text is None

    @pytest.mark.parametrize(
        ("environment", "text"),
        [
            ({"RANK": "0", "WORLD_SIZE": "2"}, "not MASTER_ADDR, MASTER_PORT"),
            (
                {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
                "RANK=2 is not below WORLD_SIZE=2",
            ),
            (
                {"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
                "RANK='x' is no number",
            ),
        ],
    )
    def test_launch(self, environment: dict[str, str], text: str) -> None:
        from distclip.monitor.doctor import examine_installation

        texts = [f.text for f in examine_installation(environment) if f.level == "problem"]
        assert any(text in found for found in texts), texts
