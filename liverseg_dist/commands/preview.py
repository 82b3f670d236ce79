"""Draw the samples that a training gets: as stored, as augmented, and their labels.

  liverseg preview tasks/liver.zarr --out picture.png
  liverseg preview tasks/liver.zarr --out picture.png --samples 10 data.augmentation=strong data.patch_size=[32,160,160]

The samples are those of a run with the same settings and seed, identified by their number in the run.
"""

import argparse

import numpy as np

from liverseg_dist.commands.options import add_settings, settings_from
from liverseg_dist.config import IntensityConfig, Settings
from liverseg_dist.console import write_lines
from liverseg_dist.data.augment import (
    PRESETS,
    DeviceTransform,
    build_preset,
    describe_augmentation,
    draw_augmentation,
)
from liverseg_dist.data.loading import Batch, PatchLoader, PatchSource
from liverseg_dist.data.preview import PreviewRow, render_preview
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import UserError
from liverseg_dist.files import atomic_write
from liverseg_dist.texts.paths import path_argument, text_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "store", type=text_argument, metavar="STORE", help="path or fsspec URL of the Zarr store"
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="PNG", help="picture to write"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=6,
        metavar="N",
        help="number of samples (default: %(default)s)",
    )
    parser.add_argument(
        "--first",
        type=int,
        default=0,
        metavar="N",
        help="number of the first sample in the run (default: %(default)s)",
    )
    add_settings(parser)


def run(args: argparse.Namespace) -> dict:
    settings = settings_from(args)
    if args.samples < 1 or args.first < 0:
        raise UserError("--samples must be at least 1, --first at least 0")
    if args.out.suffix.lower() != ".png":
        raise UserError(f"{args.out}: the picture is a PNG file; its name must end in .png")
    store = CaseStore.open(args.store)
    case_ids = store.ids("train", settings.data.fold)
    source = PatchSource(
        store, case_ids, settings.data, settings.seed, settings.train.global_batch_size
    )
    with PatchLoader(
        source, ([n] for n in range(args.first, args.first + args.samples)), workers=0
    ) as loader:
        rows = [preview_row(source, batch, settings) for batch in loader]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out) as file:
        render_preview(rows).save(file, format="PNG")
    write_lines(
        f"{args.out}: {len(rows)} samples of {len(case_ids)} cases, "
        f"augmentation {settings.data.augmentation}"
    )
    return {"picture": str(args.out), "samples": len(rows), "cases": len(case_ids)}


def preview_row(source: PatchSource, batch: Batch, settings: Settings) -> PreviewRow:
    """Draw one sample, from a batch of size one, as stored and as augmented."""
    size, preset = settings.data.patch_size, build_preset(settings.data)
    stored, augmented = (
        (image_BCDHW[0, 0].numpy(), label_BDHW[0].numpy())
        for image_BCDHW, label_BDHW in (
            DeviceTransform(PRESETS["none"], size)(batch),
            DeviceTransform(preset, size)(batch),
        )
    )
    (index,), (case_id,) = batch.indices, batch.case_ids
    draw = draw_augmentation(preset, size, int(batch.augment_seed_B[0]))
    centre = source.plan_sample(index).centre
    where = (
        "at random"
        if centre is None
        else f"on {('liver', f'tumour {centre.component}')[centre.label - 1]}"
    )
    black, white = grey_range(source.get_intensity(case_id))
    title = f"sample {index}: {case_id}"
    return PreviewRow(
        title,
        (f"centred {where}", *describe_augmentation(preset, draw)),
        stored,
        augmented,
        black,
        white,
    )


def grey_range(intensity: IntensityConfig) -> tuple[float, float]:
    """Return the normalised values of the clipping bounds, for black and white."""
    black, white = (np.array([0.0, 1.0]) - intensity.mean) / intensity.std
    return float(black), float(white)
