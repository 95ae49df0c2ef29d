"""Make the embedded base policy: a quarter of a million parameters, the letters task half learnt.

    python experiments/tiny_policy/make.py            # writes src/rlvr/assets/tiny, about two minutes on one
    core python experiments/tiny_policy/make.py --measure  # prints what README.md beside this file reports

Demonstrations are right in a third of the cases; the others break one of the three rules. So the policy knows
the form, is right often enough to be rewarded, and spreads over many answers, right and wrong.
"""

import argparse
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlvr.keyed import generator
from rlvr.tasks.letters import LEVELS

OUT = Path(__file__).parents[2] / "src" / "rlvr" / "assets" / "tiny"
SPECIAL = ["<pad>", "<bos>", "<eos>"]
ALPHABET = [*ascii_lowercase, *"0123456789", ":", ">"]
RIGHT = 0.35
STEPS, BATCH, LEARNING_RATE = 1500, 192, 3e-3


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *ALPHABET])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def model() -> LlamaForCausalLM:
    """Two layers, three heads of 32."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SPECIAL) + len(ALPHABET),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=32,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def demonstration(random: np.random.Generator) -> tuple[str, str]:
    """A prompt and a response, right with probability RIGHT."""
    level = LEVELS[random.integers(len(LEVELS))]
    letters = list(random.permutation(list(ascii_lowercase))[: level.given])
    answer = sorted(random.permutation(letters)[: level.asked])
    if random.random() >= RIGHT:
        kind = random.integers(3)
        place = int(random.integers(level.asked - 1))
        if kind == 0:  # out of order
            answer[place], answer[place + 1] = answer[place + 1], answer[place]
        elif kind == 1:  # a letter that was not given
            answer[place] = random.choice(sorted(set(ascii_lowercase) - set(letters)))
        elif random.random() < 0.5:  # too few
            del answer[place]
        else:  # too many
            answer.insert(place, random.choice(sorted(letters)))
    return f"{level.asked}:{''.join(letters)}>", "".join(answer)


def batch(step: int, characters: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, L], padded on the right, and labels, -100 outside the response."""
    random = generator(0, "demonstrations", step)
    pairs = [demonstration(random) for _ in range(BATCH)]
    rows = [(characters.encode(prompt), [*characters.encode(answer), 2]) for prompt, answer in pairs]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens, labels = torch.zeros(BATCH, length, dtype=torch.long), torch.full((BATCH, length), -100)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return tokens, labels


def pretrain() -> None:
    torch.set_num_threads(1)
    characters, network = tokenizer(), model()
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        tokens, labels = batch(step, characters)
        logits = network(input_ids=tokens).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{STEPS}  loss {loss.item():.3f} nats a token", flush=True)
    network.save_pretrained(OUT)
    characters.save_pretrained(OUT)


def measure() -> None:
    """The base policy on the held-out prompts: 32 samples each at temperature 1."""
    from rlvr.batch import Sequences
    from rlvr.engines import SamplingParams
    from rlvr.engines.transformers import TransformersEngine
    from rlvr.metrics import pass_at_k
    from rlvr.policy import Policy
    from rlvr.tasks.letters import LettersTask, LettersVerifier

    torch.set_num_threads(1)
    policy, verifier = Policy(), LettersVerifier()
    engine = TransformersEngine(policy)
    prompts = [
        type(p)(**{**vars(p), "token_ids": tuple(policy.tokenizer.encode(p.text))})
        for p in LettersTask().heldout()
    ]
    rollouts = list(
        engine.generate(prompts, SamplingParams(samples=32, max_new_tokens=10, purpose="measure"))
    )
    verdicts = {(r.prompt.index, r.sample): verifier(r.prompt, r.text) for r in rollouts}
    right = [[verdicts[p.index, i] for i in range(32)] for p in prompts]
    with torch.no_grad():
        stats = policy.logprobs(Sequences.of(rollouts, policy.pad_id))
    probs = stats.logprobs.exp()
    correct = torch.tensor([[v.correct for v in row] for row in right])
    distinct = [len({v.answer for v in row if v.correct}) for row in right]
    print(f"parameters          {sum(p.numel() for p in policy.parameters()):,}")
    print(f"mean@8              {correct[:, :8].double().mean():.3f}")
    print(f"mean@32             {correct.double().mean():.3f}")
    print(f"pass@32             {np.mean([pass_at_k(32, int(c), 32) for c in correct.sum(dim=1)]):.3f}")
    print(f"distinct right      {np.mean(distinct):.1f} of 32 samples a prompt")
    print(f"entropy             {stats.entropy.mean():.3f} nats a token")
    print(f"tokens p > 0.7      {(probs > 0.7).double().mean():.1%}")
    print(f"tokens p <= 0.3     {(probs <= 0.3).double().mean():.1%}")
    for level in range(1, len(LEVELS) + 1):
        rows = [i for i, p in enumerate(prompts) if p.meta["level"] == level]
        print(f"level {level}             mean@32 {correct[rows].double().mean():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make or measure the embedded base policy.")
    parser.add_argument("--measure", action="store_true", help="measure the policy that is there")
    if parser.parse_args().measure:
        measure()
    else:
        pretrain()
        measure()
