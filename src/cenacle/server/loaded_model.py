"""Loads one of a server's models, and unloads it.

Owns: `ModelLoader`, which makes an `Application` for each model that is loaded.
Does not know: when (`model_pool.py`), how a model is loaded (`api.Model`).
Invariant: when `load` raises, no process of the model is left.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.types import ASGIApp

from ..errors import CenacleError, ClusterError
from .api.openai_responses import ResponsesAdapter
from .app import Application
from .limits import Limits
from .metrics import Metrics
from .model_catalog import ModelEntry
from .model_pool import LoadTask
from .plan_info import PlanTracker

if TYPE_CHECKING:
    from ..api import Model
    from ..cluster.formation import Cluster


class LoadedApplication:
    """A model with its endpoints; see `model_pool.LoadedModel`.

    Args:
        model: loaded.
        application: over it.
        metrics: of the model.
        on_cluster: it takes no memory of this machine's that is counted.
    """

    def __init__(
        self, model: Model, application: Application, metrics: Metrics, *, on_cluster: bool
    ) -> None:
        self.model, self.application = model, application
        self._metrics, self._on_cluster = metrics, on_cluster

    @property
    def app(self) -> ASGIApp:
        """Its endpoints."""
        return self.application.app

    @property
    def failure(self) -> CenacleError | None:
        """Why its ranks will not work again; None: they do."""
        return self.model.group.failure

    @property
    def promised_bytes(self) -> int:
        """Bytes of this machine that it may take."""
        return 0 if self._on_cluster else self.model.promised_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes of this machine that it takes now."""
        return 0 if self._on_cluster else self.model.resident_bytes

    def stop(self, reason: ClusterError) -> None:
        """Abort its running requests."""
        self.application.stop(reason)

    def close(self) -> None:
        """End its processes."""
        self._metrics.detach()
        try:
            self.application.close()
        finally:
            self.model.close()
        # Its objects refer to each other: left to Python, they are freed a hundred loads later.
        gc.collect()


class ModelLoader:
    """Loads models of a catalog.

    Args:
        catalog: by name.
        limits: what a client may use.
        metrics: of a model.
        cluster: run on its nodes; None: on this machine.
        report: told in sentences how a model runs.
        on_loaded: told which model is loaded.
    """

    def __init__(
        self,
        catalog: Mapping[str, ModelEntry],
        limits: Limits,
        metrics: Callable[[str], Metrics],
        cluster: Cluster | None,
        report: Callable[[str], None],
        on_loaded: Callable[[Model], None] = lambda _: None,
    ) -> None:
        self._catalog, self._limits, self._metrics = catalog, limits, metrics
        self._cluster, self._report, self._on_loaded = cluster, report, on_loaded
        self.responses = ResponsesAdapter()

    def load(self, task: LoadTask) -> LoadedApplication:
        """See `model_pool.LoadModel`."""
        from ..api import Model  # loads MLX

        model = Model.load(
            self._catalog[task.name].options,
            cluster=self._cluster,
            report=self._report,
            isolate_text=True,
            make_room=task.make_room,
            cancel=task.cancel,
        )
        metrics = self._metrics(task.name)
        try:
            tracker = PlanTracker(model)
            metrics.attach(model, tracker)
            application = Application(
                model,
                self._limits,
                metrics,
                tracker,
                # Whoever asks by another name was sent here on purpose.
                (task.name, "*"),
                responses=self.responses,
            )
        except BaseException:
            metrics.detach()
            model.close()
            with suppress(CenacleError):
                model.text.close()
            raise
        drafts = f"drafts: {model.drafter}" if model.drafter else ""
        for reason in (model.ranks.backend_reason, model.plan_reason, drafts):
            if reason:
                self._report(f"{task.name}: {reason}")
        self._on_loaded(model)
        return LoadedApplication(model, application, metrics, on_cluster=self._cluster is not None)
