"""The policy: what it reads off a causal language model, and which models it refuses."""

from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase, digits

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from rlvr.batch import Prompt, Rollout, Sequences
from rlvr.errors import ConfigError
from rlvr.logprobs import TokenStats
from rlvr.policy import TINY, Policy

ROWS = [("2:az>", "az"), ("3:qbzkmt>", "bkm"), ("6:bpaxyvcutqjn>", "abcjnp"), ("4:lajgnphv>", "a")]
"""Prompts of several lengths, and responses of several lengths."""


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy()


def rollouts_of(policy: Policy, rows: list[tuple[str, str]] = ROWS) -> list[Rollout]:
    def encode(text: str) -> tuple[int, ...]:
        return tuple(policy.tokenizer.encode(text, add_special_tokens=False))

    return [
        Rollout(Prompt(i, str(i), text, "", token_ids=encode(text)), 0, encode(response), (), "length", "")
        for i, (text, response) in enumerate(rows)
    ]


def oracle(policy: Policy, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of one response, unpadded, from the whole logits of a float64 model."""
    model = AutoModelForCausalLM.from_pretrained(policy.path, dtype=torch.float64)
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
    logprobs = (logits / temperature).log_softmax(dim=-1)
    chosen = logprobs[range(len(rollout.token_ids)), list(rollout.token_ids)]
    return chosen, -(logprobs.exp() * logprobs).sum(dim=-1)


@pytest.mark.parametrize(
    ("temperature", "chunk_size"),
    [
        pytest.param(1.0, 128, id="temperature 1"),
        pytest.param(0.6, 128, id="temperature 0.6"),
        pytest.param(1.0, 5, id="chunks that do not divide the tokens"),
        pytest.param(1.0, 1, id="a token a chunk"),
        pytest.param(1.0, 4096, id="chunks larger than the batch"),
    ],
)
def test_logprobs_and_entropy_are_those_of_the_whole_logits(temperature: float, chunk_size: int) -> None:
    """All rows in one batch, padded on both sides, against every row alone."""
    policy = Policy(chunk_size=chunk_size)
    rollouts = rollouts_of(policy)
    with torch.no_grad():
        stats = policy.logprobs(Sequences.of(rollouts, policy.pad_id), temperature=temperature)
    expected = [oracle(policy, rollout, temperature) for rollout in rollouts]
    torch.testing.assert_close(
        stats.logprobs.double(), torch.cat([row[0] for row in expected]), atol=2e-5, rtol=0
    )
    torch.testing.assert_close(
        stats.entropy.double(), torch.cat([row[1] for row in expected]), atol=2e-5, rtol=0
    )


def test_gradient_is_that_of_the_whole_logits(policy: Policy) -> None:
    rollout = rollouts_of(policy)[2]
    policy.zero_grad()
    policy.logprobs(Sequences.of([rollout], policy.pad_id)).logprobs.sum().backward()
    model = AutoModelForCausalLM.from_pretrained(policy.path, dtype=torch.float64)
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
    logits = model(input_ids=ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
    logits.log_softmax(dim=-1)[range(len(rollout.token_ids)), list(rollout.token_ids)].sum().backward()
    theirs = dict(model.named_parameters())
    for name, parameter in policy.model.named_parameters():
        expected = theirs[name].grad
        gap = (parameter.grad.double() - expected).abs().max()
        assert gap <= 1e-4 * max(expected.abs().max(), 1.0), name
    policy.zero_grad()


def test_the_order_of_rows_changes_nothing(policy: Policy) -> None:
    rollouts = rollouts_of(policy)
    sequences = Sequences.of(rollouts, policy.pad_id)
    turned = Sequences.of(rollouts[::-1], policy.pad_id)
    with torch.no_grad():
        straight = policy.logprobs(sequences).logprobs.split(sequences.loss_mask.sum(dim=1).tolist())
        back = policy.logprobs(turned).logprobs.split(turned.loss_mask.sum(dim=1).tolist())
    torch.testing.assert_close(torch.cat(straight), torch.cat(back[::-1]), atol=1e-5, rtol=0)


def test_padding_and_what_stands_in_it_change_nothing(policy: Policy) -> None:
    sequences = Sequences.of(rollouts_of(policy), policy.pad_id)
    filled = Sequences(
        sequences.input_ids.where(sequences.attention_mask, 7), sequences.attention_mask, sequences.loss_mask
    )
    with torch.no_grad():
        together, other = policy.logprobs(sequences), policy.logprobs(filled)
        alone = [policy.logprobs(sequences.rows(slice(i, i + 1))).logprobs for i in range(len(ROWS))]
    assert torch.equal(together.logprobs, other.logprobs)
    torch.testing.assert_close(torch.cat(alone), together.logprobs, atol=1e-5, rtol=0)


# Packing
# --------------------------------------------------------------------------------------------------------


def double(policy: Policy) -> Policy:
    return policy.to(torch.float64)


def stats_and_gradients(policy: Policy, sequences: Sequences) -> tuple[TokenStats, list[Tensor]]:
    policy.zero_grad()
    stats = policy.logprobs(sequences, temperature=0.7)
    (stats.logprobs * torch.linspace(-1, 1, len(stats.logprobs)) + 0.1 * stats.entropy).sum().backward()
    return stats, [parameter.grad for parameter in policy.parameters()]


def windowed(folder: Path, window: int) -> str:
    config = MistralConfig(
        vocab_size=41,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=window,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("window", [None, 4], ids=["whole", "sliding window"])
def test_packed_sequences_give_what_padded_ones_give(window: int | None, tmp_path: Path) -> None:
    path = None if window is None else windowed(tmp_path, window)
    packed, padded = double(Policy(path)), double(Policy(path, packing=False))
    assert packed.packing
    assert not padded.packing
    sequences = Sequences.of(rollouts_of(packed), packed.pad_id)
    ours, gradients = stats_and_gradients(packed, sequences)
    theirs, expected = stats_and_gradients(padded, sequences)
    for name, one, other in zip(TokenStats._fields, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=name)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
    assert packed.padding(sequences) == (0, sequences.attention_mask.sum())
    assert padded.padding(sequences) == ((~sequences.attention_mask).sum(), sequences.attention_mask.numel())


@pytest.mark.parametrize("packing", [None, False], ids=["packed", "padded"])
def test_no_sequence_sees_another(packing: bool | None) -> None:
    """Bit for bit: other tokens in one row leave every other row's log-probs as they were."""
    policy = Policy(packing=packing)
    sequences = Sequences.of(rollouts_of(policy), policy.pad_id)
    rows = torch.arange(len(ROWS))[:, None].expand_as(sequences.loss_mask)[sequences.loss_mask]
    with torch.no_grad():
        before = policy.logprobs(sequences)
        for row in range(len(ROWS)):
            ids = sequences.input_ids.clone()
            ids[row] = (ids[row] + 1) % 41
            after = policy.logprobs(replace(sequences, input_ids=ids))
            for one, other in zip(before, after, strict=True):
                assert torch.equal(one[rows != row], other[rows != row])
                assert not torch.isclose(one[rows == row], other[rows == row]).all()


@pytest.mark.parametrize("packing", [None, False], ids=["packed", "padded"])
def test_no_rows_give_no_values_and_gradients_of_zero(packing: bool | None) -> None:
    policy = Policy(packing=packing)
    empty = Sequences.of(rollouts_of(policy), policy.pad_id).rows(torch.tensor([], dtype=torch.long))
    stats = policy.logprobs(empty)
    assert [len(values) for values in stats] == [0] * 4
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())
    assert policy.padding(empty) == (0, 0)


def test_generation_under_packed_attention_is_sdpa_s() -> None:
    """The engine's attention is the same module's, with a cache and padding on the left."""
    ids = torch.tensor([[0, 0, 5, 9, 7], [11, 12, 13, 14, 15]])
    with torch.no_grad():
        ours, theirs = (
            policy.model.generate(
                input_ids=ids,
                attention_mask=(ids > 0).long(),
                max_new_tokens=6,
                do_sample=False,
                use_cache=True,
            )
            for policy in (Policy(), Policy(packing=False))
        )
    assert torch.equal(ours, theirs)


def convolutional(folder: Path) -> str:
    """A model with layers that mix neighbouring tokens, whatever sequence they are of."""
    config = Lfm2Config(
        vocab_size=41,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Lfm2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # of the size of trained ones
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return str(folder)


def test_a_model_that_carries_a_state_along_is_padded(tmp_path: Path) -> None:
    path = convolutional(tmp_path)
    assert not Policy(path).packing
    with pytest.raises(
        ConfigError, match=f"policy.packing=true beside policy.path={path}: expected a model whose"
    ):
        Policy(path, packing=True)


def test_eager_attention_is_padded() -> None:
    assert not Policy(attention="eager").packing
    with pytest.raises(ConfigError, match="policy.packing=true beside policy.attention=eager"):
        Policy(attention="eager", packing=True)


@pytest.mark.gpu
def test_flash_attention_packs_what_sdpa_pads(tmp_path: Path) -> None:
    pytest.importorskip("flash_attn")
    config = MistralConfig(
        vocab_size=41,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path)
    device = torch.device("cuda")
    flash = Policy(str(tmp_path), attention="flash_attention_2").to(device)
    padded = Policy(str(tmp_path), packing=False).to(device)
    assert flash.packing
    sequences = Sequences.of(rollouts_of(flash), flash.pad_id).to(device)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours, theirs = flash.logprobs(sequences), padded.logprobs(sequences)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=0.05, rtol=0.02)
    rows = torch.arange(len(ROWS), device=device)[:, None].expand_as(sequences.loss_mask)[sequences.loss_mask]
    ids = sequences.input_ids.clone()
    ids[1] = (ids[1] + 1) % 41
    with torch.autocast("cuda", dtype=torch.bfloat16):
        after = flash.logprobs(replace(sequences, input_ids=ids))
    assert torch.equal(after.logprobs[rows != 1], ours.logprobs[rows != 1])
    ours.logprobs.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in flash.parameters())


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = Policy(activation_checkpointing=checkpointing)
        assert policy.model.is_gradient_checkpointing == checkpointing
        stats = policy.logprobs(Sequences.of(rollouts_of(policy), policy.pad_id))
        (stats.logprobs.sum() + 0.1 * stats.entropy.sum()).backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-5, rtol=1e-5)


def test_bf16_weights_give_nearly_the_same_in_float32(policy: Policy) -> None:
    half = Policy(dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    sequences = Sequences.of(rollouts_of(policy), policy.pad_id)
    with torch.no_grad():
        ours, theirs = policy.logprobs(sequences), half.logprobs(sequences)
    assert theirs.logprobs.dtype == torch.float32
    torch.testing.assert_close(theirs.logprobs, ours.logprobs, atol=0.15, rtol=0.05)


def test_no_dropout_is_left(tmp_path: Path) -> None:
    """Old and new log-probs must come from one function of the weights."""
    policy = Policy()
    policy.model.config.attention_dropout = 0.5
    policy.save(tmp_path)
    noisy = Policy(str(tmp_path))
    sequences = Sequences.of(rollouts_of(noisy), noisy.pad_id)
    assert noisy.model.training
    with torch.no_grad():
        assert torch.equal(noisy.logprobs(sequences).logprobs, noisy.logprobs(sequences).logprobs)


# Weights and files
# --------------------------------------------------------------------------------------------------------


def test_a_saved_policy_loads_anywhere_with_the_same_logits(tmp_path: Path) -> None:
    policy = Policy()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    policy.save(tmp_path)
    ids = torch.tensor([policy.tokenizer.encode("3:qbzkmt>bkm")])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = policy.model(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        assert torch.equal(Policy(str(tmp_path)).model(input_ids=ids).logits, expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("3:qbzkmt>bkm") == ids[0].tolist()
    assert Policy(str(tmp_path)).stop_ids == policy.stop_ids


def test_named_weights_are_every_parameter_once_and_detached(policy: Policy) -> None:
    weights = dict(policy.named_weights())
    assert len(weights) == len(list(policy.named_weights()))
    assert set(weights) == {name for name, _ in policy.model.named_parameters()}
    assert not any(tensor.requires_grad for tensor in weights.values())
    assert sum(t.numel() for t in weights.values()) == sum(p.numel() for p in policy.parameters())


def test_source_is_none_for_the_embedded_policy_and_whole_for_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands in checkpoints, which are read elsewhere."""
    Policy().save(tmp_path / "policy")
    monkeypatch.chdir(tmp_path)
    assert Policy().source is None
    assert Policy("policy").source == str((tmp_path / "policy").resolve())


def test_the_embedded_policy_is_small() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 5 * 2**20


def test_the_embedded_tokenizer_keeps_its_alphabet(policy: Policy) -> None:
    text = ascii_lowercase + digits + ":>"
    ids = policy.tokenizer.encode(text, add_special_tokens=False)
    assert policy.tokenizer.decode(ids) == text
    assert len(set(ids)) == len(ids) == len(text)
    assert policy.pad_id not in (*policy.stop_ids, *ids)
    assert policy.stop_ids == (policy.tokenizer.eos_token_id,)


# Refused
# --------------------------------------------------------------------------------------------------------


def gemma(folder: Path, cap: float | None) -> str:
    config = Gemma2Config(
        vocab_size=41,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=cap,
        attn_implementation="eager",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(50)  # logits of some size, as a trained model has
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return str(folder)


def test_capped_logits_are_refused_in_one_line(tmp_path: Path) -> None:
    path = gemma(tmp_path, cap=1.0)
    with pytest.raises(ConfigError, match=f"policy.path={path}: expected logits = hidden states x") as caught:
        Policy(path, attention="eager")
    assert "capped" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_model_without_a_cap_is_taken(tmp_path: Path) -> None:
    assert Policy(gemma(tmp_path, cap=None), attention="eager").pad_id == 0


def spoilt(folder: Path, name: str) -> str:
    Policy().save(folder)
    (folder / name).write_text("{")
    return str(folder)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/nowhere/policy", id="a whole path"),
        pytest.param("./nowhere", id="a relative path"),
        pytest.param("nowhere.gguf", id="a .gguf file"),
    ],
)
def test_what_is_not_there_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=f"policy.path={path}: expected an existing folder or file"):
        Policy(path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=f"policy.path={tmp_path}: expected a causal language model"
    ) as said:
        Policy(str(tmp_path))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_with_a_spoilt_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"policy.path={tmp_path}: expected a causal language model"):
        Policy(spoilt(tmp_path, name))


@pytest.mark.parametrize("dtype", ["float16", "fp32", "int8"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"policy.dtype={dtype}: expected float32, bfloat16 or float64"):
        Policy(dtype=dtype)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """One with tokens beyond the model's embedding; the reverse, a padded embedding, is common and fine."""
    policy = Policy()
    policy.tokenizer.add_tokens(["<more>", "<still more>"])
    policy.save(tmp_path)
    with pytest.raises(ConfigError, match="its token 42 exceeds the vocabulary of 41"):
        Policy(str(tmp_path))
