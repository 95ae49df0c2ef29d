"""The fused head against plain autograd through full logits, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlvr.clipping import ClipRange
from rlvr.logprobs import Objective, TokenStats, token_objective, token_stats
from rlvr.losses import LossInputs, ppo_clip

N, D, V = 23, 6, 17


class Problem:
    """A head, its tokens and a token-mean PPO-clip loss with entropy bonus."""

    def __init__(self, tokens: int = N, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.hidden = normal(tokens, D).to(dtype).requires_grad_()
        self.weight = normal(V, D).to(dtype).requires_grad_()
        self.bias = normal(V).to(dtype).requires_grad_()
        self.targets = torch.randint(V, (tokens,), generator=generator)
        self.advantages = normal(tokens)
        self.old_logprobs = plain_stats(self, 0.7).logprobs.detach().double() + 0.3 * normal(tokens)

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def loss(self, logprobs: Tensor, entropy: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """An objective: this chunk's share, and which tokens are kept."""
        inputs = LossInputs(
            logprobs=logprobs,
            old_logprobs=self.old_logprobs[rows],
            advantages=self.advantages[rows],
            mask=torch.ones_like(logprobs, dtype=torch.bool),
            clip=ClipRange.fixed(0.2, 0.2),
        )
        outputs = ppo_clip(inputs)
        return (outputs.loss - 0.3 * entropy).sum() / max(len(self.targets), 1), {"kept": outputs.kept}


def plain_stats(problem: Problem, temperature: float = 1.0) -> TokenStats:
    """The oracle: full logits and sums by definition."""
    logits = (problem.hidden @ problem.weight.t() + problem.bias) / temperature
    logprobs = logits.log_softmax(dim=-1)
    probs = logprobs.exp()
    return TokenStats(
        logprobs[torch.arange(len(logprobs)), problem.targets],
        -(probs * logprobs).sum(dim=-1),
        (probs * probs).sum(dim=-1).detach(),
        (probs * probs * logprobs).sum(dim=-1).detach(),
    )


def one_pass(problem: Problem, **options: Any) -> Tensor:
    return token_objective(
        problem.hidden, problem.weight, problem.targets, problem.loss, bias=problem.bias, **options
    )[0]


def two_pass(problem: Problem, **options: Any) -> Tensor:
    stats = token_stats(problem.hidden, problem.weight, problem.targets, bias=problem.bias, **options)
    return problem.loss(stats.logprobs, stats.entropy, slice(None))[0]


def plain(problem: Problem, temperature: float = 1.0) -> Tensor:
    stats = plain_stats(problem, temperature)
    return problem.loss(stats.logprobs, stats.entropy, slice(None))[0]


ways = pytest.mark.parametrize("way", [one_pass, two_pass], ids=["one pass", "two passes"])


def assert_all_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-11, atol=1e-13)


# --- values ---


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 9),
    chunk_size=st.integers(1, 10),
    temperature=st.floats(0.05, 10.0),
    seed=st.integers(0, 10**6),
)
def test_statistics_are_their_definitions(
    tokens: int, chunk_size: int, temperature: float, seed: int
) -> None:
    problem = Problem(tokens, seed)
    stats = token_stats(
        problem.hidden,
        problem.weight,
        problem.targets,
        bias=problem.bias,
        temperature=temperature,
        chunk_size=chunk_size,
    )
    assert_all_close(stats, plain_stats(problem, temperature))
    assert (stats.entropy >= 0).all()
    assert not stats.moment.requires_grad
    assert not stats.log_moment.requires_grad


def test_by_hand() -> None:
    """Probabilities 3/4 and 1/4: H = ln 4 - 3/4 ln 3, sum of squares 10/16."""
    weight = torch.tensor([[3.0], [1.0]], dtype=torch.float64).log()
    stats = token_stats(torch.ones(1, 1, dtype=torch.float64), weight, torch.tensor([1]))
    probs = torch.tensor([0.75, 0.25], dtype=torch.float64)
    assert stats.logprobs.exp().item() == pytest.approx(0.25)
    assert stats.entropy.item() == pytest.approx((torch.log(torch.tensor(4.0)) - 0.75 * weight[0]).item())
    assert stats.moment.item() == pytest.approx(10 / 16)
    assert stats.log_moment.item() == pytest.approx((probs.square() * probs.log()).sum().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_are_float32(dtype: torch.dtype) -> None:
    problem = Problem(dtype=dtype)
    loss, stats, extras = token_objective(problem.hidden, problem.weight, problem.targets, problem.loss)
    assert {tensor.dtype for tensor in stats} == {torch.float32}
    assert extras["dloss_dlogprobs"].dtype == torch.float32
    loss.backward()
    assert problem.hidden.grad.dtype == problem.weight.grad.dtype == dtype


# --- gradients ---


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck(temperature: float) -> None:
    """Log-prob and entropy, by finite differences, for hidden states, weight and bias."""
    problem = Problem(tokens=5)

    def differentiable(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        stats = token_stats(hidden, weight, problem.targets, bias=bias, temperature=temperature, chunk_size=2)
        return stats.logprobs, stats.entropy

    assert torch.autograd.gradcheck(differentiable, problem.parameters)


@ways
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_gradients_are_the_plain_ones(
    way: Callable[..., Tensor], temperature: float, chunk_size: int
) -> None:
    """PPO-clip with an entropy bonus; the loss is scaled on its way to backward."""
    problem = Problem()
    loss, expected = way(problem, temperature=temperature, chunk_size=chunk_size), plain(problem, temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert_all_close(
        torch.autograd.grad(2.5 * loss, problem.parameters),
        torch.autograd.grad(2.5 * expected, problem.parameters),
    )


def test_extras_and_statistics_of_one_pass() -> None:
    """Extras come back in token order, with d loss / d logprob; the statistics are those of token_stats."""
    problem = Problem()
    _, stats, extras = token_objective(
        problem.hidden, problem.weight, problem.targets, problem.loss, bias=problem.bias, chunk_size=4
    )
    oracle = plain_stats(problem)
    logprobs, entropy = (tensor.detach().requires_grad_() for tensor in oracle[:2])
    loss, facts = problem.loss(logprobs, entropy, slice(None))
    loss.backward()
    assert_all_close(stats, oracle)
    assert not any(tensor.requires_grad for tensor in (*stats, *extras.values()))
    assert 0 < int(extras["kept"].sum()) < N
    assert torch.equal(extras["kept"], facts["kept"])
    assert_all_close([extras["dloss_dlogprobs"]], [logprobs.grad])


@ways
def test_tied_embedding(way: Callable[..., Tensor]) -> None:
    """The weight is also the embedding below: both gradients add up."""
    problem = Problem()
    ids = torch.arange(N) % V
    grads = []
    for loss_of in (way, plain):
        problem.hidden = torch.tanh(problem.weight[ids])
        grads.append(torch.autograd.grad(loss_of(problem), [problem.weight, problem.bias]))
    assert_all_close(*grads)


@ways
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_none(way: Callable[..., Tensor], frozen: str) -> None:
    problem = Problem()
    getattr(problem, frozen).requires_grad_(False)
    trained = [tensor for tensor in problem.parameters if tensor.requires_grad]
    expected = torch.autograd.grad(plain(problem), trained)
    way(problem, chunk_size=4).backward()
    assert getattr(problem, frozen).grad is None
    assert_all_close([tensor.grad for tensor in trained], expected)


def test_micro_batches_accumulate() -> None:
    problem = Problem()
    one_pass(problem).backward()
    one_pass(problem).backward()
    expected = torch.autograd.grad(2 * plain(problem), problem.parameters)
    assert_all_close([tensor.grad for tensor in problem.parameters], expected)


def test_second_backward_is_refused() -> None:
    """Its gradients are scaled in place and handed on: a second backward would scale them twice."""
    loss = one_pass(Problem())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="works once"):
        loss.backward()


def test_objective_of_entropy_alone_and_of_nothing() -> None:
    problem = Problem()

    def gradient(objective: Objective) -> tuple[Tensor, Tensor]:
        loss, _, extras = token_objective(problem.hidden, problem.weight, problem.targets, objective)
        return torch.autograd.grad(loss, problem.hidden)[0], extras["dloss_dlogprobs"]

    problem.bias = torch.zeros(V, dtype=torch.float64)
    expected = torch.autograd.grad(plain_stats(problem).entropy.sum(), problem.hidden)
    by_hidden, by_logprob = gradient(lambda logprobs, entropy, rows: (entropy.sum(), {}))
    assert_all_close([by_hidden], expected)
    assert not by_logprob.any()
    by_hidden, by_logprob = gradient(lambda logprobs, entropy, rows: (logprobs.detach().sum(), {}))
    assert not by_hidden.any()
    assert not by_logprob.any()


# --- edges ---


@ways
def test_no_tokens(way: Callable[..., Tensor]) -> None:
    """An empty micro-batch: loss zero, gradients zero, and still part of the graph."""
    problem = Problem(tokens=0)
    loss = way(problem)
    loss.backward()
    assert loss.item() == 0
    assert [tensor.grad.abs().sum().item() for tensor in problem.parameters] == [0, 0, 0]


def test_no_tokens_keeps_the_extras() -> None:
    problem = Problem(tokens=0)
    _, stats, extras = token_objective(problem.hidden, problem.weight, problem.targets, problem.loss)
    assert {key: tuple(value.shape) for key, value in extras.items()} == {
        "kept": (0,),
        "dloss_dlogprobs": (0,),
    }
    assert {tuple(tensor.shape) for tensor in stats} == {(0,)}


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masked_vocabulary(way: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """A bias of -inf is the same as the smaller vocabulary, and its tokens get a gradient of exactly 0."""
    problem = Problem(dtype=dtype)
    problem.targets %= V - 3
    with torch.no_grad():
        problem.bias[V - 3 :] = -torch.inf
    smaller = Problem(dtype=dtype)
    smaller.targets = problem.targets
    smaller.weight, smaller.bias = (
        tensor.detach()[: V - 3].requires_grad_() for tensor in (problem.weight, problem.bias)
    )
    loss, expected = way(problem, chunk_size=5), way(smaller, chunk_size=5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(problem.hidden.grad, smaller.hidden.grad)
    torch.testing.assert_close(problem.weight.grad[: V - 3], smaller.weight.grad)
    assert not problem.weight.grad[V - 3 :].any()
    assert not problem.bias.grad[V - 3 :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_logits(dtype: torch.dtype) -> None:
    """Logits of 1e4 and -1e4 neither overflow nor lose the improbable token's log-prob."""
    weight = torch.tensor([[1e4], [-1e4], [1e4]], dtype=dtype, requires_grad=True)
    hidden = torch.ones(2, 1, dtype=dtype)
    stats = token_stats(hidden, weight, torch.tensor([1, 0]))
    log_2 = torch.tensor(2.0, dtype=dtype).log().item()
    assert stats.logprobs.tolist() == pytest.approx([-2e4 - log_2, -log_2])
    assert stats.entropy.tolist() == pytest.approx([log_2, log_2])
    assert stats.log_moment.tolist() == pytest.approx([-0.5 * log_2] * 2)
    (stats.logprobs.sum() + stats.entropy.sum()).backward()
    assert weight.grad.flatten().tolist() == pytest.approx([0.0, 1.0, -1.0], abs=1e-6)


def test_nan_is_not_hidden() -> None:
    """A NaN in one token's hidden state shows in its statistics and in no other token's."""
    problem = Problem(tokens=4)
    with torch.no_grad():
        problem.hidden[1, 0] = torch.nan
        stats = token_stats(problem.hidden, problem.weight, problem.targets)
    assert all(tensor.isnan().tolist() == [False, True, False, False] for tensor in stats)


# --- bf16 and autocast ---


@pytest.mark.parametrize("chunk_size", [512, 64, 8], ids="chunks of {}".format)
def test_bf16_weight_gradient_whatever_the_chunks(chunk_size: int) -> None:
    """Against float64 from the same inputs: 0.24 % in norm (plain bf16 logits too), 0.28 % in many chunks.

    bf16 rounds logits and products to 2^-9. A weight gradient summed in bf16 would be off by 0.41 % after 8
    chunks and 0.92 % after 64.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 32, generator=generator).bfloat16().requires_grad_()
    weight = (0.3 * torch.randn(400, 32, generator=generator)).bfloat16().requires_grad_()
    targets = torch.randint(400, (512,), generator=generator)
    loss, stats, _ = token_objective(
        hidden,
        weight,
        targets,
        lambda logprobs, entropy, rows: (logprobs.sum() + 0.1 * entropy.sum(), {}),
        chunk_size=chunk_size,
    )
    loss.backward()
    hidden_64, weight_64 = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    exact = token_stats(hidden_64, weight_64, targets)
    (exact.logprobs.sum() + 0.1 * exact.entropy.sum()).backward()
    torch.testing.assert_close(stats.logprobs.double(), exact.logprobs, rtol=0, atol=0.03)
    torch.testing.assert_close(stats.entropy.double(), exact.entropy, rtol=0, atol=0.03)
    for ours, theirs in ((hidden.grad, hidden_64.grad), (weight.grad, weight_64.grad)):
        assert (ours.double() - theirs).norm() / theirs.norm() < 0.0035


@ways
def test_autocast(way: Callable[..., Tensor]) -> None:
    """Under autocast the products are in bf16; gradients come back in the parameters' float32."""
    problem, rounded = Problem(dtype=torch.float32), Problem(dtype=torch.float32)
    for tensor in rounded.parameters:
        tensor.data = tensor.data.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        way(problem).backward()
    way(rounded).backward()
    for ours, theirs in zip(problem.parameters, rounded.parameters, strict=True):
        assert ours.grad.dtype == torch.float32
        assert torch.equal(ours.grad, theirs.grad.float())


# --- memory ---


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_of_all_logits(dtype: torch.dtype) -> None:
    """Forward and backward: nothing larger than a chunk's logits, or the weight itself."""
    problem = Problem(tokens=1000, dtype=dtype)
    for way in (one_pass, two_pass):
        with LargestTensor() as largest:
            way(problem, chunk_size=20).backward()
        assert largest.numel == max(20 * V, 1000 * D) < 1000 * V
    with LargestTensor() as largest:  # the instrument sees what it should
        plain(problem).backward()
    assert largest.numel == 1000 * V


def test_grad_disabled_stores_and_multiplies_nothing() -> None:
    """One matrix product a chunk, values only, in no_grad and in inference mode."""
    problem = Problem()

    class CountProducts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            self.count += "mm" in func.__name__
            return func(*args, **(kwargs or {}))

    expected = plain(problem)
    for disabled in (torch.no_grad, torch.inference_mode):
        with disabled(), CountProducts() as products:
            loss, stats, extras = token_objective(
                problem.hidden,
                problem.weight,
                problem.targets,
                problem.loss,
                bias=problem.bias,
                chunk_size=10,
            )
            again = token_stats(problem.hidden, problem.weight, problem.targets, bias=problem.bias)
        assert products.count == 3 + 1
        assert list(extras) == ["kept"]
        assert loss.item() == pytest.approx(expected.item())
        assert all(tensor.grad_fn is None and not tensor.requires_grad for tensor in (loss, *stats, *again))


def test_chunks_without_gradient_cost_nothing() -> None:
    """Tokens whose group has no advantage are common: their chunks end after the forward product."""
    problem = Problem(tokens=20)
    weights = torch.zeros(20, dtype=torch.float64)
    weights[3] = 1.0
    products = []

    class CountProducts(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            products.extend(["mm"] * ("mm" in func.__name__))
            return func(*args, **(kwargs or {}))

    with CountProducts():
        loss = token_objective(
            problem.hidden,
            problem.weight,
            problem.targets,
            lambda logprobs, entropy, rows: ((weights[rows] * logprobs).sum(), {}),
            chunk_size=5,
        )[0]
    assert len(products) == 4 + 2
    problem.bias = torch.zeros(V, dtype=torch.float64)
    assert_all_close(
        torch.autograd.grad(loss, [problem.hidden, problem.weight]),
        torch.autograd.grad(
            (weights * plain_stats(problem).logprobs).sum(), [problem.hidden, problem.weight]
        ),
    )


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"hidden": torch.zeros(2, 3, D)}, "must be", id="hidden [B, T, D]"),
        pytest.param({"weight": torch.zeros(V, D + 1)}, "must be", id="another D"),
        pytest.param(
            {"targets": torch.zeros(3, dtype=torch.int64)}, "targets", id="targets of another length"
        ),
        pytest.param({"targets": torch.zeros(2)}, "targets", id="targets float"),
        pytest.param({"bias": torch.zeros(V + 1)}, "bias", id="another V"),
        pytest.param({"weight": torch.zeros(V, D).bfloat16()}, "share a dtype", id="another dtype"),
        pytest.param({"temperature": 0.0}, "temperature=0.0", id="temperature 0"),
        pytest.param({"temperature": float("nan")}, "temperature=nan", id="temperature NaN"),
        pytest.param({"chunk_size": 0}, "chunk_size=0", id="chunk_size 0"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(2, D),
        "weight": torch.zeros(V, D),
        "targets": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        token_stats(**{**arguments, **change})
    with pytest.raises(ValueError, match=message):
        token_objective(**{**arguments, **change}, objective=lambda logprobs, *_: (logprobs.sum(), {}))


def test_a_contribution_is_a_scalar() -> None:
    problem = Problem()
    with pytest.raises(ValueError, match="scalar"):
        token_objective(
            problem.hidden, problem.weight, problem.targets, lambda logprobs, entropy, rows: (logprobs, {})
        )
