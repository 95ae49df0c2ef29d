r"""Fused linear head: log-prob, entropy and eq. 5 moments of every token, without ``[N, V]`` logits.

Everything is computed for one chunk of tokens at a time. With ``x`` the chunk's logits over the temperature,
shifted so that the largest is 0, and ``S = sum exp(x)``:

.. math::
    \ln \pi_a = x_a - \ln S, \qquad H = \ln S - \mathrm{E}_\pi[x], \qquad
    \nabla_x \ln \pi_a = e_a - \pi, \qquad \nabla_x H = -\pi (\ln \pi + H) = -\pi (x - \mathrm{E}_\pi[x])

(arXiv:2602.09782, sec. 3), so two ``[chunk, V]`` buffers, ``exp(x)`` and ``x exp(x)``, hold all of it.

:func:`token_objective` is one pass, for token-local losses: value and gradient while a chunk's logits exist.
:func:`token_stats` is for losses that need whole sequences first: its backward computes the logits again.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Objective = Callable[[Tensor, Tensor, slice], tuple[Tensor, dict[str, Tensor]]]
"""``(logprobs [n], entropy [n], rows) -> (scalar share of the summed loss, detached extras [n, ...])``."""

LOGPROB_GRAD = "dloss_dlogprobs"
"""Key under which :func:`token_objective` reports the derivative of the loss by each log-prob."""
ROW_BLOCK = 16
"""Tokens whose products of two [n, V] buffers are formed at once."""
VOCABULARY_BLOCK = 4096
"""Rows of the weight gradient formed at once where its sum is kept in another dtype than its products."""


class TokenStats(NamedTuple):
    r"""What losses and diagnostics need of each token's distribution: [N], float32 (float64 for float64).

    Args:
        logprobs: ln p of the targets at the temperature, nats.
        entropy: H of the full vocabulary, nats.
        moment: :math:`\sum_x \pi_x^2`, never with gradient.
        log_moment: :math:`\sum_x \pi_x^2 \ln \pi_x`, nats, never with gradient.
    """

    logprobs: Tensor
    entropy: Tensor
    moment: Tensor
    log_moment: Tensor


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int = 128,
) -> TokenStats:
    """Log-prob, entropy and moments of each token; differentiable through log-prob and entropy.

    Args:
        hidden: [N, D] float, the final hidden states at which a token is predicted.
        weight: [V, D], same dtype; the output embedding, tied or not.
        targets: [N] int64 in [0, V), the tokens that were sampled.
        bias: [V] or None, same dtype; -inf takes a token out of the vocabulary.
        temperature: of the sampling distribution, > 0.
        chunk_size: tokens whose logits exist at the same time: about ``2 * chunk_size * V`` floats.

    Returns:
        :class:`TokenStats`, each [N].

    Raises:
        ValueError: for shapes or dtypes that do not fit, temperature <= 0 or chunk_size < 1.
    """
    hidden, weight, bias = _checked(hidden, weight, bias, targets, temperature, chunk_size)
    apply: Callable[..., tuple[Tensor, ...]] = _TokenStats.apply
    return TokenStats(*apply(hidden, weight, bias, targets, temperature, chunk_size))


def token_objective(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int = 128,
) -> tuple[Tensor, TokenStats, dict[str, Tensor]]:
    """Value and gradient of a token-local loss in one pass over the logits.

    ``objective`` sees each chunk's log-probs and entropies as small leaf tensors. Its derivatives by them
    become gradients of ``hidden``, ``weight`` and ``bias`` at once, which wait for the loss's ``backward``;
    nothing else that it closes over gets a gradient. With grad disabled, or nothing to train, only values are
    computed.

    Args:
        hidden: [N, D] float, the final hidden states at which a token is predicted.
        weight: [V, D], same dtype; the output embedding, tied or not.
        targets: [N] int64 in [0, V), the tokens that were sampled.
        objective: see :data:`Objective`; called once for each chunk in order, for N = 0 once with no rows.
            ``rows`` is the chunk's slice of the N tokens.
        bias: [V] or None, same dtype; -inf takes a token out of the vocabulary.
        temperature: of the sampling distribution, > 0.
        chunk_size: tokens whose logits exist at the same time: about ``2 * chunk_size * V`` floats.

    Returns:
        The loss (the sum of contributions, scalar; backward through it works once), the detached statistics,
        and the extras, each [N, ...], with ``dloss_dlogprobs`` [N] among them where grad is enabled.

    Raises:
        ValueError: as :func:`token_stats`, and for a contribution that is no scalar.
    """
    hidden, weight, bias = _checked(hidden, weight, bias, targets, temperature, chunk_size)
    grad_enabled = torch.is_grad_enabled()
    parameters = (hidden, weight, bias)
    needed = [grad_enabled and tensor is not None and tensor.requires_grad for tensor in parameters]
    losses: list[Tensor] = []
    stats: list[TokenStats] = []
    extras: list[dict[str, Tensor]] = []
    with torch.no_grad(), _full_precision(hidden):
        head = _Head(hidden, weight, bias, targets, temperature, chunk_size)
        gradients = _Gradients(hidden, weight, bias, needed)
        for rows in head.chunks():
            chunk = head.forward(rows)
            loss, by_logprob, by_entropy, facts = _differentiate(objective, chunk, rows, grad_enabled)
            losses.append(loss)
            stats.append(chunk)
            extras.append(facts)
            if any(needed):
                gradients.add(rows, head, by_logprob, by_entropy)
        del head  # its buffers, before the gradients are cast
        total = torch.stack(losses).sum()
        grads = gradients.finish()
    if any(needed):
        apply: Callable[..., Tensor] = _StoredGradients.apply
        total = apply(total, hidden, weight, bias, *grads)
    joined = {key: torch.cat([facts[key] for facts in extras]) for key in extras[0]}
    return total, TokenStats(*map(torch.cat, zip(*stats, strict=True))), joined


def _differentiate(
    objective: Objective, stats: TokenStats, rows: slice, grad_enabled: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, Tensor]]:
    """A chunk's contribution, its derivatives by log-prob and entropy (None: it has none), its extras."""
    with torch.set_grad_enabled(grad_enabled):
        leaves = [tensor.detach().requires_grad_(grad_enabled) for tensor in (stats.logprobs, stats.entropy)]
        loss, extras = objective(leaves[0], leaves[1], rows)
        if loss.ndim != 0:
            raise ValueError(f"an objective must return a scalar contribution, not {tuple(loss.shape)}")
        by_logprob, by_entropy = (
            torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else (None, None)
        )
    extras = {key: value.detach() for key, value in extras.items()}
    if grad_enabled:
        extras[LOGPROB_GRAD] = torch.zeros_like(stats.logprobs) if by_logprob is None else by_logprob
    return loss.detach(), by_logprob, by_entropy, extras


class _Head:
    """Logits of one chunk of tokens at a time, in buffers that every chunk reuses."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
    ) -> None:
        self.hidden, self.weight, self.bias, self.targets = hidden, weight, bias, targets
        self.temperature = temperature
        self.chunk_size = chunk_size
        shape = (min(chunk_size, len(hidden)), len(weight))
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        self._scaled = hidden.new_empty(shape, dtype=dtype)  # x, then e x
        self._exp = torch.empty_like(self._scaled)  # e, then the gradient by the logits
        self._products = self._scaled if dtype == hidden.dtype else hidden.new_empty(shape)

    def chunks(self) -> Iterator[slice]:
        """Slices of the N tokens; one, and empty, for N = 0."""
        size = len(self.hidden)
        for start in range(0, max(size, 1), self.chunk_size):
            yield slice(start, min(start + self.chunk_size, size))

    def forward(self, rows: slice) -> TokenStats:
        """Statistics of the chunk, leaving what :meth:`logit_grad` needs in the buffers."""
        hidden, targets = self.hidden[rows], self.targets[rows, None]
        products, x, exp = (buffer[: len(hidden)] for buffer in (self._products, self._scaled, self._exp))
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=products)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=products)
        if self._products is not self._scaled:
            x.copy_(products)
        x.sub_(x.amax(dim=-1, keepdim=True))
        if self.temperature != 1.0:
            x.div_(self.temperature)
        target_x = x.gather(-1, targets).squeeze(-1)
        # exp() is exactly 0 below the smallest normal number: 0 * -inf would be NaN, and denormals are slow.
        tiny = torch.finfo(x.dtype).tiny
        torch.exp(x.clamp_(min=math.log(tiny) + 1.0), out=exp)
        torch.threshold_(exp, 4.0 * tiny, 0.0)
        self._sum = exp.sum(dim=-1)
        log_sum = self._sum.log()
        exp_x = x.mul_(exp)
        self._mean_x = exp_x.sum(dim=-1) / self._sum
        moment = torch.linalg.vector_norm(exp, dim=-1).div(self._sum).square()
        # A few rows at a time keeps the third buffer small. (A batched dot product might use TF32.)
        pairs = zip(exp.split(ROW_BLOCK), exp_x.split(ROW_BLOCK), strict=True)
        square_x = torch.cat([(left * right).sum(dim=-1) for left, right in pairs])
        log_moment = square_x / self._sum.square() - log_sum * moment
        return TokenStats(target_x - log_sum, log_sum - self._mean_x, moment, log_moment)

    def logit_grad(self, rows: slice, by_logprob: Tensor | None, by_entropy: Tensor | None) -> Tensor:
        """Gradient [n, V] by the logits of the last :meth:`forward`'s chunk, in the dtype of the products.

        ``g (e_a - pi) - h pi (x - E[x])``, over the temperature; g and h are the derivatives by log-prob and
        entropy.
        """
        size = rows.stop - rows.start
        products, exp_x, grad = (buffer[:size] for buffer in (self._products, self._scaled, self._exp))
        scale = self._sum * self.temperature
        on_exp = torch.zeros_like(scale)
        if by_logprob is not None:
            on_exp -= by_logprob
        if by_entropy is not None:
            on_exp += by_entropy * self._mean_x
        grad.mul_((on_exp / scale)[:, None])
        if by_entropy is not None:
            grad.addcmul_(exp_x, (by_entropy / scale)[:, None], value=-1.0)
        if by_logprob is not None:
            grad.scatter_add_(-1, self.targets[rows, None], (by_logprob / self.temperature)[:, None])
        return grad if self._products is self._scaled else products.copy_(grad)


class _Gradients:
    """Gradients of hidden states, weight and bias, summed over chunks in float32 or better."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: list[bool]) -> None:
        self._dtype = hidden.dtype
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        self._hidden = torch.zeros_like(hidden) if needed[0] else None
        self._weight = torch.zeros_like(weight, dtype=dtype) if needed[1] else None
        self._bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and needed[2] else None

    def add(self, rows: slice, head: _Head, by_logprob: Tensor | None, by_entropy: Tensor | None) -> None:
        """Add a chunk's share; chunks of tokens without gradient (clipped, no advantage) cost nothing."""
        if not any(grad is not None and bool(grad.any()) for grad in (by_logprob, by_entropy)):
            return
        logit_grad = head.logit_grad(rows, by_logprob, by_entropy)
        hidden = head.hidden[rows]
        if self._hidden is not None:
            torch.mm(logit_grad, head.weight, out=self._hidden[rows])
        if self._weight is not None and self._weight.dtype == self._dtype:
            self._weight.addmm_(logit_grad.t(), hidden)
        elif self._weight is not None:
            for start in range(0, len(self._weight), VOCABULARY_BLOCK):
                block = slice(start, start + VOCABULARY_BLOCK)
                self._weight[block] += logit_grad[:, block].t() @ hidden
        if self._bias is not None:
            self._bias += logit_grad.sum(dim=0, dtype=self._bias.dtype)

    def finish(self) -> list[Tensor | None]:
        """The gradients in the dtype of their tensors (None: not needed); to be called once."""
        grads = (self._hidden, self._weight, self._bias)
        return [None if grad is None else grad.to(self._dtype) for grad in grads]


class _TokenStats(torch.autograd.Function):
    """:func:`token_stats` for autograd: keeps its inputs alone and computes the logits again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
    ) -> tuple[Tensor, ...]:
        with _full_precision(hidden):
            head = _Head(hidden, weight, bias, targets, temperature, chunk_size)
            chunks = [head.forward(rows) for rows in head.chunks()]
        stats = TokenStats(*map(torch.cat, zip(*chunks, strict=True)))
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.mark_non_differentiable(stats.moment, stats.log_moment)
        ctx.set_materialize_grads(False)
        return tuple(stats)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None, *_: None) -> tuple[Any, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        with _full_precision(hidden):
            head = _Head(hidden, weight, bias, targets, ctx.temperature, ctx.chunk_size)
            gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
            for rows in head.chunks():
                head.forward(rows)
                slopes = [None if grad is None else grad[rows] for grad in (by_logprob, by_entropy)]
                gradients.add(rows, head, *slopes)
            del head  # its buffers, before the gradients are cast
            return (*gradients.finish(), None, None, None)


class _StoredGradients(torch.autograd.Function):
    """A loss whose gradients are known already: backward scales them and hands them on, once."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.grads = tensors[len(tensors) // 2 :]
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("backward through token_objective's loss works once: call it again")
        grads, ctx.grads = ctx.grads, None  # no second reference: autograd may then keep them without a copy
        scaled = tuple(None if grad is None else grad.mul_(grad_output) for grad in grads)
        return (None, *scaled, *(None for _ in grads))


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Autocast off: :func:`_checked` has applied it, and the softmax stays in float32."""
    return torch.autocast(tensor.device.type, enabled=False)


def _checked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The head's inputs, validated and in autocast's dtype where that is on."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, D] and [V, D]"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 [N] = [{len(hidden)}], not {targets.dtype} {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{len(weight)}], not {tuple(bias.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be >= 1")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if {weight.dtype, hidden.dtype if bias is None else bias.dtype} != {hidden.dtype}:
        raise ValueError(
            f"hidden ({hidden.dtype}), weight ({weight.dtype}) and bias must share a dtype outside autocast"
        )
    return hidden, weight, bias
