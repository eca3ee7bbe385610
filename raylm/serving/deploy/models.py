"""The models of one application, found by name or by what they do."""

from __future__ import annotations

from collections.abc import Sequence

from raylm.serving.deploy.service import ModelService
from raylm.serving.http.errors import RequestError
from raylm.tasks import all_tasks


class Models:
    """The models of one application.

    Args:
        services: at least one; the first answers requests that name none.
    """

    def __init__(self, services: Sequence[ModelService]) -> None:
        self.services = list(services)
        for service in self.services:
            # One process for the schemas of all.
            service.schemas = self.services[0].schemas
        self._by_name = {service.name: service for service in services}

    def find(self, name: str | None, *tasks: str) -> ModelService:
        """The model called ``name``, or the first one; where ``tasks`` are given, one that does any of them.

        Raises:
            RequestError: status 404, or 400 where the named model does something else.
        """
        if name is None:
            for task in tasks:
                if (found := next((s for s in self.services if s.task == task), None)) is not None:
                    return found
            if not tasks:
                return self.services[0]
            raise RequestError(
                f"This server does not serve {_in_words(tasks)}; serving.models takes more",
                status=404,
                parameter="model",
                code="model_not_found",
            )
        if name not in self._by_name:
            served = ", ".join(f"'{known}'" for known in self._by_name)
            raise RequestError(
                f"The model '{name}' does not exist; served: {served}",
                status=404,
                parameter="model",
                code="model_not_found",
            )
        found = self._by_name[name]
        if tasks and found.task not in tasks:
            raise RequestError(
                f"The model '{name}' is {found.service.what}; this needs {_in_words(tasks)}",
                parameter="model",
                code="model_not_supported",
            )
        return found


def _in_words(tasks: Sequence[str]) -> str:
    """Models that do any of the ``tasks``."""
    known = {task.service.name: task.service.what for task in all_tasks()}
    return " or ".join(known[task] for task in tasks)
