"""The stream of rollout batches: prompts, sync, rollouts, verdicts, log-probs, advantages, mini-batches."""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from rlvr.advantages import zero_variance
from rlvr.batch import Batch, Evaluation, IterationFacts, Prompt, Rollout, Sequences, Verdict
from rlvr.engines import RolloutEngine, SamplingParams
from rlvr.errors import ConfigError
from rlvr.keyed import generator
from rlvr.losses import Totals
from rlvr.module import RLVRModule
from rlvr.policy import Policy
from rlvr.settings import DataConfig, EvaluationConfig
from rlvr.tasks import Task
from rlvr.verifiers import Verifier

SYNC_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest gap of the probe's log-probs between engine and trainer, nats."""


class RolloutDataModule(LightningDataModule):
    """Generates the training batches of every iteration, and judged samples of the held-out prompts.

    Args:
        task: prompts and answers.
        engine: who generates.
        verifier: who judges.
        config: sizes and sampling.
        evaluation: of held-out prompts.
        seed: keys every draw.

    Attributes:
        rollouts: this iteration's responses with their verdicts, in prompt order; callbacks may read them.
    """

    def __init__(
        self,
        task: Task,
        engine: RolloutEngine,
        verifier: Verifier,
        config: DataConfig,
        evaluation: EvaluationConfig,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.task, self.engine, self.verifier = task, engine, verifier
        self.config, self.evaluation, self.seed = config, evaluation, seed
        self.rollouts: list[tuple[Rollout, Verdict]] = []
        self._train: list[Prompt] = []
        self._heldout: list[Prompt] = []
        self._complained = False

    @property
    def fitting(self) -> Trainer:
        """The trainer at work."""
        assert self.trainer is not None
        return self.trainer

    @property
    def module(self) -> RLVRModule:
        """The module being trained."""
        module = self.fitting.lightning_module
        assert isinstance(module, RLVRModule)
        return module

    def setup(self, stage: str) -> None:
        """Encode the prompts, once."""
        if self._heldout:
            return
        policy = self.module.policy
        self._heldout = self._encode(self.task.heldout()[: self.evaluation.num_prompts], policy, "held-out")
        self._train = self._encode(self.task.train(), policy, "training")
        if len(self._train) < self.config.num_prompts:
            raise ConfigError(
                f"data.num_prompts={self.config.num_prompts}",
                f"at most the task's {len(self._train)} training prompts",
                f"data.num_prompts={max(len(self._train), 1)}",
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """One iteration's mini-batches, made while they are asked for."""
        return DataLoader(_TrainStream(self), batch_size=None, num_workers=0)

    def val_dataloader(self) -> DataLoader[Evaluation]:
        """The held-out prompts, generated and judged."""
        return DataLoader(_HeldoutStream(self), batch_size=None, num_workers=0)

    def teardown(self, stage: str) -> None:
        """Keep the engine: fit and validate follow each other; the entry point closes it."""

    def _encode(self, prompts: Sequence[Prompt], policy: Policy, split: str) -> list[Prompt]:
        encoded = [
            replace(prompt, token_ids=_token_ids(prompt, policy, self.task.chat)) for prompt in prompts
        ]
        fits = [prompt for prompt in encoded if 0 < len(prompt.token_ids) <= self.config.max_prompt_tokens]
        if dropped := len(encoded) - len(fits):
            print(
                f"left out {dropped} of {len(encoded)} {split} prompts: empty, or longer than "
                f"data.max_prompt_tokens={self.config.max_prompt_tokens}",
                file=sys.stderr,
            )
        longest = max((len(prompt.token_ids) for prompt in fits), default=0) + self.config.max_new_tokens
        if longest > policy.max_length:
            raise ConfigError(
                f"data.max_new_tokens={self.config.max_new_tokens}",
                f"prompt and response within the policy's {policy.max_length} tokens (they reach {longest})",
                f"data.max_new_tokens={max(self.config.max_new_tokens - longest + policy.max_length, 1)}",
            )
        if not fits:
            raise ConfigError(
                f"task: no {split} prompt", "at least one that fits", "data.max_prompt_tokens=1024"
            )
        return fits

    # One iteration
    # ------------------------------------------------------------------------------------------------

    def iteration(self, k: int) -> Iterator[Batch]:
        """Yield the mini-batches of iteration ``k``."""
        prompts = self._prompts(k)
        self.sync()
        sampling = SamplingParams(
            samples=self.config.group_size,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            top_k=self.config.top_k,
            seed=self.seed,
            purpose="train",
            iteration=k,
        )
        self.rollouts = self._judged(prompts, sampling)
        rewards = torch.tensor([verdict.reward for _, verdict in self.rollouts], dtype=torch.float64)
        rewards = rewards.view(len(prompts), self.config.group_size)
        sequences = Sequences.of([rollout for rollout, _ in self.rollouts], self.module.policy.pad_id)
        with self.timed("time/logprob_s"):
            old_logprobs, entropy = self._score(self.module.policy, sequences)
            reference = self.module.reference
            ref_logprobs = None if reference is None else self._score(reference, sequences)[0]
        self._log_rollouts(rewards, entropy)
        entropy_total, tokens, reward_total, count = self._sum(
            torch.stack(
                [
                    entropy.sum().cpu(),
                    torch.tensor(len(entropy)),
                    rewards.sum(),
                    torch.tensor(rewards.numel()),
                ]
            )
        ).tolist()
        whole = Batch(
            sequences=sequences,
            advantages=self.module.algorithm.advantages(rewards).flatten(),
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            totals=Totals(tokens=int(tokens), sequences=int(count)),
            micro_batch_size=self.config.micro_batch_size,
            facts=IterationFacts(
                iteration=k, entropy=entropy_total / tokens, reward_mean=reward_total / count
            ),
            keys=torch.tensor([(rollout.prompt.index, rollout.sample) for rollout, _ in self.rollouts]),
        )
        yield from self._minibatches(whole, k)

    def sync(self) -> None:
        """Hand the weights to the engine, and prove that it uses them.

        Raises:
            RuntimeError: where the engine's log-probs of a fixed sequence are not the trainer's.
        """
        policy = self.module.policy
        with self.timed("time/weight_sync_s"):
            self.engine.load_weights(policy.named_weights())
            vocabulary = policy.model.config.get_text_config().vocab_size
            probe = [(13 + 7919 * i) % vocabulary for i in range(16)]
            theirs = self.engine.score(probe)
            if theirs is None:
                return
            with torch.no_grad(), self._precision():
                ids = torch.tensor([probe])
                sequences = Sequences(
                    ids, torch.ones_like(ids, dtype=torch.bool), torch.ones(1, 15, dtype=torch.bool)
                )
                ours = policy.logprobs(sequences.to(self.module.device)).logprobs.cpu()
        gap = (ours - torch.tensor(theirs)).abs().max().item()
        mixed = "bf16" in str(self.fitting.precision)
        tolerance = SYNC_TOLERANCE[torch.bfloat16 if mixed else next(policy.parameters()).dtype]
        if not gap <= tolerance:
            raise RuntimeError(
                f"after the weight sync the engine's log-probs differ from the trainer's by {gap:.2g} nats, "
                f"expected at most {tolerance}: it generates with other weights"
            )

    def _prompts(self, k: int) -> list[Prompt]:
        """This rank's prompts of iteration ``k``: passes in keyed order, no prompt twice in an iteration."""
        per_pass = len(self._train) // self.config.num_prompts
        order = generator(self.seed, "order", k // per_pass).permutation(len(self._train))
        begin = k % per_pass * self.config.num_prompts
        chosen = order[begin : begin + self.config.num_prompts].tolist()
        return [self._train[i] for i in chosen[self.fitting.global_rank :: self.fitting.world_size]]

    def _judged(self, prompts: list[Prompt], sampling: SamplingParams) -> list[tuple[Rollout, Verdict]]:
        """Generate and judge, the one while the other goes on; in prompt and sample order."""
        place = {prompt.index: i for i, prompt in enumerate(prompts)}
        judged, verify_s, errors, begin = [], 0.0, 0, time.perf_counter()
        for rollout in self.engine.generate(prompts, sampling):
            started = time.perf_counter()
            verdict = self._verdict(rollout)
            verify_s += time.perf_counter() - started
            errors += verdict.reason.startswith("verifier error")
            judged.append((rollout, verdict))
        if judged and errors == len(judged):
            raise RuntimeError(f"the verifier failed on every response: {judged[0][1].reason}")
        ledger, purpose = self.module.ledger, "rollout" if sampling.purpose == "train" else "val"
        ledger.add("time/verify_s" if purpose == "rollout" else "time/heldout_verify_s", verify_s)
        ledger.add(
            "time/rollout_s" if purpose == "rollout" else "time/heldout_s",
            time.perf_counter() - begin - verify_s,
        )
        ledger.add(
            f"{purpose}/verifier_errors", errors / self.fitting.world_size, 1 / self.fitting.world_size
        )
        return sorted(judged, key=lambda pair: (place[pair[0].prompt.index], pair[0].sample))

    def _verdict(self, rollout: Rollout) -> Verdict:
        """Judge one response; what the verifier cannot take is reported and gets no reward."""
        try:
            verdict = self.verifier(rollout.prompt, rollout.text)
            if math.isfinite(verdict.reward):
                return verdict
            problem = f"reward {verdict.reward}"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if not self._complained:
            self._complained = True
            print(
                f"verifier error on prompt {rollout.prompt.id}, response {rollout.text[:80]!r}: {problem} "
                "(reward 0; further ones are counted in rollout/verifier_errors)",
                file=sys.stderr,
            )
        return Verdict(reward=0.0, correct=False, answer=None, reason=f"verifier error: {problem}")

    @torch.no_grad()
    def _score(self, policy: Policy, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Log-probs [B, T] of the responses, 0 outside the mask, and entropies [N], under ``policy``."""
        device = self.module.device
        logprobs = torch.zeros(sequences.loss_mask.shape)
        entropies = []
        for begin in range(0, len(logprobs), self.config.micro_batch_size):
            rows = slice(begin, begin + self.config.micro_batch_size)
            micro = sequences.rows(rows).to(device)
            with self._precision():
                stats = policy.logprobs(micro, temperature=self.config.temperature)
            logprobs[rows][sequences.loss_mask[rows]] = stats.logprobs.float().cpu()
            entropies.append(stats.entropy.float().cpu())
        return logprobs, torch.cat(entropies)

    def _minibatches(self, whole: Batch, k: int) -> Iterator[Batch]:
        """Split by rows into optimizer mini-batches, prompts in a keyed order, a new one every epoch."""
        group, ranks = self.config.group_size, self.fitting.world_size
        prompts = len(whole.advantages) // group
        size = len(whole.advantages) // self.config.minibatches
        for epoch in range(self.config.epochs):
            key = (k, epoch, self.fitting.global_rank)
            order = torch.from_numpy(generator(self.seed, "minibatches", *key).permutation(prompts))
            rows = (order[:, None] * group + torch.arange(group)).flatten()
            for begin in range(0, len(rows), size):
                batch = whole.rows(rows[begin : begin + size])
                tokens = self._sum(batch.loss_mask.sum())
                yield replace(batch, totals=Totals(tokens=int(tokens), sequences=size * ranks))

    def _log_rollouts(self, rewards: Tensor, entropy: Tensor) -> None:
        ledger = self.module.ledger
        rollouts = [rollout for rollout, _ in self.rollouts]
        correct = torch.tensor([verdict.correct for _, verdict in self.rollouts]).view_as(rewards)
        distinct = len({(rollout.prompt.index, rollout.token_ids) for rollout in rollouts})
        ledger.add("rollout/reward_mean", rewards.sum(), rewards.numel())
        ledger.add("rollout/pass_at_k", correct.any(dim=1).sum(), len(rewards))
        ledger.add("rollout/zero_variance_frac", zero_variance(rewards).sum(), len(rewards))
        ledger.add("rollout/length_mean", sum(len(rollout.token_ids) for rollout in rollouts), len(rollouts))
        ledger.add(
            "rollout/truncated_frac", sum(r.finish_reason == "length" for r in rollouts), len(rollouts)
        )
        ledger.add("rollout/distinct_frac", distinct, len(rollouts))
        ledger.add("rollout/entropy", entropy.sum(), len(entropy))

    # Held-out prompts
    # ---------------------------------------------------------------------------------------------

    def heldout(self) -> Iterator[Evaluation]:
        """Yield the judged samples of the held-out prompts; the same draws at every evaluation."""
        self.sync()
        sampling = SamplingParams(
            samples=self.evaluation.samples,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.evaluation.temperature,
            top_p=self.evaluation.top_p,
            seed=self.seed,
            purpose="heldout",
        )
        prompts = self._heldout[self.fitting.global_rank :: self.fitting.world_size]
        judged = self._judged(prompts, sampling)
        verdicts = [verdict for _, verdict in judged]
        groups = [verdicts[i : i + sampling.samples] for i in range(0, len(verdicts), sampling.samples)]
        yield Evaluation(
            name="heldout",
            correct=torch.tensor([[verdict.correct for verdict in group] for group in groups]),
            answers=[[verdict.answer for verdict in group] for group in groups],
        )

    # ----------------------------------------------------------------------------------------------------

    @contextmanager
    def timed(self, key: str) -> Iterator[None]:
        """Log the seconds that the body takes."""
        begin = time.perf_counter()
        yield
        self.module.ledger.add(key, time.perf_counter() - begin)

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks."""
        summed: Tensor = self.fitting.strategy.reduce(values.to(self.module.device), reduce_op="sum")
        return summed.cpu()

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """The trainer's arithmetic: old and new log-probs must not differ by it."""
        with self.fitting.precision_plugin.forward_context():
            yield


def _token_ids(prompt: Prompt, policy: Policy, chat: bool) -> tuple[int, ...]:
    tokenizer = policy.tokenizer
    if not chat:
        return tuple(tokenizer.encode(prompt.text))
    messages = [{"role": "user", "content": prompt.text}]
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


class _TrainStream(IterableDataset[Batch]):
    """Lazy and sized: unsized, Lightning would generate too early, and prefetch across a step."""

    def __init__(self, data: RolloutDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.config.updates

    def __iter__(self) -> Iterator[Batch]:
        yield from self.data.iteration(self.data.fitting.current_epoch)


class _HeldoutStream(IterableDataset[Evaluation]):
    """Sized and lazy for the same reason."""

    def __init__(self, data: RolloutDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Evaluation]:
        yield from self.data.heldout()
