"""The stream of rollout batches: prompts, sync, rollouts, verdicts, log-probs, advantages, mini-batches."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from rlvr.engines import RolloutEngine, SamplingParams
from rlvr.errors import ConfigError, EngineDiedError, RunError
from rlvr.losses import Totals
from rlvr.minibatches import minibatch_rows
from rlvr.mismatch import Correction
from rlvr.module import RLVRModule
from rlvr.packing import shared_micro_batches
from rlvr.policy import Policy
from rlvr.prompts import PromptOrder, encode
from rlvr.rollout_metrics import log_mismatch, log_rollouts, rewards_of
from rlvr.rollouts import Ahead, JudgedRollouts, RolloutSource
from rlvr.settings import DataConfig, EvaluationConfig
from rlvr.strategies import gathered_at_zero
from rlvr.tasks import Task
from rlvr.verifiers import Verifier
from rlvr.weight_sync import WeightSync


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
        self._sync: WeightSync | None = None
        self._ahead: Ahead | None = None
        self._restored: dict[str, Any] | None = None

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
        if self._train:
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
        generated = self._generated(k)
        self.rollouts = generated.pairs
        if self.config.lookahead and k + 1 < (self.fitting.max_epochs or 0):
            self._look_ahead(k)
        rollouts = [rollout for rollout, _ in generated.pairs]
        sequences = Sequences.of(rollouts, self.module.policy.pad_id)
        rewards = rewards_of(generated.pairs, self.config.group_size)
        with self.timed("time/logprob_s"):
            policy_logprobs, entropy = self._score(self.module.policy, sequences)
            reference = self.module.reference
            ref_logprobs = None if reference is None else self._score(reference, sequences)[0]
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

    def _generated(self, k: int) -> JudgedRollouts:
        """The responses of iteration ``k``: those generated ahead, or new ones by the newest weights."""
        generated: JudgedRollouts | None = None
        begin = time.perf_counter()
        try:
            if self._ahead is not None and self._ahead.iteration == k:
                generated = self._ahead.result()
            elif self._restored is not None and self._restored["iteration"] == k and self.config.lookahead:
                generated = self._pending(k, self._restored["rollouts"])
                if self._sum(torch.tensor(generated is None).long()):
                    generated = None  # all or none: ranks may share an engine, which asks all of them
        except EngineDiedError as error:
            self._say_died(error)
        self._ahead = self._restored = None
        if self.config.lookahead:
            self.module.ledger.add("time/rollout_wait_s", time.perf_counter() - begin)
        return self._generate(partial(self._rollouts, k, version=k), generated)

    def _look_ahead(self, k: int) -> None:
        """Start to generate iteration ``k + 1``'s responses by iteration ``k``'s starting weights."""
        failure: RunError | ConfigError | None = None
        died = False
        try:
            self.sync()
        except EngineDiedError as error:
            self._say_died(error)  # and start it again when the time for them has come
            died = True
        except (RunError, ConfigError) as error:
            failure = error
        self._fail_together(failure)
        if died:
            return
        self._ahead = Ahead(k + 1, partial(self._rollouts, k + 1, version=k))

    def _pending(self, k: int, saved: list[dict[str, Any] | None]) -> JudgedRollouts | None:
        """What a checkpoint holds for iteration ``k``; None where this run would ask other prompts."""
        if len(saved) != self.fitting.world_size or (mine := saved[self.fitting.global_rank]) is None:
            return None
        prompts = self._order.of_iteration(k)
        spares = self._order.spares(k) if self.config.dynamic_sampling else []
        return JudgedRollouts.of_plain(mine, prompts, spares, self.config.group_size)

    def _rollouts(self, k: int, version: int) -> JudgedRollouts:
        """Generate iteration ``k``'s responses by the engine's present weights."""
        rounds = self.config.dynamic_sampling
        return self.source.generate(
            self._order.of_iteration(k),
            self._sampling(k),
            version,
            spares=self._order.spares(k) if rounds else [],
            rounds=rounds,
        )

    @property
    def _order(self) -> PromptOrder:
        fitting = self.fitting
        return PromptOrder(
            self._train, self.config.num_prompts, self.seed, fitting.global_rank, fitting.world_size
        )

    def _generate(
        self, work: Callable[[], JudgedRollouts], generated: JudgedRollouts | None = None
    ) -> JudgedRollouts:
        """Sync the engine and generate what is not there yet; again where it died. All ranks come and leave.

        Raises:
            RunError: where the engine of any rank died too often, or generates with other weights.
            ConfigError: where this rank's does not start.
        """
        failure: RunError | ConfigError | None = None
        while True:
            self._fail_together(failure)
            if not self._sum(torch.tensor(generated is None).long()):
                assert generated is not None
                return generated
            try:
                self.sync()
                generated = generated or work()
            except EngineDiedError as error:
                self._say_died(error)
            except (RunError, ConfigError) as error:
                failure = error

    def _fail_together(self, failure: RunError | ConfigError | None) -> None:
        """Leave with an error where any rank has one: alone, the others would wait for it."""
        if self._sum(torch.tensor(failure is not None).long()):
            raise failure or RunError("the engine of another rank failed")

    def _say_died(self, error: EngineDiedError) -> None:
        print(f"{error}; starting it again, and generating the prompts anew", file=sys.stderr, flush=True)

    def _sampling(self, k: int) -> SamplingParams:
        return SamplingParams(
            samples=self.config.group_size,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            top_k=self.config.top_k,
            seed=self.seed,
            purpose="train",
            iteration=k,
        )

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

    def state_dict(self) -> dict[str, Any]:
        """The responses that every rank has generated ahead, and their iteration; empty without any."""
        if not self.config.lookahead:
            return {}
        generated = self._ahead.wait() if self._ahead is not None else None
        ranks = gathered_at_zero(None if generated is None else generated.plain())
        return {"iteration": self.fitting.current_epoch + 1, "rollouts": ranks} if any(ranks) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what :meth:`state_dict` returned until its iteration comes."""
        self._restored = state_dict or None

    def sync(self) -> None:
        """Hand the weights to the engine, and prove that it uses them: see :class:`WeightSync`."""
        with self.timed("time/weight_sync_s"):
            if self._sync is None:
                self._sync = WeightSync(self.module.policy, self.engine, self.module.device)
            gap = self._sync()
        if gap is not None:
            self.module.ledger.add("rollout/sync_gap", gap)

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
                tokens, sequences = self._sum(torch.stack([mask.sum(), mask.any(dim=1).sum()])).tolist()
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
        if self._ahead is not None:
            self._ahead.wait()  # the engine is busy with it
        for benchmark, prompts in zip(self.benchmarks, self._evaluated, strict=True):
            yield self._evaluate(benchmark, prompts[self.fitting.global_rank :: self.fitting.world_size])

    def _evaluate(self, benchmark: Benchmark, prompts: list[Prompt]) -> Evaluation:
        sampling = benchmark.sampling(
            self.evaluation, max_new_tokens=self.config.max_new_tokens, seed=self.seed
        )
        source = RolloutSource(self.engine, benchmark.verifier)
        work = partial(source.generate, prompts, sampling, version=self.fitting.current_epoch)
        generated = self._generate(work)
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
