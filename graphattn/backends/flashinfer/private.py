"""The one place that reads FlashInfer's private state; it refuses any version but the one that was read."""

from __future__ import annotations

import flashinfer

from ...errors import BackendError
from . import VERSION

if flashinfer.__version__ != VERSION:
    raise BackendError(
        f"flashinfer {flashinfer.__version__} is installed, its private state was read in {VERSION}: "
        f"pip install flashinfer-python=={VERSION}"
    )


def plan_info(wrapper) -> tuple[int, ...]:
    """The planner's offsets and sizes, which a captured launch of the wrapper holds by value."""
    return tuple(wrapper._plan_info)
