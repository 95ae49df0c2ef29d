"""One training run, from a composed configuration to its report."""

import copy
import json
import logging
import os
import platform
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import DictConfig
from transformers.utils.logging import disable_progress_bar

from rlvr.algorithm import Algorithm
from rlvr.batch import IterationFacts
from rlvr.callbacks import (
    AdaptiveEntropyCoef,
    AtomicCheckpointIO,
    Checkpoints,
    ClipScheduler,
    EntropyRegions,
    RunRecord,
    Samples,
    StopRequest,
)
from rlvr.clipping import ClipRange, LinearThreshold
from rlvr.data import RolloutDataModule
from rlvr.errors import ConfigError
from rlvr.instantiate import build, check, plain
from rlvr.losses import Aggregation, Loss, LossInputs, Needs, Totals, check_clip, name_of, needs_of
from rlvr.module import RLVRModule
from rlvr.regions import RegionAblation
from rlvr.settings import DataConfig, EvaluationConfig

SIDES = ("lower", "upper")


def train(cfg: DictConfig, run_dir: str, overrides: list[str]) -> int:
    """Train, and leave a run folder.

    Args:
        cfg: composed ``conf/train.yaml``.
        run_dir: the run's folder.
        overrides: what was asked for on the command line, for the summary.

    Returns:
        Exit status: 0, 3 where the run stopped itself, 128 + signal where it was asked to stop.

    Raises:
        ConfigError: for anything that cannot work, before anything is loaded where that can be known.
    """
    folder = Path(run_dir)
    check(cfg)
    _quiet()
    checkpoint = _checkpoint(cfg.ckpt_path, folder)
    algorithm: Algorithm = build(cfg, "algorithm")
    _rehearse(algorithm.loss, algorithm.aggregation)
    sizes = DataConfig(**plain(cfg.data))
    evaluation = EvaluationConfig(**plain(cfg.evaluation))
    clip_range, scheduler = _clip(build(cfg, "clip"))
    bf16 = "bf16" in str(cfg.trainer.get("precision")) or cfg.policy.get("dtype") == "bfloat16"
    regions = _regions(cfg, scheduler, bf16)
    loss_warnings = _check_loss(algorithm.loss, clip_range, scheduler, regions)
    callbacks: list[Callback] = [build(cfg, f"callbacks.{name}") for name in cfg.callbacks or {}]
    _one_writer(scheduler, callbacks)
    task = build(cfg, "task")
    verifier = build(cfg, "verifier")

    if cfg.threads is not None or cfg.policy.path is None:
        # A model of the embedded one's size runs fastest on one thread.
        torch.set_num_threads(cfg.threads or 1)
    policy = build(cfg, "policy")
    engine = build(cfg, "engine", policy=policy)
    module = RLVRModule(
        policy,
        algorithm,
        clip_range,
        regions=regions,
        temperature=sizes.temperature,
        updates=sizes.updates,
        seed=cfg.seed,
    )
    data = RolloutDataModule(task, engine, verifier, sizes, evaluation, seed=cfg.seed)
    stop = StopRequest()
    checkpoints = Checkpoints(
        folder, every=cfg.checkpoint.every, keep_every=cfg.checkpoint.keep_every, stop=stop
    )
    for callback in callbacks:
        if isinstance(callback, Samples):
            callback.folder = folder
    schedulers = [] if scheduler is None else [scheduler]
    record = RunRecord(folder, name=os.environ.get("RLVR_RUN_NAME", ""))
    trainer: Trainer = build(
        cfg,
        "trainer",
        callbacks=[*schedulers, *callbacks, record, checkpoints],
        logger=_logger(cfg, checkpoint),
        default_root_dir=str(folder),
        plugins=[AtomicCheckpointIO()],
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        check_val_every_n_epoch=evaluation.every,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    objective = effective_objective(module, scheduler, sizes, int(cfg.trainer.max_epochs))
    objective += "".join(f", {each}" for each in callbacks if isinstance(each, AdaptiveEntropyCoef))
    if trainer.is_global_zero:
        print(objective, flush=True)
        for warning in [*loss_warnings, *powerless(module, scheduler, sizes)]:
            print(f"WARNING: {warning}", file=sys.stderr, flush=True)
    try:
        if checkpoint is None:
            trainer.validate(module, data, verbose=False)
        try:
            trainer.fit(
                module, data, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True
            )
        except SystemExit:  # Lightning's way to leave at an interrupt, which is our second signal
            if stop.signal is None:
                raise
            print(f"stopped at once: {Signals(stop.signal).name}; ckpt_path=auto continues", flush=True)
            return 128 + stop.signal
        complete = stop.signal is None and checkpoints.stop_reason is None and module.ledger.rows
        if complete and not any(key.startswith("val/") for key in module.ledger.rows[-1]):
            trainer.validate(module, data, verbose=False)
    finally:
        engine.close()
    if trainer.is_global_zero:
        finish(cfg, folder, module, callbacks, trainer.loggers, objective, overrides, checkpoints.stop_reason)
    if checkpoints.stop_reason is not None:
        print(
            f"stopped: {checkpoints.stop_reason}; saved in {checkpoints.last}; ckpt_path=last continues",
            flush=True,
        )
        return 3 if stop.signal is None else 128 + stop.signal
    return 0


def effective_objective(
    module: RLVRModule, scheduler: ClipScheduler | None, sizes: DataConfig, iterations: int
) -> str:
    """One line that says what is being optimised."""
    algorithm = module.algorithm
    aggregation = getattr(algorithm.aggregation, "func", algorithm.aggregation)
    regions = module.regions
    parts = [
        name_of(algorithm.loss),
        getattr(aggregation, "__name__", type(aggregation).__name__),
        "no bounds"
        if needs_of(algorithm.loss).bounds == "none"
        else str(module.clip_range if scheduler is None else scheduler),
        f"{sizes.updates} updates per {sizes.num_prompts * sizes.group_size} responses",
        f"{iterations} iterations",
        f"KL {algorithm.kl_coef:g}" + (f" ({algorithm.kl_estimator})" if algorithm.kl_coef else ""),
        f"entropy bonus {algorithm.entropy_coef:g}",
        f"lr {algorithm.lr:g} {algorithm.lr_schedule}",
    ]
    if regions is not None:
        parts.append(f"regions {regions.mode} {','.join(regions.keep)} ({regions.by})")
    return "objective: " + ", ".join(parts)


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


def finish(
    cfg: DictConfig,
    folder: Path,
    module: RLVRModule,
    callbacks: list[Callback],
    loggers: list[Logger],
    objective: str,
    overrides: list[str],
    stop_reason: str | None,
) -> None:
    """Write ``summary.json`` and ``report/``, and the policy where the run has come to its end."""
    from matplotlib.image import imread  # slow to import, and not needed before

    from rlvr.report import fit_reward, write_report

    rows, start = module.ledger.rows, module.ledger.start
    if not rows:
        return
    first, last = rows[0], rows[-1]
    heldout = next((key for key in {**start, **last} if key.startswith("val/heldout/mean_at")), "")
    seconds = sum(row["time/iteration_s"] for row in rows)
    summary = {
        "status": stop_reason or "finished",
        "objective": objective.removeprefix("objective: "),
        "iterations": len(rows),
        "reward_first": first["rollout/reward_mean"],
        "reward_last": last["rollout/reward_mean"],
        "entropy_first": first["rollout/entropy"],
        "entropy_last": last["rollout/entropy"],
        "heldout_first": start.get(heldout),
        "heldout_last": last.get(heldout),
        "heldout_metric": heldout,
        "heldout_start": start,
        "heldout_end": {key: value for key, value in last.items() if key.startswith("val/")},
        "reward_fit": fit_reward(rows),
        "seconds": seconds,
        "tokens_per_s": sum(row["perf/tokens_per_s"] * row["time/iteration_s"] for row in rows) / seconds,
        "seed": cfg.seed,
        "overrides": overrides,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("rlvr", "torch", "lightning", "transformers")},
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    mode = module.clip_range.mode
    ranges = [
        ClipRange(
            **{
                side: LinearThreshold(row[f"clip/{side}_slope"], row[f"clip/{side}_intercept"])
                for side in SIDES
            },
            mode=mode,
        )
        for row in rows
    ]
    region_map = next((regions.map() for regions in callbacks if isinstance(regions, EntropyRegions)), None)
    pictures = write_report(folder, rows, start, ranges=ranges, region_map=region_map)
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            for picture in pictures:
                image = imread(picture)[..., :3]
                logger.experiment.add_image(f"report/{picture.stem}", image, len(rows), dataformats="HWC")
    if cfg.export and stop_reason is None:
        module.policy.save(folder / "policy")
    print(f"run folder: {folder}", flush=True)


def _clip(node: Any) -> tuple[ClipRange, ClipScheduler | None]:
    """The initial clip range, and the scheduler where there is one."""
    if isinstance(node, ClipScheduler):
        return ClipRange.fixed(0.2, 0.2), node
    if isinstance(node, ClipRange):
        return node, None
    raise ConfigError(
        f"clip._target_: {type(node).__name__}", "a ClipRange or a ClipScheduler callback", "clip=constant"
    )


def _rehearse(loss: Loss, aggregation: Aggregation) -> None:
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


def _check_loss(
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


def _regions(cfg: DictConfig, scheduler: ClipScheduler | None, bf16: bool) -> RegionAblation | None:
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


def _one_writer(scheduler: ClipScheduler | None, callbacks: list[Callback]) -> None:
    others = [type(callback).__name__ for callback in callbacks if isinstance(callback, ClipScheduler)]
    if scheduler is not None and others or len(others) > 1:
        names = [*([type(scheduler).__name__] if scheduler else []), *others]
        raise ConfigError(
            f"clip schedulers {', '.join(names)}", "one writer of the clip range", "clip=constant"
        )


def _checkpoint(wanted: str | None, folder: Path) -> Path | None:
    last = folder / "checkpoints" / "last.ckpt"
    if wanted is None:
        if last.exists():
            raise ConfigError(
                f"hydra.run.dir={folder}",
                "a folder without a run in it",
                "ckpt_path=last to continue that run",
            )
        return None
    if wanted == "auto":
        return last if last.exists() else None
    path = last if wanted == "last" else Path(wanted)
    if not path.is_file():
        raise ConfigError(
            f"ckpt_path={wanted}",
            f"a checkpoint at {path}",
            "hydra.run.dir=<the run's folder>, or ckpt_path=auto",
        )
    return path


def _logger(cfg: DictConfig, checkpoint: Path | None) -> Logger | bool:
    if not cfg.logger:
        return False
    logger: Logger = build(cfg, "logger")
    if checkpoint is not None and isinstance(logger, TensorBoardLogger):
        # What the killed run logged after its last checkpoint is logged again.
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        logger._kwargs["purge_step"] = len(state["rlvr"]["ledger"]["rows"])
    return logger


def _quiet() -> None:
    """Silence what Lightning says about its defaults; what matters is in the objective line."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    disable_progress_bar()
    for message in (
        # The stream has to be sized, see data.py.
        r"Your `IterableDataset` has `__len__` defined",
        r"The '.*_dataloader' does not have many workers",
        r"Trying to infer the `batch_size`",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
