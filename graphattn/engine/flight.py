"""What a step drew, on its way to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..draw import Sampled
from .request import Request

Drawn = list[tuple[Request, int, dict[int, float] | None]]


class Flight:
    """The draws of one forward pass, being copied to the host behind it.

    Args:
        requests: whose they are, row by row.
        sampled: what was drawn, on the device.

    Attributes:
        requests: as given.
    """

    def __init__(self, requests: Sequence[Request], sampled: Sampled):
        self.requests = list(requests)
        tensors = (sampled.token_ids, sampled.logprobs, sampled.top_ids, sampled.top_logprobs)
        self._host = [None if tensor is None else tensor.to("cpu", non_blocking=True, copy=True) for tensor in tensors]
        device = sampled.token_ids.device
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(device))

    def land(self) -> Drawn:
        """The draws; waits for the pass that drew them, and for nothing queued after it."""
        if self._copied is not None:
            self._copied.synchronize()
        token_ids, own, top_ids, top = (None if tensor is None else tensor.tolist() for tensor in self._host)
        drawn: Drawn = []
        for row, (token_id, request) in enumerate(zip(token_ids, self.requests, strict=True)):
            count = request.params.logprobs
            if count is None:
                drawn.append((request, token_id, None))
            else:
                likely = zip(top_ids[row][:count], top[row][:count], strict=True)
                drawn.append((request, token_id, {token_id: own[row], **dict(likely)}))
        return drawn
