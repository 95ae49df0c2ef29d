"""The stream of rollout batches: prompts, sync, rollouts, verdicts, log-probs, advantages, mini-batches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from rlvr import mismatch
from rlvr.advantages import overlong_penalty
from rlvr.batch import Batch, Evaluation, IterationFacts, Prompt, Rollout, Sequences, Verdict, join
from rlvr.benchmarks import Benchmark, heldout
from rlvr.engines import RolloutEngine
from rlvr.errors import ConfigError, RunError
from rlvr.generation import Generation
from rlvr.losses import Totals
from rlvr.minibatches import minibatch_rows
from rlvr.mismatch import Correction
from rlvr.module import RLVRModule
from rlvr.packing import shared_micro_batches
from rlvr.policy import Policy
from rlvr.prompts import encode
from rlvr.rollout_metrics import log_mismatch, log_rollouts, rewards_of
from rlvr.rollouts import JudgedRollouts, RolloutSource
from rlvr.settings import DataConfig, EvaluationConfig
from rlvr.strategies import summed
from rlvr.tasks import Task
from rlvr.verifiers import Verifier


class RolloutDataModule(LightningDataModule):
    """Generates the training batches of every iteration, and judged samples of held-out problems.

    Args:
        task: prompts and answers.
        engine: who generates.
        verifier: who judges.
        config: sizes and sampling.
        evaluation: of held-out problems and benchmarks.
        benchmarks: to score beside the task's held-out problems.
        correction: weights of the policy loss for the engine's distribution, see :mod:`rlvr.mismatch`.
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
        benchmarks: Sequence[Benchmark] = (),
        correction: Correction | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.benchmarks = [heldout(task, verifier), *benchmarks]
        self.task, self.engine = task, engine
        self.source = RolloutSource(engine, verifier)
        self.correction = correction
        self.config, self.evaluation, self.seed = config, evaluation, seed
        self.rollouts: list[tuple[Rollout, Verdict]] = []
        self._train: list[Prompt] = []
        self._evaluated: list[list[Prompt]] = []
        self._generation: Generation | None = None

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

    @property
    def generation(self) -> Generation:
        """Responses from the engine; there once prompts are encoded."""
        assert self._generation is not None
        return self._generation

    def setup(self, stage: str) -> None:
        """Encode the prompts, once."""
        if self._generation is not None:
            return
        policy = self.module.policy
        limits = {
            "max_prompt_tokens": self.config.max_prompt_tokens,
            "max_new_tokens": self.config.max_new_tokens,
        }
        self._evaluated = [each.prompts(policy, self.evaluation, **limits) for each in self.benchmarks]
        self._train = encode(self.task.train(), policy, **limits, chat=self.task.chat, split="training")
        if len(self._train) < self.config.num_prompts:
            raise ConfigError(
                f"data.num_prompts={self.config.num_prompts}",
                f"at most the task's {len(self._train)} training prompts",
                f"data.num_prompts={max(len(self._train), 1)}",
            )
        self._generation = Generation(
            self.source, self._train, self.config, self.fitting, self.module, self.seed
        )

    def state_dict(self) -> dict[str, Any]:
        """The responses generated ahead."""
        return self.generation.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.generation.load_state_dict(state_dict)

    def train_dataloader(self) -> DataLoader[Batch]:
        """One iteration's mini-batches, made while they are asked for."""
        return DataLoader(_TrainStream(self), batch_size=None, num_workers=0)

    def val_dataloader(self) -> DataLoader[Evaluation]:
        """The held-out problems and benchmarks, generated and judged."""
        return DataLoader(_EvaluationStream(self), batch_size=None, num_workers=0)

    def teardown(self, stage: str) -> None:
        """Keep the engine: fit and validate follow each other; the entry point closes it."""

    # One iteration
    # ------------------------------------------------------------------------------------------------

    def iteration(self, k: int) -> Iterator[Batch]:
        """Yield the mini-batches of iteration ``k``.

        Raises:
            RunError: where no response has a token, or the engine died too often.
        """
        generated = self.generation.of_iteration(k)
        self.rollouts = generated.pairs
        if self.config.lookahead and k + 1 < (self.fitting.max_epochs or 0):
            self.generation.look_ahead(k)
        rollouts = [rollout for rollout, _ in generated.pairs]
        sequences = Sequences.of(rollouts, self.module.policy.pad_id)
        rewards = rewards_of(generated.pairs, self.config.group_size)
        with self.module.ledger.timed("time/logprob_s"):
            policy_logprobs, entropy = self._score(self.module.policy, sequences)
            reference = self.module.reference
            ref_logprobs = None if reference is None else self._score(reference, sequences)[0]
        entropy_total, tokens, reward_total, count = summed(
            self.fitting,
            torch.stack(
                [
                    entropy.sum().cpu(),
                    torch.tensor(len(entropy)),
                    rewards.sum(),
                    torch.tensor(rewards.numel()),
                ]
            ),
        ).tolist()
        if not tokens:
            raise RunError(f"every response of iteration {k} is empty: the engine returned no tokens")
        ledger = self.module.ledger
        refilled = self.config.dynamic_sampling > 0
        log_rollouts(ledger, generated, group_size=self.config.group_size, refilled=refilled)
        ledger.add("rollout/entropy", entropy.sum(), len(entropy))
        ledger.add("rollout/staleness", k - generated.version)
        self._log_work(generated, "rollout", "time/rollout_s", "time/verify_s")
        engine_logprobs = sequences.scatter([lp for rollout in rollouts for lp in rollout.logprobs])
        rho = self._rho(policy_logprobs, engine_logprobs, sequences.loss_mask)
        if self.config.mask_truncated:
            sequences = sequences.without([rollout.finish_reason == "length" for rollout in rollouts])
        whole = Batch(
            sequences=sequences,
            advantages=self.module.algorithm.advantages(self._shaped(rewards, rollouts)).flatten(),
            old_logprobs=engine_logprobs if self.config.old_logprobs == "engine" else policy_logprobs,
            ref_logprobs=ref_logprobs,
            rho=rho,
            totals=Totals(tokens=int(tokens), sequences=int(count)),
            facts=IterationFacts(
                iteration=k, entropy=entropy_total / tokens, reward_mean=reward_total / count
            ),
            keys=torch.tensor([(rollout.prompt.index, rollout.sample) for rollout in rollouts]),
        )
        yield from self._minibatches(whole, k)

    def _rho(self, policy_logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor) -> Tensor | None:
        """Weights that correct for the engine's distribution [B, T], if wanted."""
        if self.config.truncated:
            return None  # the engine's log-probs are then of another vocabulary
        ledger = self.module.ledger
        log_rho = mismatch.log_rho(policy_logprobs, engine_logprobs, mask)
        log_mismatch(ledger, log_rho, mask)
        if self.correction is None:
            return None
        weights, cut = self.correction(log_rho, mask)
        ledger.add("rollout/rho_cut_mean", weights.sum(), mask.sum())
        ledger.add("rollout/rho_cut_frac", cut.sum(), mask.sum())
        return weights

    @torch.no_grad()
    def _score(self, policy: Policy, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Log-probs [B, T] of the responses, 0 outside the mask, and entropies [N], under ``policy``."""
        parts = self._parts(sequences, policy)
        logprobs, entropies = [], []
        for part in parts:
            micro = sequences.rows(part).to(self.module.device)
            with self._precision():
                stats = policy.logprobs(micro, temperature=self.config.temperature)
            logprobs.append(stats.logprobs.cpu())
            entropies.append(stats.entropy.cpu())
            self.module.ledger.add("perf/padding_frac", *policy.padding(micro))
        return join(sequences.loss_mask, parts, logprobs), torch.cat(entropies)

    def _parts(self, sequences: Sequences, policy: Policy) -> tuple[Tensor, ...]:
        """Rows of each forward pass over ``sequences``, of which all ranks make the same number.

        Rows without response tokens in the mask take part in none.
        """
        rows = sequences.loss_mask.any(dim=1).nonzero().flatten()
        width = sequences.attention_mask.shape[1] - sequences.loss_mask.shape[1]
        lengths = [
            sequences.attention_mask[rows, part].sum(dim=1) for part in (slice(width), slice(width, None))
        ]
        ours = list(zip(*(length.tolist() for length in lengths), strict=True))
        context = policy.context
        parts = shared_micro_batches(
            [ours] if context is None else context.gathered(ours),
            0 if context is None else context.rank,
            rows=self.config.micro_batch_size,
            tokens=self.config.tokens_per_micro_batch,
            packed=policy.packing,
            agree=self._max,
        )
        return tuple(rows[torch.tensor(part, dtype=torch.long)] for part in parts)

    def _minibatches(self, whole: Batch, k: int) -> Iterator[Batch]:
        """Split by rows into optimizer mini-batches, in a keyed order, a new one every epoch."""
        config, fitting = self.config, self.fitting
        for epoch in range(config.epochs):
            for rows in minibatch_rows(
                config, fitting.global_rank, fitting.world_size, (self.seed, k, epoch)
            ):
                batch = whole.rows(rows)
                mask = batch.loss_mask
                tokens, sequences = summed(
                    self.fitting, torch.stack([mask.sum(), mask.any(dim=1).sum()])
                ).tolist()
                yield replace(
                    batch,
                    totals=Totals(tokens=tokens, sequences=sequences),
                    parts=self._parts(batch.sequences, self.module.policy),
                )

    def _shaped(self, rewards: Tensor, rollouts: list[Rollout]) -> Tensor:
        """Rewards [P, G] with the penalty of responses near the limit, where that is wanted."""
        if not self.config.overlong_buffer:
            return rewards
        penalties = overlong_penalty(
            torch.tensor([len(rollout.token_ids) for rollout in rollouts]).view_as(rewards),
            longest=self.config.max_new_tokens,
            buffer=self.config.overlong_buffer,
            factor=self.config.overlong_factor,
        )
        self.module.ledger.add("rollout/overlong_penalty", penalties.sum(), penalties.numel())
        return rewards + penalties

    # Held-out problems and benchmarks
    # ------------------------------------------------------------------------------

    def evaluations(self) -> Iterator[Evaluation]:
        """Yield the judged samples of each benchmark; the same draws at every evaluation."""
        self.generation.wait()
        for benchmark, prompts in zip(self.benchmarks, self._evaluated, strict=True):
            yield self._evaluate(benchmark, prompts[self.fitting.global_rank :: self.fitting.world_size])

    def _evaluate(self, benchmark: Benchmark, prompts: list[Prompt]) -> Evaluation:
        sampling = benchmark.sampling(
            self.evaluation, max_new_tokens=self.config.max_new_tokens, seed=self.seed
        )
        source = RolloutSource(self.engine, benchmark.verifier)
        work = partial(source.generate, prompts, sampling, version=self.fitting.current_epoch)
        generated = self.generation.by_newest_weights(work)
        name = benchmark.name
        self._log_work(generated, f"val/{name}", f"time/{name}_s", f"time/{name}_verify_s")
        verdicts = [verdict for _, verdict in generated.pairs]
        groups = [verdicts[i : i + sampling.samples] for i in range(0, len(verdicts), sampling.samples)]
        return Evaluation(
            name=name,
            # A rank may have none of the prompts.
            correct=torch.tensor([v.correct for v in verdicts], dtype=torch.bool).view(-1, sampling.samples),
            answers=[[verdict.answer for verdict in group] for group in groups],
        )

    # ----------------------------------------------------------------------------------------------------

    def _log_work(self, generated: JudgedRollouts, prefix: str, rollout_key: str, verify_key: str) -> None:
        """Log seconds, and responses over all ranks that the verifier could not judge."""
        ledger, share = self.module.ledger, 1 / self.fitting.world_size
        ledger.add(rollout_key, generated.rollout_s)
        ledger.add(verify_key, generated.verify_s)
        ledger.add(f"{prefix}/verifier_errors", generated.verifier_errors * share, share)

    def _max(self, value: int) -> int:
        """The largest over all ranks."""
        ours = torch.tensor(value, device=self.module.device)
        return int(self.fitting.strategy.reduce(ours, reduce_op="max"))

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """The trainer's arithmetic: old and new log-probs must not differ by it."""
        with self.fitting.precision_plugin.forward_context():
            yield


class _TrainStream(IterableDataset[Batch]):
    """Lazy and sized: unsized, Lightning would generate too early, and prefetch across a step."""

    def __init__(self, data: RolloutDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.config.updates

    def __iter__(self) -> Iterator[Batch]:
        yield from self.data.iteration(self.data.fitting.current_epoch)


class _EvaluationStream(IterableDataset[Evaluation]):
    """Sized and lazy for the same reason."""

    def __init__(self, data: RolloutDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.benchmarks)

    def __iter__(self) -> Iterator[Evaluation]:
        yield from self.data.evaluations()
