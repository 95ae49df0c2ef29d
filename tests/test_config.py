"""Every configuration that is shipped composes and checks; what cannot work is said in one line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from rlvr.command import with_lists
from rlvr.errors import ConfigError
from rlvr.evaluation import NODES
from rlvr.instantiate import CONF, TOP_LEVEL, build, check, check_nodes, plain
from rlvr.settings import DataConfig, EvaluationConfig
from rlvr.train import main

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
NEEDS_A_DOWNLOAD = {("policy", "smollm2_135m")}
NEEDS_ANOTHER_ENGINE = {("engine", "vllm"), ("engine", "vllm_shared")}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=["hydra.run.dir=unused", "logger=none", *overrides])


def choices(*groups: str) -> list[Any]:
    return [pytest.param(*choice, id="=".join(choice)) for choice in CHOICES if choice[0] in groups]


@pytest.mark.parametrize(("group", "choice"), choices(*GROUPS))
def test_composes_and_checks(group: str, choice: str) -> None:
    """The sweeps too: what they sweep over is the sweeper's, not a node of the job."""
    check(composed(f"{group}={choice}"))


@pytest.mark.parametrize(
    ("group", "choice"),
    [
        pytest.param(*choice, id="=".join(choice))
        for choice in CHOICES
        if choice[0] in ("policy", "task", "engine", "verifier", "algorithm", "clip", "callbacks", "trainer")
        and choice not in NEEDS_A_DOWNLOAD | NEEDS_ANOTHER_ENGINE
    ],
)
def test_instantiates(group: str, choice: str, tmp_path: Path) -> None:
    cfg = composed(f"{group}={choice}")
    if group == "task" and "path" in cfg.task:  # in the place of a download
        rows = [f'{{"prompt": "{i} + {i}?", "answer": {2 * i}}}\n' for i in range(2)]
        (tmp_path / "problems.jsonl").write_text("".join(rows))
        cfg.task.path, cfg.task.heldout = str(tmp_path / "problems.jsonl"), 1
    if group == "callbacks":
        for name in cfg.callbacks:
            build(cfg, f"callbacks.{name}")
        return
    given = {"policy": build(cfg, "policy")} if group == "engine" else {}
    assert build(cfg, group, **given) is not None


@pytest.mark.parametrize(
    ("sweep", "values"),
    [
        pytest.param(path.stem, OmegaConf.load(path).hydra.sweeper.params, id=path.stem)
        for path in sorted((CONF / "sweep").glob("*.yaml"))
    ],
)
def test_every_point_of_a_sweep_composes(sweep: str, values: DictConfig) -> None:
    base = ["clip=id"] if sweep == "turns" else []
    for key, listed in values.items():
        points = listed.split("],") if "[" in listed else listed.split(",")
        for point in points:
            value = f"{point.strip(',')}]" if "[" in point and not point.endswith("]") else point
            check(composed(*base, f"{key}={value}"))


def test_no_folder_of_choices_is_empty() -> None:
    assert {group for group, _ in CHOICES} == set(GROUPS)


def test_every_node_of_the_configuration_is_known() -> None:
    assert set(composed()) == set(TOP_LEVEL)


# The paper's runs
# ------------------------------------------------------------

PAPER_RUNS = {"qwen2_5_math_7b_dapo": 4096, "qwen2_5_7b_dapo": 8192}
"""Prompt and response together, in tokens."""


@pytest.mark.parametrize("algorithm", [choice for group, choice in CHOICES if group == "algorithm"])
@pytest.mark.parametrize("experiment", PAPER_RUNS)
def test_the_paper_s_runs_compose_with_every_algorithm(experiment: str, algorithm: str) -> None:
    """Sizes of arXiv:2602.09782, app. C, whatever the algorithm; its clip is the algorithm's own."""
    cfg = composed(f"experiment={experiment}", f"algorithm={algorithm}")
    check(cfg)
    sizes, evaluation = DataConfig(**plain(cfg.data)), EvaluationConfig(**plain(cfg.evaluation))
    assert sizes.max_prompt_tokens + sizes.max_new_tokens == PAPER_RUNS[experiment]
    assert (sizes.num_prompts, sizes.group_size) == (512, 8)
    assert sizes.num_prompts / sizes.minibatches == 64
    assert (sizes.updates, sizes.temperature, sizes.top_p) == (8, 1.0, 1.0)
    assert (cfg.algorithm.lr, cfg.algorithm.weight_decay, cfg.algorithm.gradient_clip) == (1e-6, 0.1, 1.0)
    assert cfg.algorithm.kl_coef == 0
    assert (cfg.trainer.max_epochs, cfg.engine.engine.tensor_parallel_size) == (400, 4)
    assert cfg.trainer.devices % cfg.engine.ranks == 0
    assert (sizes.num_prompts / sizes.minibatches) % cfg.trainer.devices == 0, "as much work for every rank"
    assert (cfg.engine.engine.max_prompt_tokens, cfg.engine.engine.max_new_tokens) == (
        sizes.max_prompt_tokens,
        sizes.max_new_tokens,
    )
    assert list(cfg.benchmark) == ["aime24", "aime25", "amc", "math500", "gsm8k", "olympiad"]
    assert evaluation.samples is None, "each benchmark's own"
    assert cfg.clip == composed(f"algorithm={algorithm}").clip


# Benchmarks
# ------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        pytest.param(["benchmark=a,b"], ["benchmark=[a,b]"], id="several"),
        pytest.param(["benchmark=a,"], ["benchmark=[a]"], id="a comma too many"),
        pytest.param(["seed=1", "benchmark=a"], ["seed=1", "benchmark=a"], id="one"),
        pytest.param(["benchmark=[a,b]"], ["benchmark=[a,b]"], id="a list"),
        pytest.param(["-m", "benchmark=a,b"], ["-m", "benchmark=a,b"], id="a sweep"),
        pytest.param(["--multirun", "benchmark=a,b"], ["--multirun", "benchmark=a,b"], id="a sweep, in full"),
        pytest.param(
            ["clip=id,did", "+x=benchmark=a,b"], ["clip=id,did", "+x=benchmark=a,b"], id="other lists"
        ),
    ],
)
def test_a_comma_list_of_benchmarks_is_a_list(arguments: list[str], expected: list[str]) -> None:
    assert with_lists(arguments) == expected


@pytest.mark.parametrize("choice", [choice for group, choice in CHOICES if group == "benchmark"])
def test_a_benchmark_composes_and_checks_in_an_evaluation(choice: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", overrides=[f"benchmark=[{choice}]"])
    check_nodes(cfg, NODES, ("policy", "engine"))
    assert set(cfg) == set(NODES)
    assert list(cfg.benchmark) == [choice]


# What cannot work
# ------------------------------------------------------------

TWO_RANKS = ("trainer=fsdp", "trainer.devices=2", "engine.own_copy=true")
WRONG = [
    pytest.param(["clip=id", "clip.trun=0.4"], "trun", id="a misspelt key"),
    pytest.param(["clip=constant", "clip.turn=0.4"], "turn", id="a key of another choice"),
    pytest.param(["clip=constant", "+clip.turn=0.4"], "clip.turn=0.4", id="a key of another choice, added"),
    pytest.param(["clip=nosuch"], "nosuch", id="no such choice"),
    pytest.param(["experiment=nosuch"], "nosuch", id="no such experiment"),
    pytest.param(["+foo=1"], "foo", id="a node that nothing reads"),
    pytest.param(["+callbacks.mine.every=3"], "callbacks.mine", id="a callback without _target_"),
    pytest.param(["+callbacks.mine._target_=no.such.Class"], "no.such.Class", id="a class that is not there"),
    pytest.param(
        ["clip=id", "+callbacks.second._target_=rlvr.callbacks.OscillatoryDecay"],
        "IncreaseThenDecrease, OscillatoryDecay",
        id="two schedulers",
    ),
    pytest.param(
        ["clip=id", "regions.keep=[E1]", "regions.mode=only"],
        "regions.mode=only",
        id="a schedule beside only",
    ),
    pytest.param(["regions.keep=[E5]"], "E5", id="a region that is not there"),
    pytest.param(["regions.keep=[E1]", "regions.mode=some"], "some", id="a region mode that is not there"),
    pytest.param(
        ["regions.keep=[E1]", "regions.by=hand"], "hand", id="a region definition that is not there"
    ),
    pytest.param(["regions.keep=[E1]", "regions.tolerance=-1"], "-1", id="a negative tolerance"),
    pytest.param(["data.group_size=1"], "data.group_size=1", id="groups of one"),
    pytest.param(["data.minibatches=3"], "data.minibatches=3", id="mini-batches that do not divide"),
    pytest.param(["data.num_prompts=0"], "data.num_prompts=0", id="no prompts"),
    pytest.param(["data.num_prompts=many"], "many", id="a word for a number of prompts"),
    pytest.param(["data.num_prompts=null"], "data.num_prompts=None", id="no number of prompts"),
    pytest.param(["trainer.max_epochs=null"], "trainer.max_epochs=None", id="no number of iterations"),
    pytest.param(["data.micro_batch_size=0"], "data.micro_batch_size=0", id="empty micro-batches"),
    pytest.param(
        ["data.tokens_per_micro_batch=1033"],
        "data.tokens_per_micro_batch=1034",
        id="a budget below the longest sequence",
    ),
    pytest.param(
        ["data.tokens_per_micro_batch=all"], "data.tokens_per_micro_batch=all", id="a word for a budget"
    ),
    pytest.param(
        ["policy.attention=eager", "policy.packing=true"], "policy.packing=true", id="packing that cannot be"
    ),
    pytest.param(["policy.packing=1"], "policy.packing=1", id="a number for a switch"),
    pytest.param(["data.max_new_tokens=0"], "data.max_new_tokens=0", id="no tokens"),
    pytest.param(["data.temperature=0"], "data.temperature=0", id="greedy training"),
    pytest.param(["data.temperature=nan"], "data.temperature=nan", id="temperature not a number"),
    pytest.param(["data.top_p=0"], "data.top_p=0", id="top-p 0"),
    pytest.param(["data.top_k=-1"], "data.top_k=-1", id="top-k below 0"),
    pytest.param(["evaluation.samples=0"], "evaluation.samples=0", id="no samples"),
    pytest.param(
        ["evaluation.temperature=-1"], "evaluation.temperature=-1", id="evaluation below temperature 0"
    ),
    pytest.param(["evaluation.top_p=0"], "evaluation.top_p=0", id="evaluation at top-p 0"),
    pytest.param(["checkpoint.every=0"], "checkpoint.every=0", id="a checkpoint every 0 iterations"),
    pytest.param(["checkpoint.keep_every=-1"], "checkpoint.keep_every=-1", id="kept every -1 iterations"),
    pytest.param(["clip=id", "clip.turn=1.5"], "1.5", id="a turn after the end"),
    pytest.param(["clip=id", "clip.second_phase=both"], "both", id="a reading that is not there"),
    pytest.param(["clip=id", "clip.mode=new"], "new", id="a clip mode that is not there"),
    pytest.param(["clip=od", "clip.floor=1"], "floor", id="a floor of all"),
    pytest.param(["clip.low=1.2"], "1.2", id="a lower threshold above 1"),
    pytest.param(["clip.high=-0.2"], "-0.2", id="a negative threshold"),
    pytest.param(["algorithm.lr=-1"], "algorithm.lr=-1", id="a negative learning rate"),
    pytest.param(["algorithm.lr=nan"], "algorithm.lr=nan", id="a learning rate not a number"),
    pytest.param(["algorithm.lr=fast"], "fast", id="a word for a learning rate"),
    pytest.param(["algorithm.warmup=1"], "algorithm.warmup=1", id="warm-up without end"),
    pytest.param(["algorithm.gradient_clip=0"], "algorithm.gradient_clip=0", id="gradients clipped to 0"),
    pytest.param(["algorithm.max_skipped=0"], "algorithm.max_skipped=0", id="no skip allowed"),
    pytest.param(["algorithm.kl_estimator=k1"], "k1 has zero expected gradient", id="k1 as a loss"),
    pytest.param(["algorithm.lr_schedule=linear"], "linear", id="no such learning rate schedule"),
    pytest.param(["+algorithm.loss.dual_clip=0.5"], "0.5", id="a dual clip below 1"),
    pytest.param(["algorithm=sapo", "clip=id"], "clip=IncreaseThenDecrease", id="a schedule without bounds"),
    pytest.param(["algorithm=sapo", "clip=clip_higher"], "sapo has no bounds", id="bounds for SAPO"),
    pytest.param(["algorithm=kl_cov", "clip=dynamic_upper"], "KLCov has no bounds", id="bounds for KL-Cov"),
    pytest.param(["algorithm=reinforce", "clip.low=0.1"], "reinforce has no", id="bounds for REINFORCE"),
    pytest.param(["algorithm=gspo", "clip=dynamic_upper"], "clip=gspo", id="GSPO by a token's probability"),
    pytest.param(["algorithm=gspo", "clip=did"], "clip=gspo", id="GSPO under a schedule by probability"),
    pytest.param(["algorithm=gspo", "clip=od"], "clip=gspo", id="GSPO under OD"),
    pytest.param(["algorithm=dcpo_clip", "clip=id"], "clip=dcpo", id="DCPO under a schedule by probability"),
    pytest.param(["algorithm=cispo", "clip=constant"], "clip=cispo", id="CISPO under PPO's bounds"),
    pytest.param(["algorithm=cispo", "clip=id"], "clip=cispo", id="CISPO under a schedule of PPO's bounds"),
    pytest.param(["algorithm=gspo", "regions.keep=[E1]"], "regions.mode=only", id="a band of sequences"),
    pytest.param(
        ["algorithm=sapo", "regions.keep=[E1]", "regions.mode=extend"],
        "regions.mode=extend",
        id="no clip to extend",
    ),
    pytest.param(
        ["algorithm=cispo", "regions.keep=[E1]", "regions.mode=extend"],
        "regions.mode=extend",
        id="a cap is no clip to extend",
    ),
    pytest.param(["algorithm=sapo", "algorithm.loss.tau_positive=0"], "tau_positive", id="no gate"),
    pytest.param(["algorithm=clip_cov", "algorithm.loss.fraction=2"], "fraction", id="more than all tokens"),
    pytest.param(["algorithm=dr_grpo", "algorithm.aggregation.length=0"], "length", id="a constant of 0"),
    pytest.param(
        ["callbacks=adaptive_entropy", "callbacks.entropy_coef.target=0"],
        "callbacks.entropy_coef.target=0",
        id="an entropy to be held at 0",
    ),
    pytest.param(["+algorithm.loss.dual=3"], "algorithm.loss.dual=3", id="no such argument of the loss"),
    pytest.param(["+trainer.gradient_clip_val=1"], "trainer.gradient_clip_val", id="the trainer's clipping"),
    pytest.param(
        ["+trainer.accumulate_grad_batches=2"], "accumulate_grad_batches", id="the trainer's accumulation"
    ),
    pytest.param(["+trainer.max_steps=10"], "trainer.max_steps", id="the trainer's step limit"),
    pytest.param(["trainer.max_epochs=0"], "trainer.max_epochs=0", id="no iterations"),
    pytest.param(["trainer.precision=int3"], "int3", id="no such precision"),
    pytest.param(
        ["task=gsm8k", "task.path=/nowhere.jsonl"], "task.path=/nowhere.jsonl", id="no such task file"
    ),
    pytest.param(["task.train=0"], "train=0", id="no training prompts"),
    pytest.param(["task.levels=[7]"], "[7]", id="no such level"),
    pytest.param(["engine.max_num_seqs=0"], "max_num_seqs=0", id="an engine for no sequence"),
    pytest.param(["data.num_prompts=80"], "data.num_prompts=80", id="more prompts than the task has"),
    pytest.param(
        ["data.max_new_tokens=60"], "data.max_new_tokens=60", id="more tokens than the model has positions"
    ),
    pytest.param(
        [*TWO_RANKS, "trainer.strategy.context_parallel_size=0"],
        "context_parallel_size=0",
        id="a group of none",
    ),
    pytest.param(
        [*TWO_RANKS, "trainer.strategy.context_parallel_size=3"],
        "expected a divisor of the 2 ranks",
        id="groups that do not go round the ranks",
    ),
    pytest.param(
        [*TWO_RANKS, "trainer.strategy.context_parallel_size=2"],
        "the policy's 3 attention heads and of the 2 ranks: 1; try trainer.strategy.context_parallel_size=1",
        id="heads that do not go round a group",
    ),
    pytest.param(
        [*TWO_RANKS, "trainer.strategy.context_parallel_size=2", "policy.packing=false"],
        "policy.packing not false",
        id="padded rows in chunks",
    ),
    pytest.param(["policy.path=/nowhere"], "policy.path=/nowhere", id="no such policy folder"),
    pytest.param(["policy.path=/nowhere.gguf"], "policy.path=/nowhere.gguf", id="no such policy file"),
    pytest.param(["policy.dtype=int8"], "policy.dtype=int8", id="no such dtype"),
    pytest.param(["benchmark=math500,nosuch"], "nosuch", id="no such benchmark"),
    pytest.param(["+benchmark.mine.path=x"], "benchmark.mine", id="a benchmark without _target_"),
    pytest.param(
        ["benchmark=aime24", "benchmark.aime24.n=3"], "benchmark.aime24.n", id="no such argument of it"
    ),
    pytest.param(["clip=id", "a b"], "a b", id="no override at all"),
]
NEEDS_THE_POLICY = {
    "more prompts than the task has",
    "more tokens than the model has positions",
    "an engine for no sequence",
    "no such precision",
    "heads that do not go round a group",
    "padded rows in chunks",
    "no such policy folder",
    "no such policy file",
    "no such dtype",
}


@pytest.mark.parametrize(("overrides", "names"), WRONG)
def test_refused_in_one_line(
    overrides: list[str],
    names: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """What is wrong, what was expected, an override; before the policy is looked for, where that can be."""
    early = [] if request.node.callspec.id in NEEDS_THE_POLICY else ["policy.path=/no/such/policy"]
    sizes = [size for size in runs.SMALL if not any(size.split("=")[0] in asked for asked in overrides)]
    if any("task=" in asked for asked in overrides):
        sizes = [size for size in sizes if "task." not in size]
    monkeypatch.setattr(
        sys, "argv", ["rlvr-train", *sizes, *early, *overrides, f"hydra.run.dir={tmp_path}/run"]
    )
    with pytest.raises(SystemExit) as left:
        main()
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert error.startswith("rlvr-train: ")
    assert error.count("\n") == 1, error
    assert names in error
    assert "expected" in error
    assert "try " in error or "rlvr-train --cfg job" in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_traceback_is_there_for_those_who_want_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlvr.train", "clip.turn=0.4", f"hydra.run.dir={tmp_path}"]
    run = subprocess.run(
        command, env={"HYDRA_FULL_ERROR": "1"}, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 1
    assert "Traceback" in run.stderr


# The command itself
# ------------------------------------------------------------

HEAVY = "torch", "lightning", "transformers", "vllm", "matplotlib", "torchmetrics"
LIST_HEAVY = f"import sys; print(sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)"


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(f"import rlvr; {LIST_HEAVY}", id="import rlvr"),
        pytest.param(
            f"import atexit, sys; atexit.register(lambda: exec({LIST_HEAVY!r})); "
            "sys.argv = ['rlvr-train', '--help']; from rlvr.train import main; main()",
            id="rlvr-train --help",
        ),
        pytest.param(
            f"import atexit, sys; atexit.register(lambda: exec({LIST_HEAVY!r})); "
            "sys.argv = ['rlvr-train', 'clip.trun=1']; from rlvr.train import main; main()",
            id="rlvr-train with a wrong key",
        ),
        pytest.param(
            f"import atexit, sys; atexit.register(lambda: exec({LIST_HEAVY!r})); "
            "sys.argv = ['rlvr-eval', '--help']; from rlvr.evaluate import main; main()",
            id="rlvr-eval --help",
        ),
    ],
)
def test_loads_nothing_heavy(code: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stderr.splitlines()[-1] == "[]", run.stderr


def test_help_lists_every_choice(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("rlvr-train")
    run = subprocess.run(
        [script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    for group, choice in CHOICES:
        assert group in run.stdout
        assert choice in run.stdout
    assert not run.stderr


def test_the_installed_command_refuses_in_one_line(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("rlvr-train")
    run = subprocess.run(
        [script, "data.group_size=1", "hydra.run.dir=run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (
        "rlvr-train: data.group_size=1: expected at least 2: a response is compared with the others of its "
        "group; try data.group_size=8\n"
    )


def test_without_vllm_the_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    cfg = composed("engine=vllm")
    with pytest.raises(ConfigError, match=r"make vllm-cpu for a CPU; try engine=transformers"):
        build(cfg, "engine", policy=build(cfg, "policy"))
