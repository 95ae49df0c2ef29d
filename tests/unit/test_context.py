"""Ranks that compute a row together find what one computes alone: values and gradients."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import convolutional, shared_keys
from ranks import on_ranks
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlvr.attention import PACKED_SDPA, packed_sdpa, share
from rlvr.batch import Prompt, Rollout, Sequences
from rlvr.context import ContextGroup
from rlvr.errors import ConfigError
from rlvr.policy import TINY, Policy
from rlvr.strategies import BACKENDS

LENGTHS = [3, 1, 8, 5, 1]  # of 18 tokens, so that chunks begin within sequences
ROWS = [(5, 7), (2, 3), (4, 1), (1, 9), (6, 2)]
"""Prompt and response tokens."""


class Layer(nn.Module):
    """What an attention layer tells its attention."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


def attends_as_one(context: ContextGroup, heads: int, key_heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    width = sum(LENGTHS) // context.size
    mine = slice(context.rank * width, (context.rank + 1) * width)
    # Values of another size than keys, as in latent attention.
    shapes = ((heads, 4), (key_heads, 4), (key_heads, 6))
    whole = [
        torch.randn(1, n, sum(LENGTHS), size, dtype=torch.float64, requires_grad=True) for n, size in shapes
    ]
    slope = torch.randn(1, sum(LENGTHS), heads, 6, dtype=torch.float64)
    how = {"sequence_lengths": LENGTHS, "sliding_window": window}
    expected, _ = packed_sdpa(Layer(heads // key_heads), *whole, None, **how)
    (expected * slope).sum().backward()
    chunks = [part.detach()[:, :, mine].requires_grad_() for part in whole]
    layer = Layer(heads // key_heads)
    found, _ = AttentionInterface()[PACKED_SDPA](layer, *chunks, None, context=context, **how)
    (found * slope[:, mine]).sum().backward()
    torch.testing.assert_close(found, expected[:, mine], rtol=1e-12, atol=1e-12)
    for chunk, part in zip(chunks, whole, strict=True):
        torch.testing.assert_close(chunk.grad, part.grad[:, :, mine], rtol=1e-12, atol=1e-12)
    assert layer.num_key_value_groups == heads // key_heads


@pytest.mark.parametrize(
    ("ranks", "heads", "key_heads", "window"),
    [
        pytest.param(2, 4, 4, None, id="a key head each"),
        pytest.param(2, 8, 2, None, id="keys shared by query heads"),
        pytest.param(2, 4, 1, 4, id="one key head, repeated, and a window"),
        pytest.param(3, 12, 2, None, id="key heads that do not go round"),
    ],
)
def test_attention_is_that_of_one_rank(
    tmp_path: Path, ranks: int, heads: int, key_heads: int, window: int | None
) -> None:
    on_ranks(tmp_path, ranks, attends_as_one, heads, key_heads, window)


def sequences_of(rows: list[int]) -> Sequences:
    def tokens(row: int, size: int) -> tuple[int, ...]:
        return tuple((7 * row + 5 * i + 3) % 41 for i in range(size))

    rollouts = []
    for row in rows:
        prompt, response = (tokens(row, size) for size in ROWS[row])
        rollouts.append(Rollout(Prompt(row, str(row), "", "", token_ids=prompt), 0, response, (), "stop", ""))
    if rollouts:
        return Sequences.of(rollouts, pad_id=0)
    return sequences_of([0]).rows(slice(0, 0))


def loss_of(policy: Policy, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [2, N], and gradients, of a sum in which every token of every row differs."""
    policy.zero_grad()
    sequences = sequences_of(rows)
    stats = policy.logprobs(sequences)
    slopes = [torch.linspace(1, 2, ROWS[row][1], dtype=torch.float64) * (row + 1) for row in rows]
    values = torch.stack([stats.logprobs, stats.entropy])
    (values.sum(dim=0) * torch.cat([*slopes, torch.zeros(0)])).sum().backward()
    return values.detach(), nn.utils.parameters_to_vector([each.grad for each in policy.parameters()])


def is_one_policy(context: ContextGroup, path: str) -> None:
    policy = Policy(path, dtype="float64")
    widths: list[int] = []
    policy.model.get_decoder().layers[0].register_forward_pre_hook(
        lambda _, inputs: widths.append(inputs[0].shape[1])
    )
    for split in ([[0, 1], [2, 3, 4]], [[], [3, 0, 1]], [[2], []], [[], []]):
        policy.context = None
        everything = [row for rows in split for row in rows]
        expected, whole = loss_of(policy, everything)
        policy.context = context
        widths.clear()
        found, gradient = loss_of(policy, split[context.rank])
        dist.all_reduce(gradient)
        theirs = expected.split([sum(ROWS[row][1] for row in rows) for rows in split], dim=1)
        torch.testing.assert_close(found, theirs[context.rank], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, whole, rtol=1e-10, atol=1e-10)
        tokens = sum(sum(ROWS[row]) for row in everything)
        assert widths == [max(-(-tokens // 2), 1)], "a layer sees this rank's chunk alone"
    policy.check(torch.device("cpu"))
    assert policy.packing


def test_log_probs_and_gradients_are_those_of_one_rank(tmp_path: Path) -> None:
    """Of rows that belong to both ranks, to one, and to none."""
    path = shared_keys(tmp_path / "model")
    on_ranks(tmp_path, 2, is_one_policy, path)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rotary_frequencies_that_follow_the_row_are_refused(tmp_path: Path, rope: str) -> None:
    """Of a chunk a rank would take those of a shorter one."""
    config = AutoConfig.from_pretrained(TINY)
    factors = (
        {"factor": 2.0} if rope == "dynamic" else {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    )
    config.rope_parameters = {"rope_theta": 1e4, "rope_type": rope, **factors}
    config.original_max_position_embeddings = 32
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path)
    policy = Policy(str(tmp_path), deferred=True)
    with pytest.raises(
        ConfigError, match=r"context_parallel_size=3 beside .*: expected rotary frequencies that"
    ):
        policy.check_sharing(3, 3)
    Policy(deferred=True).check_sharing(3, 3)


def refuses(context: ContextGroup, path: str) -> None:
    policy = Policy(path)
    policy.context = context
    with pytest.raises(
        ConfigError, match="context_parallel_size=2 beside .*: expected a model whose tokens meet in"
    ):
        policy.check(torch.device("cpu"))


def test_a_model_that_carries_a_state_along_is_refused(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, refuses, convolutional(tmp_path / "model"))


def is_one_policy_on_gpus(context: ContextGroup, path: str) -> None:
    device = torch.device("cuda", context.rank)
    torch.cuda.set_device(device)
    share("flash_attention_2")
    policy = Policy(path, attention="flash_attention_2").to(device)
    assert policy.packing
    split = [[0, 1], [2, 3, 4]]
    with torch.autocast("cuda", dtype=torch.bfloat16), torch.no_grad():
        alone = policy.logprobs(sequences_of(split[context.rank]).to(device)).logprobs
        policy.context = context
        together = policy.logprobs(sequences_of(split[context.rank]).to(device)).logprobs
        nobodys = policy.logprobs(sequences_of([]).to(device)).logprobs
    torch.testing.assert_close(together, alone, atol=0.05, rtol=0.02)
    assert len(nobodys) == 0


@pytest.mark.gpu
def test_flash_attention_over_two_gpus_is_that_of_one(tmp_path: Path) -> None:
    pytest.importorskip("flash_attn")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    path = shared_keys(tmp_path / "model")
    on_ranks(tmp_path, 2, is_one_policy_on_gpus, path, backend=BACKENDS["cuda"])
