"""The cost model: XGBoost's guess of how fast a candidate is, trained on every trial there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from saevit_tvm.measure.candidates import Result

WARM_UP = 8  # with fewer trials than this its guesses are no better than chance


class CostModel:
    """MetaSchedule's model, which wants all its data again in every process."""

    def __init__(self, extractor: Any = "per-store-feature") -> None:
        from tvm.s_tir.meta_schedule.cost_model import XGBModel

        # One thread: with so little data more are no faster, and a hundred times slower on a busy machine.
        self.model = XGBModel(extractor=extractor, num_warmup_samples=WARM_UP, num_tuning_cores=1)

    @property
    def trained(self) -> bool:
        return self.model.booster is not None and self.model.data_size >= WARM_UP

    def learn(self, context: Any, sources: Sequence[Any], results: Sequence[Result], *, train: bool) -> None:
        """Take in what one kernel's candidates took; with `train`, also retrain if that is much news."""
        from tvm.s_tir.meta_schedule.runner import RunnerResult

        times = [
            RunnerResult([min(result.run_secs)], None) if result.run_secs else RunnerResult(None, "failed")
            for result in results
        ]
        if train:
            self.model.update(context, list(sources), times)
            return
        # It retrains when the data has grown by a fifth of what it was trained on last.
        self.model.last_train_size = 10**9
        self.model.update(context, list(sources), times)
        self.model.last_train_size = 0
