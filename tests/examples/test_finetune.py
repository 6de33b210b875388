"""The fine-tune, run as its users run it: under torchrun, stopped, and resumed on another number of ranks.

All runs but one are in float32, where the number of ranks only changes the order of sums. All but one are of
a tiny causal model with random weights; MiniLM has its own.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distclip.monitor import Run, read
from tests.starting import start

STEPS = 6
SMALL = ("--steps", str(STEPS), "--batch-size", "4", "--seq-len", "16", "--text", "100000")
# Follows the norms from the second step on, and is below about half of them: a lost history would show.
ADAPTIVE = ("--strategy", "percentile(50, multiplier=1, warmup=2)")


def run(history: Path, *options: str, ranks: int, dtype: str = "float32") -> str:
    """What rank 0 says. It has to end cleanly."""
    always = (*SMALL, *ADAPTIVE, "--dtype", dtype, "--history", str(history))
    return start("finetune_fsdp.py", *always, *options, ranks=ranks, HF_HUB_OFFLINE="1")[0]


def held_out(out: str) -> list[float]:
    """The losses on text that it does not train on, before and after."""
    return [float(loss) for loss in re.findall(r"^held-out loss: (\S+)$", out, flags=re.MULTILINE)]


def sequence(run: Run) -> NDArray[np.float64]:
    """What has to go on as if nothing had happened: [4, steps]."""
    assert run.step.tolist() == list(range(1, STEPS + 1))  # each once
    return np.stack([run.norm, run.threshold, run.loss, run.lr])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """For checkpoints, that pytest would keep."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A Llama of two layers that reads bytes, and a tokenizer without a mask."""
    folder = tmp_path_factory.mktemp("model")
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet), **sizes)).save_pretrained(folder)
    return "--model", str(folder), "--lr", "0.01"


@pytest.fixture(scope="module")
def whole(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """One rank, not interrupted."""
    history = tmp_path_factory.mktemp("whole") / "run.jsonl"
    out = run(history, *tiny, ranks=1)
    return read(history), out


def test_minilm_learns_and_the_threshold_adapts(folder: Path) -> None:
    history = folder / "run.jsonl"
    before, after = held_out(run(history, ranks=2))
    run_ = read(history)
    assert 9.5 < before < 11.5  # a head that knows nothing: ln(30522) = 10.3
    assert after < before - 2
    assert run_.loss[-1] < run_.loss[0] - 2
    assert len(set(run_.threshold.tolist())) == STEPS  # another one in each step
    assert 0 < run_.clip_rate < 1


# By what it asks: fsdp, and for each part the ranks that it runs on and the step after which it stops.
PARTS: dict[str, tuple[str, tuple[tuple[int, int], ...]]] = {
    "two ranks, one rank, two ranks": ("2", ((2, 2), (1, 4), (2, STEPS))),
    "four ranks, two ranks": ("2", ((4, 3), (2, STEPS))),
    "FSDP1, two ranks, one rank": ("1", ((2, 3), (1, STEPS))),
}


@pytest.mark.parametrize("parts", PARTS)
def test_in_parts(parts: str, tiny: tuple[str, ...], whole: tuple[Run, str], folder: Path) -> None:
    """Each from the checkpoint of the one before: the run that was not interrupted."""
    fsdp, stretches = PARTS[parts]
    history, saved, said = folder / "run.jsonl", folder / "checkpoints", list[str]()
    for ranks, stop in stretches:
        ends = ("--stop-after", str(stop)) if stop < STEPS else ()
        said.append(run(history, *tiny, "--fsdp", fsdp, "--checkpoints", str(saved), *ends, ranks=ranks))
    assert "resumed" not in said[0]
    for (_, stopped), (ranks, _), out in zip(stretches, stretches[1:], said[1:], strict=False):
        assert f"resumed after step {stopped} on {ranks} ranks" in out
    np.testing.assert_allclose(sequence(read(history)), sequence(whole[0]), rtol=2e-4)
    for earlier, later in pairwise(said):
        assert held_out(earlier)[1] == pytest.approx(held_out(later)[0], abs=2e-4)
    assert held_out(said[-1])[1] == pytest.approx(held_out(whole[1])[1], abs=2e-3)
    assert held_out(said[-1])[1] < held_out(whole[1])[0] - 0.4  # from ln(256) = 5.5
    assert [c.name for c in saved.iterdir()] == ["step-000006"]


def test_bfloat16_is_close(tiny: tuple[str, ...], whole: tuple[Run, str], folder: Path) -> None:
    history = folder / "run.jsonl"
    before, after = held_out(run(history, *tiny, ranks=2, dtype="bfloat16"))
    assert after < before - 0.4
    rounded, exact = sequence(read(history)), sequence(whole[0])
    np.testing.assert_allclose(rounded, exact, rtol=5e-2)
    assert not np.allclose(rounded, exact, rtol=2e-5)  # it was another precision
