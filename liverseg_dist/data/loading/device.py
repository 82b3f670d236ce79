"""`DevicePrefetcher`: copies and augments the next batch on a side stream while the current one is computed on.

On a CPU there is no second stream: batches are transformed when they are asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass

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

    The next batch is begun before the current one is handed out, if the loader has it ready; it is never waited for at
    that point. `loader.wait_s` counts the seconds the caller did wait for data.
    """

    def __init__(self, loader: PatchLoader, transform: DeviceTransform, device: torch.device) -> None:
        self._loader = loader
        self._transform = transform
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun: tuple[DeviceBatch, torch.cuda.Event] | None = None

    def __iter__(self) -> Iterator[DeviceBatch]:
        return self

    def __next__(self) -> DeviceBatch:
        if self._stream is None:
            return self._transformed(next(self._loader))
        batch, done = self._begun or self._begin(self._stream)
        self._begun = self._begin(self._stream) if self._loader.ready() else None
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)
        batch.image_BCDHW.record_stream(current)  # the allocator must not reuse them while this stream reads
        batch.label_BDHW.record_stream(current)
        return batch

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
