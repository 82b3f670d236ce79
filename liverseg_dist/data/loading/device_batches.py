"""`DevicePrefetcher`: copies and augments the next batch while the current one is processed.

On a GPU this happens on a second CUDA stream. On a CPU there is no second stream: a batch is
augmented when it is requested.
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
    annotated: list[tuple[str, ...]]
    """Names of the annotated structures of each sample's case."""


class DevicePrefetcher:
    """Iterates over a loader's batches, augmented and on a device.

    Call `begin_next` after the work on the current batch was launched: the GPU then copies and
    augments the next batch at the same time. It never waits; a batch that was not begun is
    processed when it is requested.
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
        """Seconds for which the caller has waited for the loader, without augmentation."""
        return self._loader.wait_s

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> DeviceBatch:
        if self._stream is None:
            return self._copy_and_augment(next(self._loader))
        batch, done = self._begun or self._launch(self._stream)
        self._begun = None
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)
        # The allocator must not reuse the memory while this stream reads it.
        batch.image_BCDHW.record_stream(current)
        batch.label_BDHW.record_stream(current)
        return batch

    def begin_next(self) -> None:
        """Launch copy and augmentation of the next batch, if the loader has read it."""
        if self._stream is not None and self._begun is None and self._loader.is_ready():
            self._begun = self._launch(self._stream)

    def _launch(self, stream: torch.cuda.Stream) -> tuple[DeviceBatch, torch.cuda.Event]:
        # Outside of the stream context: it may wait for the loader's threads.
        loaded = next(self._loader)
        with torch.cuda.stream(stream):
            batch = self._copy_and_augment(loaded)
            done = torch.cuda.Event()
            done.record(stream)
        return batch, done

    def _copy_and_augment(self, loaded: Batch) -> DeviceBatch:
        image_BCDHW, label_BDHW = self._transform(loaded.to(self._device))
        return DeviceBatch(
            loaded.indices, loaded.case_ids, image_BCDHW, label_BDHW, loaded.annotated
        )
