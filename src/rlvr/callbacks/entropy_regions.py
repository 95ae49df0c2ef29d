"""E1..E4 diagnostics: where the tokens are, what is clipped there, and how entropy flows."""

from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from rlvr.batch import Batch
from rlvr.losses import LossInputs
from rlvr.module import RLVRModule
from rlvr.regions import REGIONS, Definition, entropy_inner_product, membership

PROBABILITY_EDGES = np.linspace(0.0, 1.0, 21)
LOG_RATIO_EDGES = np.linspace(-0.6, 0.6, 25)


class EntropyRegions(Callback):
    """Logs every region's shares, entropy, ratio and entropy flow, and gathers the region map (fig. 2b).

    The flow of a region is the sum over its tokens and the iteration's updates of eq. 5 with
    ``g = -d(reduced loss)/d ln p`` for the advantage, each update with its own p, H and pi. It holds
    advantage, ratio, clip and aggregation, for any loss. Its unit is that of tabular logits: compare it by
    sign and rank.

    Keys: ``regions/E1_frac`` (of all tokens), ``_clip_frac`` (of the region's), ``_entropy`` (nats),
        ``_ratio``, ``_flow``;
    ``regions/flow`` of all tokens; ``regions/eq6_agreement``, how often eq. 6's sign is eq. 5's.

    Args:
        by: ``empirical`` or ``theory``, see :func:`rlvr.regions.membership`.
        tolerance: log-ratio from which a token counts as moved, nats; null: 1e-3, or 2e-2 in bf16.

    Attributes:
        counts: tokens of the run by sign of A, log-ratio and probability: [2, Y, X], A > 0 first.
        flows: their entropy flow, [2, Y, X].
    """

    def __init__(self, *, by: Definition = "empirical", tolerance: float | None = None) -> None:
        self.by: Definition = by
        self.tolerance = tolerance
        shape = (2, len(LOG_RATIO_EDGES) - 1, len(PROBABILITY_EDGES) - 1)
        self.counts, self.flows = np.zeros(shape), np.zeros(shape)
        self._new_counts, self._new_flows = np.zeros(shape), np.zeros(shape)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the iteration's part of the map, over all ranks."""
        news = torch.from_numpy(np.stack([self._new_counts, self._new_flows]))
        counts, flows = trainer.strategy.reduce(news, reduce_op="sum").numpy()
        self.counts, self.flows = self.counts + counts, self.flows + flows
        self._new_counts, self._new_flows = np.zeros_like(counts), np.zeros_like(flows)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Measure one update."""
        assert isinstance(pl_module, RLVRModule)
        mask: Tensor = outputs["mask"]
        tokens = {key: value[mask] for key, value in outputs.items() if key not in ("loss", "mask")}
        advantages = batch.advantages[:, None].expand_as(mask)[mask]
        inputs = LossInputs(
            logprobs=tokens["logprobs"],
            old_logprobs=batch.old_logprobs[mask],
            advantages=advantages,
            mask=torch.ones_like(advantages, dtype=torch.bool),
            clip=pl_module.clip_range,
            entropy=tokens["entropy"],
        )
        region = membership(inputs, self.by, self._tolerance(trainer))
        flow = entropy_inner_product(
            tokens["logprobs"],
            tokens["entropy"],
            tokens["moment"],
            tokens["log_moment"],
            tokens["grad_logprobs"],
        )
        self._log(
            pl_module, region, flow, tokens, updates=int(trainer.num_training_batches) * trainer.world_size
        )
        self._agreement(pl_module, inputs, tokens)
        self._map(inputs, flow)

    def _tolerance(self, trainer: Trainer) -> float:
        if self.tolerance is not None:
            return self.tolerance
        return 2e-2 if "bf16" in str(trainer.precision) else 1e-3

    def _log(
        self, module: RLVRModule, region: Tensor, flow: Tensor, tokens: dict[str, Tensor], updates: int
    ) -> None:
        add = module.ledger.add
        for code, name in enumerate(REGIONS, start=1):
            inside = region == code
            count = inside.sum()
            add(f"regions/{name}_frac", count, inside.numel())
            add(f"regions/{name}_clip_frac", (inside & ~tokens["kept"]).sum(), count)
            add(f"regions/{name}_entropy", tokens["entropy"][inside].sum(), count)
            add(f"regions/{name}_ratio", tokens["ratio"][inside].sum(), count)
            # A sum over the iteration: the counts of all its updates and ranks add up to 1.
            add(f"regions/{name}_flow", flow[inside].sum(), 1 / updates)
        add("regions/flow", flow.sum(), 1 / updates)

    def _agreement(self, module: RLVRModule, inputs: LossInputs, tokens: dict[str, Tensor]) -> None:
        exact = entropy_inner_product(
            tokens["logprobs"], tokens["entropy"], tokens["moment"], tokens["log_moment"], inputs.advantages
        )
        first_term = -inputs.advantages * (tokens["logprobs"] + tokens["entropy"])
        active = inputs.advantages != 0
        agree = (exact.sign() == first_term.sign()) & active
        module.ledger.add("regions/eq6_agreement", agree.sum(), active.sum())

    def _map(self, inputs: LossInputs, flow: Tensor) -> None:
        probs = inputs.logprobs.exp().cpu().numpy()
        log_ratio = (inputs.logprobs - inputs.old_logprobs).cpu().numpy()
        weights = flow.cpu().numpy()
        advantages = inputs.advantages.cpu().numpy()
        edges = (LOG_RATIO_EDGES, PROBABILITY_EDGES)
        for panel, chosen in enumerate((advantages > 0, advantages < 0)):
            where = (log_ratio[chosen].clip(*LOG_RATIO_EDGES[[0, -1]]), probs[chosen].clip(0, 1))
            self._new_counts[panel] += np.histogram2d(*where, bins=edges)[0]
            self._new_flows[panel] += np.histogram2d(*where, bins=edges, weights=weights[chosen])[0]

    def map(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Counts, flows, edges of probability and of log-ratio, as the region map figure wants them."""
        return self.counts, self.flows, PROBABILITY_EDGES, LOG_RATIO_EDGES

    def state_dict(self) -> dict[str, Any]:
        """The map so far."""
        return {"counts": torch.from_numpy(self.counts.copy()), "flows": torch.from_numpy(self.flows.copy())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.counts, self.flows = state_dict["counts"].numpy().copy(), state_dict["flows"].numpy().copy()
