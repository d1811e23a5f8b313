"""The exceptions graphattn raises. Each message says what was asked, what there was and what to do."""

from __future__ import annotations


class GraphattnError(Exception):
    """Base of every error that graphattn raises on purpose."""


class InvalidArgumentError(GraphattnError, ValueError):
    """An argument of a constructor or call is outside what it can be."""


class InvalidRequestError(InvalidArgumentError):
    """A request was refused before it entered the engine; the engine and its other requests are as they were."""


class OutOfPagesError(GraphattnError, RuntimeError):
    """The page pool cannot hold what was asked for; nothing was allocated."""


class BucketError(GraphattnError, ValueError):
    """No bucket of the ladder covers the batch."""


class BackendError(GraphattnError, RuntimeError):
    """No backend, or not the one asked for, can serve the layer; the message lists each backend's reasons."""


class NoActivePlanError(GraphattnError, RuntimeError):
    """The attention op ran outside a planned step."""


class CaptureError(GraphattnError, RuntimeError):
    """A captured step no longer matches what it would replay (a moved weight, say)."""


class DeviceMemoryError(GraphattnError, RuntimeError):
    """Memory does not hold what was asked for; what had been taken for it was given back."""


class CaptureMemoryError(CaptureError, DeviceMemoryError):
    """Buckets could not be captured for want of memory; those that were stay usable.

    Attributes:
        failed: the buckets that could not, with any backend or with one of two.
        captured: the buckets that are.
    """

    def __init__(self, message: str, *, failed: tuple[int, ...], captured: tuple[int, ...]):
        super().__init__(message)
        self.failed, self.captured = failed, captured


class NotANumberError(GraphattnError, ArithmeticError):
    """A model's logits hold a NaN, so that no token can be drawn from them."""


class MemoryLeakError(GraphattnError, RuntimeError):
    """Memory that was taken has not come back; says by which meter and how much."""


class UnsupportedModelError(GraphattnError, ValueError):
    """The model's attention does something this layer does not serve; the message names it."""


class ModelCheckError(UnsupportedModelError):
    """A model that was attached does not compute what transformers' eager attention does.

    Attributes:
        layer: index of the first layer that differs; None if all attend as they should and the logits differ.
    """

    def __init__(self, message: str, *, layer: int | None):
        super().__init__(message)
        self.layer = layer


class ModelFileError(GraphattnError, ValueError):
    """A path is not a model that can be loaded."""
