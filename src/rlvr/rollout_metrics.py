"""What an iteration's rollouts say of themselves: the keys ``rollout/...``."""

import torch
from torch import Tensor

from rlvr.advantages import zero_variance
from rlvr.ledger import Ledger
from rlvr.rollouts import Judged, JudgedRollouts


def rewards_of(pairs: list[Judged], group_size: int) -> Tensor:
    """What the verifier gave, [P, G] in float64."""
    rewards = torch.tensor([verdict.reward for _, verdict in pairs], dtype=torch.float64)
    return rewards.view(-1, group_size)


def log_rollouts(ledger: Ledger, generated: JudgedRollouts, *, group_size: int, refilled: bool) -> None:
    """Log what was generated, groups that dynamic sampling left out included.

    Args:
        ledger: where to.
        generated: of one iteration.
        group_size: G.
        refilled: whether groups of equal rewards were replaced.
    """
    rewards = rewards_of(generated.everything, group_size)
    rollouts = [rollout for rollout, _ in generated.everything]
    correct = torch.tensor([verdict.correct for _, verdict in generated.everything]).view_as(rewards)
    responses = len(rollouts)
    ledger.add("rollout/reward_mean", rewards.sum(), responses)
    ledger.add("rollout/pass_at_k", correct.any(dim=1).sum(), len(rewards))
    ledger.add("rollout/zero_variance_frac", zero_variance(rewards).sum(), len(rewards))
    ledger.add("rollout/length_mean", sum(len(r.token_ids) for r in rollouts), responses)
    ledger.add("rollout/truncated_frac", sum(r.finish_reason == "length" for r in rollouts), responses)
    ledger.add("rollout/empty_frac", sum(not r.token_ids for r in rollouts), responses)
    ledger.add("rollout/distinct_frac", len({(r.prompt.index, r.token_ids) for r in rollouts}), responses)
    if refilled:
        used = rewards_of(generated.pairs, group_size)
        ledger.add("rollout/refill_rounds", generated.rounds)
        ledger.add("rollout/left_out_frac", len(rewards) - len(used), len(rewards))
        ledger.add("rollout/filled_up_frac", zero_variance(used).sum(), len(used))


def log_mismatch(ledger: Ledger, log_rho: Tensor, mask: Tensor) -> None:
    """Log how far the engine's distribution is from the trainer's.

    Args:
        ledger: where to.
        log_rho: [B, T] of :func:`rlvr.mismatch.log_rho`, nats, 0 outside the mask.
        mask: [B, T] bool.
    """
    tokens = mask.sum()
    # Schulman's k3 on the engine's samples: unbiased, never negative; its terms all but cancel.
    exact = log_rho.double()
    ledger.add("rollout/engine_kl", (exact.expm1() - exact).sum(), tokens)
    ledger.add("rollout/rho_mean", torch.where(mask, log_rho.exp(), 0.0).sum(), tokens)
