"""Responses from the engine on all ranks together: synced, again where it died, and one iteration ahead."""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning import Trainer

from rlvr.batch import Prompt
from rlvr.engines import SamplingParams
from rlvr.errors import ConfigError, EngineDiedError, RunError
from rlvr.module import RLVRModule
from rlvr.prompts import PromptOrder
from rlvr.rollouts import Ahead, JudgedRollouts, RolloutSource
from rlvr.settings import DataConfig
from rlvr.strategies import gathered_at_zero, summed
from rlvr.weight_sync import WeightSync


class Generation:
    """Hands weights to the engine and takes judged responses from it; all ranks make every call.

    Args:
        source: engine and verifier of the training prompts.
        prompts: to train on, encoded.
        config: sizes and sampling.
        trainer: whose ranks these are.
        module: whose policy generates.
        seed: keys every draw.
    """

    def __init__(
        self,
        source: RolloutSource,
        prompts: Sequence[Prompt],
        config: DataConfig,
        trainer: Trainer,
        module: RLVRModule,
        seed: int,
    ) -> None:
        self.source, self.config = source, config
        self._trainer, self._module, self._seed = trainer, module, seed
        self._order = PromptOrder(prompts, config.num_prompts, seed, trainer.global_rank, trainer.world_size)
        self._sync = WeightSync(module.policy, source.engine, module.device)
        self._ahead: Ahead | None = None
        self._restored: dict[str, Any] | None = None

    def of_iteration(self, k: int) -> JudgedRollouts:
        """The responses of iteration ``k``: those generated ahead, or new ones by the newest weights."""
        generated: JudgedRollouts | None = None
        begin = time.perf_counter()
        try:
            if self._ahead is not None and self._ahead.iteration == k:
                generated = self._ahead.result()
            elif self._restored is not None and self._restored["iteration"] == k and self.config.lookahead:
                generated = self._pending(k, self._restored["rollouts"])
                if summed(self._trainer, torch.tensor(generated is None).long()):
                    generated = None  # all or none: ranks may share an engine, which asks all of them
        except EngineDiedError as error:
            _say_died(error)
        self._ahead = self._restored = None
        if self.config.lookahead:
            self._module.ledger.add("time/rollout_wait_s", time.perf_counter() - begin)
        return self.by_newest_weights(partial(self._rollouts, k, version=k), generated)

    def look_ahead(self, k: int) -> None:
        """Start to generate iteration ``k + 1``'s responses by iteration ``k``'s starting weights."""
        failure: RunError | ConfigError | None = None
        died = False
        try:
            self._synced()
        except EngineDiedError as error:
            _say_died(error)  # and start it again when the time for them has come
            died = True
        except (RunError, ConfigError) as error:
            failure = error
        self._fail_together(failure)
        if died:
            return
        self._ahead = Ahead(k + 1, partial(self._rollouts, k + 1, version=k))

    def by_newest_weights(
        self, work: Callable[[], JudgedRollouts], generated: JudgedRollouts | None = None
    ) -> JudgedRollouts:
        """Sync the engine and generate what is not there yet; again where it died. All ranks come and leave.

        Args:
            work: generates.
            generated: what is there already.

        Raises:
            RunError: where the engine of any rank died too often, or generates with other weights.
            ConfigError: where this rank's does not start.
        """
        failure: RunError | ConfigError | None = None
        while True:
            self._fail_together(failure)
            if not summed(self._trainer, torch.tensor(generated is None).long()):
                assert generated is not None
                return generated
            try:
                self._synced()
                generated = generated or work()
            except EngineDiedError as error:
                _say_died(error)
            except (RunError, ConfigError) as error:
                failure = error

    def wait(self) -> None:
        """Wait until the engine is no longer busy with the next iteration."""
        if self._ahead is not None:
            self._ahead.wait()

    def state_dict(self) -> dict[str, Any]:
        """The responses that every rank has generated ahead, and their iteration; empty without any."""
        if not self.config.lookahead:
            return {}
        generated = self._ahead.wait() if self._ahead is not None else None
        ranks = gathered_at_zero(None if generated is None else generated.plain())
        return {"iteration": self._trainer.current_epoch + 1, "rollouts": ranks} if any(ranks) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what :meth:`state_dict` returned until its iteration comes."""
        self._restored = state_dict or None

    def _synced(self) -> None:
        """Hand the weights to the engine, and prove that it uses them."""
        with self._module.ledger.timed("time/weight_sync_s"):
            gap = self._sync()
        if gap is not None:
            self._module.ledger.add("rollout/sync_gap", gap)

    def _pending(self, k: int, saved: list[dict[str, Any] | None]) -> JudgedRollouts | None:
        """What a checkpoint holds for iteration ``k``; None where this run would ask other prompts."""
        trainer = self._trainer
        if len(saved) != trainer.world_size or (mine := saved[trainer.global_rank]) is None:
            return None
        prompts = self._order.of_iteration(k)
        spares = self._order.spares(k) if self.config.dynamic_sampling else []
        return JudgedRollouts.of_plain(mine, prompts, spares, self.config.group_size)

    def _rollouts(self, k: int, version: int) -> JudgedRollouts:
        """Generate iteration ``k``'s responses by the engine's present weights."""
        config, rounds = self.config, self.config.dynamic_sampling
        sampling = SamplingParams(
            samples=config.group_size,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=self._seed,
            purpose="train",
            iteration=k,
        )
        spares = self._order.spares(k) if rounds else []
        return self.source.generate(
            self._order.of_iteration(k), sampling, version, spares=spares, rounds=rounds
        )

    def _fail_together(self, failure: RunError | ConfigError | None) -> None:
        """Leave with an error where any rank has one: alone, the others would wait for it."""
        if summed(self._trainer, torch.tensor(failure is not None).long()):
            raise failure or RunError("the engine of another rank failed")


def _say_died(error: EngineDiedError) -> None:
    print(f"{error}; starting it again, and generating the prompts anew", file=sys.stderr, flush=True)
