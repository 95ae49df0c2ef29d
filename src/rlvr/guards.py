"""What cannot work together: refused in one line with the override that mends it, or warned of."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from omegaconf import DictConfig

from rlvr.batch import IterationFacts
from rlvr.callbacks import ClipScheduler
from rlvr.clipping import ClipRange
from rlvr.engines import RolloutEngine
from rlvr.engines.shared import SharedEngine
from rlvr.engines.transformers import TransformersEngine
from rlvr.errors import ConfigError
from rlvr.instantiate import build, plain
from rlvr.losses import Aggregation, Loss, LossInputs, Needs, Totals, check_clip, name_of, needs_of
from rlvr.mismatch import Correction
from rlvr.module import RLVRModule
from rlvr.regions import RegionAblation
from rlvr.settings import DataConfig
from rlvr.strategies import FSDP


def clip_of(node: Any) -> tuple[ClipRange, ClipScheduler | None]:
    """The initial clip range, and the scheduler where there is one."""
    if isinstance(node, ClipScheduler):
        return ClipRange.fixed(0.2, 0.2), node
    if isinstance(node, ClipRange):
        return node, None
    raise ConfigError(
        f"clip._target_: {type(node).__name__}", "a ClipRange or a ClipScheduler callback", "clip=constant"
    )


def rehearse(loss: Loss, aggregation: Aggregation) -> None:
    """Evaluate what is of this package on one token, so that a refusal does not wait for rollouts."""
    zero, yes = torch.zeros(1), torch.ones(1, dtype=torch.bool)
    clip = ClipRange.fixed(1.0, 4.0)  # that every loss takes
    inputs = LossInputs(zero, zero, zero, yes, clip, entropy=zero, sequence_log_ratio=zero, selected=yes)
    for name, part, arguments in (
        ("loss", loss, (inputs,)),
        ("aggregation", aggregation, (yes[None], Totals(tokens=1, sequences=1))),
    ):
        function: Any = getattr(part, "func", part)
        if not getattr(function, "__module__", "").startswith("rlvr."):
            continue  # one from outside may count its calls
        try:
            part(*arguments)
        except ValueError as error:
            key = f"algorithm.{name}"
            raise ConfigError(key, f"other values ({error})", f"{key}.KEY=VALUE") from error


def check_loss(
    loss: Loss, clip_range: ClipRange, scheduler: ClipScheduler | None, regions: RegionAblation | None
) -> list[str]:
    """Refuse bounds and region modes that mean nothing to a loss; return warnings about the others."""
    needs, name = needs_of(loss), name_of(loss)
    if needs.bounds == "none" and scheduler is not None:
        raise ConfigError(
            f"clip={type(scheduler).__name__}",
            f"no schedule, for {name} has no bounds that it could move",
            "clip=constant",
        )
    ranges = [clip_range]
    if scheduler is not None and type(scheduler).__module__.startswith("rlvr.") and needs != Needs():
        # A copy: a schedule with a state must not have taken a step. One from outside is judged as it writes.
        nothing = IterationFacts(iteration=0, entropy=0.0, reward_mean=0.0)
        ranges = [copy.deepcopy(scheduler).clip_range(at, nothing) for at in (0.0, 0.5, 1 - 1e-9)]
    found = [warning for each in ranges if (warning := check_clip(loss, each)) is not None]
    if regions is None:
        return found[:1]
    if regions.mode in ("only", "extend") and needs.sequence_stats:
        raise ConfigError(
            f"regions.mode={regions.mode} beside {name}",
            "drop or isolate, for this loss clips a sequence's ratio and the band is one of tokens",
            "regions.mode=isolate",
        )
    if regions.mode == "extend" and needs.bounds != "clip":
        raise ConfigError(
            f"regions.mode=extend beside {name}",
            "another mode, for this loss cuts no token's gradient and has no clip to widen",
            "regions.mode=drop",
        )
    return found[:1]


def regions_of(cfg: DictConfig, scheduler: ClipScheduler | None, bf16: bool) -> RegionAblation | None:
    """The region ablation, if one is wanted; refused beside a schedule where it has its own band."""
    node = plain(cfg.regions)
    if node["tolerance"] is None:
        node["tolerance"] = 2e-2 if bf16 else 1e-3
    if node["keep"] is None:
        return None
    if isinstance(node["keep"], str):
        node["keep"] = [node["keep"]]
    try:
        regions = RegionAblation(**node)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "regions", f"other values ({error})", "regions.keep=[E1] regions.mode=drop"
        ) from error
    if regions.mode == "only" and scheduler is not None:
        raise ConfigError(
            f"regions.mode=only beside clip={type(scheduler).__name__}",
            "no schedule, for this mode has its own band",
            "clip=constant, or regions.mode=drop",
        )
    return regions


def correction_of(cfg: DictConfig, sizes: DataConfig) -> Correction | None:
    """The engine correction, refused where what the engine reports is not what it would have to be."""
    correction: Correction | None = build(cfg, "correction") if cfg.correction else None
    if correction is not None:
        try:
            correction(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
        except ValueError as error:
            raise ConfigError(
                "correction", f"other values ({error})", "correction=token_truncation"
            ) from error
    engine_ratio = sizes.old_logprobs == "engine"
    if (correction is not None or engine_ratio) and sizes.truncated:
        raise ConfigError(
            f"data.top_p={sizes.top_p} data.top_k={sizes.top_k} beside "
            + ("data.old_logprobs=engine" if engine_ratio else "a correction"),
            "sampling from the whole vocabulary: the engine's log-probs are otherwise of the truncated one, "
            "the trainer's are not",
            "data.top_p=1.0 data.top_k=0",
        )
    if correction is not None and engine_ratio:
        raise ConfigError(
            "a correction beside data.old_logprobs=engine",
            "one of the two: with the engine's ln q the ratio itself corrects",
            "correction=none",
        )
    if sizes.lookahead and correction is None and not engine_ratio:
        raise ConfigError(
            "data.lookahead=1",
            "a correction: its responses come from weights one iteration old",
            "correction=token_truncation, or data.old_logprobs=engine",
        )
    return correction


def check_ranks(trainer: Trainer, sizes: DataConfig, checkpoint: Path | None) -> None:
    """Refuse groups or prompts that do not go round the ranks, and shards for a policy in one piece."""
    if checkpoint is not None and checkpoint.is_dir() and not isinstance(trainer.strategy, FSDP):
        raise ConfigError(
            f"ckpt_path={checkpoint}",
            "a checkpoint in one file: this one is of shards",
            "trainer=fsdp, on any number of ranks",
        )
    size = trainer.strategy.context_parallel_size if isinstance(trainer.strategy, FSDP) else 1
    if trainer.world_size % size:
        raise ConfigError(
            f"trainer.strategy.context_parallel_size={size}",
            f"a divisor of the {trainer.world_size} ranks",
            f"trainer.strategy.context_parallel_size={math.gcd(size, trainer.world_size)}",
        )
    if sizes.num_prompts < trainer.world_size:
        raise ConfigError(
            f"data.num_prompts={sizes.num_prompts}",
            f"a prompt for each of the {trainer.world_size} ranks",
            f"data.num_prompts={trainer.world_size}",
        )


def refuse_engine(trainer: Trainer, engine: RolloutEngine, sizes: DataConfig) -> None:
    """Refuse to generate with weights of which a rank has a part, or in rounds with a shared engine."""
    if isinstance(engine, SharedEngine) and sizes.dynamic_sampling:
        raise ConfigError(
            f"data.dynamic_sampling={sizes.dynamic_sampling} beside a shared engine",
            "an engine for each rank: ranks replace prompts in rounds of their own",
            "engine=vllm",
        )
    node, inner = ("engine.engine", engine.engine) if isinstance(engine, SharedEngine) else ("engine", engine)
    if isinstance(trainer.strategy, FSDP) and isinstance(inner, TransformersEngine) and not inner.own_copy:
        raise ConfigError(
            f"{node}.own_copy=false beside trainer=fsdp",
            "whole weights to generate with: each rank has a shard of them",
            f"{node}.own_copy=true",
        )


def refuse_lookahead(sizes: DataConfig, engine: RolloutEngine) -> None:
    """Refuse to generate ahead with what the trainer is moving."""
    if sizes.lookahead and not engine.concurrent:
        raise ConfigError(
            "data.lookahead=1",
            f"an engine that generates while the trainer trains, and this {type(engine).__name__} uses the "
            "trainer's weights or card",
            "engine.own_copy=true for transformers, engine.device=cuda:N (engine.engine.device) for vllm",
        )


def one_writer(scheduler: ClipScheduler | None, callbacks: list[Callback]) -> None:
    """Refuse two schedules."""
    others = [type(callback).__name__ for callback in callbacks if isinstance(callback, ClipScheduler)]
    if scheduler is not None and others or len(others) > 1:
        names = [*([type(scheduler).__name__] if scheduler else []), *others]
        raise ConfigError(
            f"clip schedulers {', '.join(names)}", "one writer of the clip range", "clip=constant"
        )


def powerless(module: RLVRModule, scheduler: ClipScheduler | None, sizes: DataConfig) -> list[str]:
    """Why clipping cannot act in this run, if it cannot."""
    reasons = []
    if sizes.updates == 1:
        reasons.append(
            "one update per rollout batch: every ratio is 1 and every clip scheme a no-op; "
            "set data.minibatches=8 or data.epochs=2"
        )
    if module.algorithm.lr == 0:
        reasons.append("algorithm.lr=0: nothing is trained and no ratio leaves 1; set algorithm.lr=1e-6")
    if module.regions is not None and module.regions.mode == "only":
        reasons.append(
            "regions.mode=only replaces the loss's own clip by the band 0.7 < r < 1.3; extend keeps it"
        )
    return reasons
