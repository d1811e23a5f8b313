"""What steps return: one set of buffers that every bucket writes, so that memory holds the largest bucket's once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .errors import CaptureError, InvalidArgumentError


class Outputs:
    """Buffers like a step's outputs, with the rows of the largest bucket; none until the first step."""

    def __init__(self) -> None:
        self._tensors: tuple[Tensor, ...] = ()
        self._single = False

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def allocate(self, outputs: Tensor | tuple[Tensor, ...], bucket: int, max_rows: int) -> None:
        """Makes buffers for what a step returned at a bucket.

        Raises:
            InvalidArgumentError: they are no tensors, or one's first dimension is not the bucket's rows.
        """
        self._single = isinstance(outputs, Tensor)
        outputs = _checked(outputs, bucket)
        with torch.inference_mode(False):
            self._tensors = tuple(
                torch.zeros((max_rows, *output.shape[1:]), dtype=output.dtype, device=output.device)
                for output in outputs
            )

    def copy_(self, outputs: Tensor | tuple[Tensor, ...], bucket: int) -> None:
        """Takes a step's outputs into the first rows.

        Raises:
            InvalidArgumentError: as `allocate` does, or there are more or fewer than there were.
        """
        outputs = _checked(outputs, bucket)
        if len(outputs) != len(self._tensors):
            raise InvalidArgumentError(
                f"step_fn returned {len(outputs)} tensors, {len(self._tensors)} before: return as many at every bucket"
            )
        for shared, output in zip(self._tensors, outputs, strict=True):
            shared[:bucket].copy_(output)

    def rows(self, num_rows: int) -> Tensor | tuple[Tensor, ...]:
        """The first rows, as the step returns them: one tensor or several."""
        outputs = tuple(tensor[:num_rows] for tensor in self._tensors)
        return outputs[0] if self._single else outputs

    def compare(self, replayed: Sequence[Tensor]) -> None:
        """Compares every bit of what a replay left with what is there now from an eager step.

        Raises:
            CaptureError: an output differs; says which and where.
        """
        for index, (output, eager) in enumerate(zip(replayed, self._tensors, strict=True)):
            bits, eager_bits = (each.unsqueeze(-1).view(torch.uint8) for each in (output, eager[: len(output)]))
            differs = bits != eager_bits
            if differs.any():
                rows = differs.flatten(1).any(1).nonzero().flatten().tolist()
                raise CaptureError(
                    f"output {index} of the captured step differs from the eager one in rows {rows}: "
                    "something that the step reads was baked into the capture or moved since"
                )

    def clear(self) -> None:
        """Lets go of the buffers."""
        self._tensors = ()


def _checked(outputs: Tensor | tuple[Tensor, ...], bucket: int) -> tuple[Tensor, ...]:
    several = (outputs,) if isinstance(outputs, Tensor) else outputs
    if not isinstance(several, tuple | list) or not all(isinstance(output, Tensor) for output in several):
        raise InvalidArgumentError(
            f"step_fn returned a {type(outputs).__name__}: return a tensor or a tuple of tensors"
        )
    for index, output in enumerate(several):
        if output.shape[:1] != (bucket,):
            raise InvalidArgumentError(
                f"output {index} of step_fn is {tuple(output.shape)}: its first dimension must be the {bucket} rows"
            )
    return tuple(several)
