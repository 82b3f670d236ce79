"""`DevicePrefetcher`: copies and augments the next batch on a side stream while the current one is computed on.

On a CPU there is no second stream: batches are transformed when they are asked for.
"""

from dataclasses import dataclass
from typing import Self

import torch

from liverseg_dist.data.augment import DeviceTransform
from liverseg_dist.data.loading.loader import Batch, PatchLoader


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """Network input (float32, normalised) and label (uint8), on the device."""

    indices: list[int]
    case_ids: list[str]
    image_BCDHW: torch.Tensor
    label_BDHW: torch.Tensor


class DevicePrefetcher:
    """Iterates a loader's batches, transformed and on `device`.

    Call `begin_next` when the work on the current batch is launched: where a GPU computes on, copying and augmentation
    of the next one then run beside it. It never waits; a batch that was not begun is begun when it is asked for.
    """

    def __init__(
        self, loader: PatchLoader, transform: DeviceTransform, device: torch.device
    ) -> None:
        self._loader = loader
        self._transform = transform
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun: tuple[DeviceBatch, torch.cuda.Event] | None = None

    @property
    def wait_s(self) -> float:
        """Seconds the caller has waited for the loader so far; transforming is no waiting."""
        return self._loader.wait_s

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> DeviceBatch:
        if self._stream is None:
            return self._transformed(next(self._loader))
        batch, done = self._begun or self._begin(self._stream)
        self._begun = None
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)
        batch.image_BCDHW.record_stream(
            current
        )  # the allocator must not reuse them while this stream reads
        batch.label_BDHW.record_stream(current)
        return batch

    def begin_next(self) -> None:
        """Launch the next batch's copy and transform on the side stream, if the loader has it ready."""
        if self._stream is not None and self._begun is None and self._loader.ready():
            self._begun = self._begin(self._stream)

    def _begin(self, stream: torch.cuda.Stream) -> tuple[DeviceBatch, torch.cuda.Event]:
        loaded = next(self._loader)
        with torch.cuda.stream(stream):
            batch = self._transformed(loaded)
            done = torch.cuda.Event()
            done.record(stream)
        return batch, done

    def _transformed(self, loaded: Batch) -> DeviceBatch:
        image_BCDHW, label_BDHW = self._transform(loaded.to(self._device))
        return DeviceBatch(loaded.indices, loaded.case_ids, image_BCDHW, label_BDHW)
