"""The Lightning module: one policy, one clip range, one update a mini-batch."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from rlvr.algorithm import Algorithm
from rlvr.batch import Batch, Evaluation
from rlvr.clipping import ClipRange
from rlvr.keyed import hashes
from rlvr.ledger import Ledger
from rlvr.logprobs import TokenStats
from rlvr.losses import LossInputs, LossOutputs, SelectingLoss, check_clip, needs_of, token_mean
from rlvr.losses.kl import ESTIMATORS
from rlvr.losses.selection import count_of, select, token_covariance
from rlvr.metrics import MajAtK, MeanAtK, PassAtK
from rlvr.policy import Policy
from rlvr.regions import RegionAblation
from rlvr.sharding import full_tensor, is_sharded, shard
from rlvr.strategies import FSDP, gathered


class RLVRModule(LightningModule):
    """Owns the policy and the dynamic-clip loss; an iteration is an epoch, an optimizer step a batch.

    Optimization is manual: micro-batches vary in number, and a step that is not finite is skipped by all
    ranks at once.

    Args:
        policy: what is trained.
        algorithm: loss, aggregation, optimizer.
        clip_range: thresholds until a scheduler, or a callback of yours, calls :meth:`set_clip_range`.
        regions: region ablation, or None.
        temperature: of training rollouts; log-probs are taken at it.
        updates: optimizer steps an iteration.
        seed: keys the draws of losses that select tokens.

    Attributes:
        entropy_coef: weight of the entropy bonus; the algorithm's, until a callback sets another.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        clip_range: ClipRange,
        *,
        regions: RegionAblation | None = None,
        temperature: float = 1.0,
        updates: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = policy
        self.algorithm = algorithm
        self.regions = regions
        self.temperature = temperature
        self.updates = updates
        self.seed = seed
        self.entropy_coef = algorithm.entropy_coef
        self.ledger = Ledger()
        self.skipped = 0
        self._clip_range = clip_range
        self._clip_writer: object = None
        self._metrics: dict[str, dict[str, Any]] = {}
        # In a tuple, so that torch does not register it: it is neither trained, saved nor moved with the
        # module.
        self._reference = (_frozen(policy),) if algorithm.kl_coef > 0 else ()

    @property
    def device(self) -> torch.device:
        """Where this rank computes; offloaded parameters wait elsewhere."""
        device: torch.device = super().device if self._trainer is None else self.trainer.strategy.root_device
        return device

    @property
    def clip_range(self) -> ClipRange:
        """The thresholds of this iteration."""
        return self._clip_range

    def set_clip_range(self, clip_range: ClipRange, writer: object) -> None:
        """Fix the thresholds of this iteration: the whole contract with schedulers.

        Args:
            clip_range: what every update of this iteration uses.
            writer: who asks, normally ``self`` of a callback.

        Raises:
            RuntimeError: where another writer has set them in the same iteration.
            ConfigError: where the loss cannot use them.
        """
        if self._clip_writer is not None and self._clip_writer is not writer:
            raise RuntimeError(
                f"two writers of the clip range in one iteration, {type(self._clip_writer).__name__} and "
                f"{type(writer).__name__}: keep one, for instance with clip=constant"
            )
        check_clip(self.algorithm.loss, clip_range)
        self._clip_range, self._clip_writer = clip_range, writer

    @property
    def reference(self) -> Policy | None:
        """The frozen initial policy, where the algorithm asks for one."""
        return self._reference[0] if self._reference else None

    def configure_optimizers(self) -> Any:
        """AdamW, and a learning rate that moves with every update."""
        optimizer = self.algorithm.optimizer([p for p in self.parameters() if p.requires_grad])
        schedule = self.algorithm.learning_rate(optimizer, (self.trainer.max_epochs or 0) * self.updates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_model(self) -> None:
        """Shard the policy, and a reference, where the strategy says so: before the optimizer is made."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, FSDP) or is_sharded(self.policy):
            return
        half = "bf16" in str(self.trainer.precision)
        for policy in (self.policy, *self._reference):
            shard(
                policy,
                strategy.device_mesh["data_parallel"],
                strategy.root_device,
                compute_dtype=torch.bfloat16 if half else None,
                offload=strategy.offload,
            )

    def on_fit_start(self) -> None:
        """Bring the reference to the device."""
        if self.reference is not None and not is_sharded(self.reference):
            self.reference.to(self.device)

    def on_train_epoch_start(self) -> None:
        """Nobody has written the clip range of this iteration yet."""
        self._clip_writer = None

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """One optimizer step.

        Returns:
            ``loss`` (scalar), and detached [B, T], 0 outside ``mask``: ``logprobs``, ``entropy``, ``moment``,
            ``log_moment``, ``kept``, ``grad_logprobs`` (g = -d(reduced loss)/d ln p, method's flow),
            ``mask``.
        """
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        if isinstance(self.algorithm.loss, SelectingLoss):
            batch = replace(batch, selected=self._select(self.algorithm.loss, batch, update=batch_idx))
        losses, tokens = [], []
        micro_batches = list(batch.micro_batches())
        for number, micro in enumerate(micro_batches, start=1):
            with self._reduce_gradients(number == len(micro_batches)):
                loss, values = self._micro_step(micro)
            losses.append(loss)
            tokens.append(values)
        outputs = {key: batch.join([part[key] for part in tokens]) for key in tokens[0]}
        outputs |= {"loss": torch.stack(losses).sum(), "mask": batch.loss_mask}
        lr = optimizer.param_groups[0]["lr"]
        norm = full_tensor(
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.algorithm.gradient_clip or torch.inf),
            self.device,
        )
        finite = self._all_ranks(torch.isfinite(norm) & torch.isfinite(outputs["loss"]))
        if finite:
            optimizer.step()
        else:
            self.skipped += 1
        # To None, not to zero: zero gradients would still decay weights and move by momentum.
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        self._log_update(outputs, norm, lr, finite)
        return outputs

    @torch.no_grad()
    def _select(self, loss: SelectingLoss, batch: Batch, update: int) -> Tensor:
        """Tokens that the loss treats in another way, over all micro-batches and ranks: [B, T] bool."""
        if batch.keys is None:
            raise ValueError("a loss that selects tokens needs Batch.keys: prompt index and sample number")
        mask = batch.loss_mask
        parts = []
        for micro in batch.micro_batches():
            parts.append(self.policy.logprobs(micro.sequences, temperature=self.temperature))
            self.ledger.add("perf/padding_frac", *self.policy.padding(micro.sequences))
        stats = TokenStats(*(batch.join(values)[mask] for values in zip(*parts, strict=True)))
        inputs = LossInputs(
            logprobs=stats.logprobs,
            old_logprobs=batch.old_logprobs[mask],
            advantages=batch.advantages[:, None].expand_as(mask)[mask],
            mask=torch.ones_like(stats.logprobs, dtype=torch.bool),
            clip=self.clip_range,
            entropy=stats.entropy,
        )
        if self.regions is not None:
            inputs = self.regions.bounds_of(inputs)
        strategy = self.trainer.strategy
        covariance = token_covariance(
            inputs.advantages, inputs.logprobs, lambda sums: strategy.reduce(sums, reduce_op="sum")
        )
        draws = hashes(
            self.seed,
            "select",
            *(batch.facts.iteration, update),
            *(key[:, None].expand_as(mask)[mask] for key in batch.keys.unbind(dim=1)),
            (mask.cumsum(dim=1) - 1)[mask],
        )
        chosen = select(
            loss.scores(inputs, covariance),
            draws,
            count_of(loss.fraction, batch.totals.tokens),
            lambda values: torch.cat(gathered(values.cpu())).to(values.device),
        )
        return torch.zeros_like(mask).masked_scatter(mask, chosen)

    def _micro_step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward of one micro-batch: its loss, and vectors over its response tokens."""
        mask = batch.loss_mask
        weights = self.algorithm.aggregation(mask, batch.totals)[mask]
        bonus_weights = token_mean(mask, batch.totals)[mask]
        old_logprobs = batch.old_logprobs[mask]
        ref_logprobs = None if batch.ref_logprobs is None else batch.ref_logprobs[mask]
        rho = None if batch.rho is None else batch.rho[mask]
        advantages = batch.advantages[:, None].expand_as(mask)[mask]
        selected = None if batch.selected is None else batch.selected[mask]
        by_sequence = needs_of(self.algorithm.loss).sequence_stats
        sequence_log_ratio = torch.zeros_like(old_logprobs)

        def sequence_means(stats: TokenStats) -> None:
            log_ratio = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
            log_ratio[mask] = (stats.logprobs - old_logprobs).double()
            means = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
            sequence_log_ratio.copy_(means.expand_as(mask)[mask])

        def objective(logprobs: Tensor, entropy: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
            inputs = LossInputs(
                logprobs=logprobs,
                old_logprobs=old_logprobs[rows],
                advantages=advantages[rows],
                mask=torch.ones_like(logprobs, dtype=torch.bool),
                clip=self.clip_range,
                entropy=entropy.detach(),
                ref_logprobs=None if ref_logprobs is None else ref_logprobs[rows],
                sequence_log_ratio=sequence_log_ratio[rows] if by_sequence else None,
                selected=None if selected is None else selected[rows],
            )
            outputs = self._loss(inputs, None if rho is None else rho[rows])
            total = (weights[rows] * outputs.loss).sum()
            if self.entropy_coef:
                total = total - self.entropy_coef * (bonus_weights[rows] * entropy).sum()
            facts = {f"fact:{key}": value.detach() for key, value in outputs.facts.items()}
            return total, {"kept": outputs.kept, "ratio": inputs.ratio().detach(), **facts}

        loss, stats, extras = self.policy.objective(
            batch.sequences,
            objective,
            temperature=self.temperature,
            first=sequence_means if by_sequence else None,
        )
        # Each rank's loss is a part of one sum, and strategies average gradients.
        self.manual_backward(loss * self.trainer.world_size)
        self.ledger.add("perf/padding_frac", *self.policy.padding(batch.sequences))
        extras["grad_logprobs"] = -extras.pop("dloss_dlogprobs")
        return loss.detach(), {**stats._asdict(), **extras}

    def _loss(self, inputs: LossInputs, rho: Tensor | None) -> LossOutputs:
        """The policy loss, ablated and corrected for the engine, and the divergence from the reference."""
        loss = self.algorithm.loss
        outputs = loss(inputs) if self.regions is None else self.regions.apply(loss, inputs)
        if rho is not None:
            outputs = replace(outputs, loss=rho * outputs.loss)
        if inputs.ref_logprobs is None:
            return outputs
        estimates = {name: k(inputs.logprobs, inputs.ref_logprobs) for name, k in ESTIMATORS.items()}
        return LossOutputs(
            loss=outputs.loss + self.algorithm.kl_coef * estimates[self.algorithm.kl_estimator],
            kept=outputs.kept,
            facts={**outputs.facts, **{f"ref_kl_{name}": value for name, value in estimates.items()}},
        )

    def _log_update(self, outputs: Mapping[str, Tensor], norm: Tensor, lr: float, finite: bool) -> None:
        mask = outputs["mask"]
        count = mask.sum()
        ratio = outputs["ratio"]
        per_token = {
            "entropy": outputs["entropy"],
            "ratio_mean": ratio,
            "approx_kl": ratio - 1 - torch.where(mask, ratio, 1.0).log(),
            "kept_frac": outputs["kept"],
            **{key.removeprefix("fact:"): value for key, value in outputs.items() if key.startswith("fact:")},
        }
        for key, value in per_token.items():
            self.ledger.add(f"train/{key}", torch.where(mask, value, 0).sum(), count)
        # The ranks' losses are parts of one sum; the count is divided instead, for the ledger adds over
        # ranks.
        self.ledger.add("train/loss", outputs["loss"], 1 / self.trainer.world_size)
        self.ledger.add("train/lr", lr)
        self.ledger.add("train/skipped", float(not finite))
        if finite:
            self.ledger.add("train/grad_norm", norm)

    @contextmanager
    def _reduce_gradients(self, now: bool) -> Iterator[None]:
        """Reduce gradients over the ranks in the body's backward passes, or keep them for a later one."""
        blocked = getattr(self.trainer.strategy, "block_backward_sync", None)
        with nullcontext() if now or blocked is None else blocked():
            yield

    def _all_ranks(self, flag: Tensor) -> bool:
        """Whether ``flag`` holds on every rank."""
        agreed = self.trainer.strategy.reduce(flag.float(), reduce_op="sum")
        return bool(agreed == self.trainer.world_size)

    def validation_step(self, batch: Evaluation, batch_idx: int) -> None:
        """Count one benchmark's samples."""
        if batch.name not in self._metrics:
            metrics = _benchmark_metrics(batch.correct.shape[1])
            self._metrics[batch.name] = {name: metric.to(self.device) for name, metric in metrics.items()}
        for name, metric in self._metrics[batch.name].items():
            if name.startswith("maj"):
                metric.update(batch.correct, batch.answers)
            else:
                metric.update(batch.correct)

    def on_validation_epoch_end(self) -> None:
        """Hand every benchmark's scores to the ledger."""
        for benchmark, metrics in self._metrics.items():
            for name, metric in metrics.items():
                # Already over all ranks: every rank adds the same mean.
                self.ledger.add(f"val/{benchmark}/{name}", metric.compute())
        self._metrics.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the rows so far, and where the policy's shape and tokenizer come from, for the export."""
        checkpoint["rlvr"] = {
            "ledger": self.ledger.state_dict(),
            "skipped": self.skipped,
            "policy_path": self.policy.source,
            "policy_dtype": str(self.policy.dtype).removeprefix("torch."),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what :meth:`on_save_checkpoint` added."""
        self.ledger.load_state_dict(checkpoint["rlvr"]["ledger"])
        self.skipped = checkpoint["rlvr"]["skipped"]


def _benchmark_metrics(samples: int) -> dict[str, Any]:
    """mean@n, maj@n, and pass@k for the powers of two up to n."""
    powers = [1 << i for i in range(samples.bit_length())]
    return {
        f"mean_at_{samples}": MeanAtK(samples),
        f"maj_at_{samples}": MajAtK(samples),
        **{f"pass_at_{k}": PassAtK(k) for k in powers},
    }


def _frozen(policy: Policy) -> Policy:
    return copy.deepcopy(policy).eval().requires_grad_(False)
