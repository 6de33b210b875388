"""The fine-tune, run as its users run it: under torchrun, stopped, and resumed on another number of ranks.

All runs but one are in float32, where the number of ranks only changes the order of sums. The tiny causal
model has random weights; MiniLM has its own.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distclip.monitor import Run, read
from tests.examples.running import start, torchrun

STEPS = 6
SMALL = ("--steps", str(STEPS), "--batch-size", "4", "--seq-len", "16", "--text", "100000")
# Follows the norms from the second step on, and is below about half of them: a lost history would show.
ADAPTIVE = ("--strategy", "percentile(50, multiplier=1, warmup=2)")


def run(history: Path, *options: str, ranks: int, dtype: str = "float32") -> str:
    """What rank 0 says. It has to end cleanly."""
    always = (*SMALL, *ADAPTIVE, "--dtype", dtype, "--history", str(history))
    launcher = torchrun(ranks)
    return start("finetune_fsdp.py", *always, *options, launcher=launcher, HF_HUB_OFFLINE="1")[0]


def held_out(out: str) -> list[float]:
    """The losses on text that it does not train on, before and after."""
    return [float(loss) for loss in re.findall(r"^held-out loss: (\S+)$", out, flags=re.MULTILINE)]


def sequence(run: Run) -> NDArray[np.float64]:
    """What has to go on as if nothing had happened: [4, steps]."""
    assert run.step.tolist() == list(range(1, STEPS + 1))  # each once
    return np.stack([run.norm, run.threshold, run.loss, run.lr])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """For checkpoints: hundreds of megabytes, that pytest would keep."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """One rank, not interrupted."""
    history = tmp_path_factory.mktemp("whole") / "run.jsonl"
    out = run(history, ranks=1)
    return read(history), out


def test_it_learns_and_the_threshold_adapts(whole: tuple[Run, str]) -> None:
    alone, out = whole
    before, after = held_out(out)
    assert 9.5 < before < 11.5  # a head that knows nothing: ln(30522) = 10.3
    assert after < before - 2
    assert alone.loss[-1] < alone.loss[0] - 2
    assert len(set(alone.threshold.tolist())) == STEPS  # another one in each step
    assert 0 < alone.clip_rate < 1


def test_two_ranks_one_rank_two_ranks(whole: tuple[Run, str], folder: Path) -> None:
    """In three parts, each from the checkpoint of the one before: the run that was not interrupted."""
    history, options = folder / "run.jsonl", ("--checkpoints", str(folder / "checkpoints"))
    first = run(history, *options, "--stop-after", "2", ranks=2)
    second = run(history, *options, "--stop-after", "4", ranks=1)
    third = run(history, *options, ranks=2)

    assert "resumed" not in first
    assert "resumed after step 2 on 1 ranks" in second
    assert "resumed after step 4 on 2 ranks" in third
    np.testing.assert_allclose(sequence(read(history)), sequence(whole[0]), rtol=2e-4)
    assert held_out(first)[1] == pytest.approx(held_out(second)[0], abs=2e-4)
    assert held_out(third)[1] == pytest.approx(held_out(whole[1])[1], abs=2e-3)
    assert [c.name for c in (folder / "checkpoints").iterdir()] == ["step-000006"]


def test_fsdp1_two_ranks_one_rank(whole: tuple[Run, str], folder: Path) -> None:
    history, options = folder / "run.jsonl", ("--fsdp", "1", "--checkpoints", str(folder / "checkpoints"))
    run(history, *options, "--stop-after", "3", ranks=2)
    out = run(history, *options, ranks=1)
    assert "resumed after step 3 on 1 ranks" in out
    np.testing.assert_allclose(sequence(read(history)), sequence(whole[0]), rtol=2e-4)
    assert held_out(out)[1] == pytest.approx(held_out(whole[1])[1], abs=2e-3)


def test_bfloat16_is_close(whole: tuple[Run, str], folder: Path) -> None:
    history = folder / "run.jsonl"
    before, after = held_out(run(history, ranks=2, dtype="bfloat16"))
    assert after < before - 2
    rounded, exact = sequence(read(history)), sequence(whole[0])
    np.testing.assert_allclose(rounded, exact, rtol=2e-2)
    assert not np.allclose(rounded, exact, rtol=2e-5)  # it was another precision


def tiny_causal_model(folder: Path) -> None:
    """A Llama of two layers that reads bytes, and a tokenizer without a mask."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet), **sizes)).save_pretrained(folder)


def test_another_model_four_ranks_two_ranks(folder: Path) -> None:
    tiny_causal_model(folder / "model")
    model = ("--model", str(folder / "model"), "--lr", "0.01")
    run(folder / "whole.jsonl", *model, ranks=2)
    checkpoints = ("--checkpoints", str(folder / "checkpoints"))
    before, _ = held_out(run(folder / "run.jsonl", *model, *checkpoints, "--stop-after", "3", ranks=4))
    out = run(folder / "run.jsonl", *model, *checkpoints, ranks=2)
    assert "resumed after step 3 on 2 ranks" in out
    np.testing.assert_allclose(
        sequence(read(folder / "run.jsonl")), sequence(read(folder / "whole.jsonl")), rtol=2e-4
    )
    assert held_out(out)[1] < before - 0.5  # from ln(256) = 5.5
