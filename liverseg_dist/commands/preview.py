"""Draw the samples that a training gets: as stored, as augmented, and their labels.

  liverseg preview tasks/liver.zarr --out picture.png
  liverseg preview tasks/liver.zarr --out picture.png --samples 10 data.augmentation=strong data.patch_size=[32,160,160]

The samples are those of a run with the same settings and seed, identified by their number in the
run. Images of several channels have a row for each channel.
"""

import argparse
from dataclasses import replace

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
from liverseg_dist.data.loading import Batch, PatchLoader, PatchSource, fill_in_data_settings
from liverseg_dist.data.loading.sampling import Centre
from liverseg_dist.data.preview import PreviewRow, render_preview
from liverseg_dist.data.store.case_store import CaseStore
from liverseg_dist.errors import UserError, printable
from liverseg_dist.files import atomic_write
from liverseg_dist.labels import LabelScheme
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
    settings = settings.model_copy(update={"data": fill_in_data_settings(settings.data, store)})
    case_ids = store.ids("train", settings.data.fold)
    source = PatchSource(
        store, case_ids, settings.data, settings.seed, settings.train.global_batch_size
    )
    with PatchLoader(
        # No workers: a few samples do not pay for the start of processes.
        source,
        ([n] for n in range(args.first, args.first + args.samples)),
        workers=0,
    ) as loader:
        rows = []
        for batch in loader:
            rows += preview_rows(source, batch, settings)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out) as file:
        render_preview(rows, store.labels).save(file, format="PNG")
    write_lines(
        f"{args.out}: {args.samples} samples of {len(case_ids)} cases, "
        f"augmentation {settings.data.augmentation}"
    )
    return {"picture": str(args.out), "samples": args.samples, "cases": len(case_ids)}


def preview_rows(source: PatchSource, batch: Batch, settings: Settings) -> list[PreviewRow]:
    """Draw one sample, from a batch of size one, as stored and as augmented: a row per channel."""
    data, size = settings.data, settings.data.patch_size
    preset = build_preset(data, settings.train.modality_dropout)
    # The samples as stored go through the same code as augmented ones, with every transform
    # switched off.
    plain = replace(PRESETS["none"], channels=preset.channels)
    stored_BCDHW, stored_label = DeviceTransform(plain, size)(batch)
    augmented_BCDHW, augmented_label = DeviceTransform(preset, size)(batch)
    (index,), (case_id,) = batch.indices, batch.case_ids
    draw = draw_augmentation(preset, size, int(batch.augment_seed_B[0]))
    where = describe_centre(source.plan_sample(index).centre, data.label_scheme)
    notes = (f"centred {where}", *describe_augmentation(preset, draw))
    traits = source.get_traits(case_id)
    dropped: list[int] = []
    # The number of the sample fixes its random numbers, so that the picture shows what the
    # training saw.
    if "modality_dropout" in draw.parameters:
        chances = draw.parameters["modality_dropout"]
        dropped = preset.modality_dropout.find_dropped(chances, list(traits.present))
    rows = []
    for number, channel in enumerate(data.image_channels):
        title = f"sample {index}: {case_id}"
        if preset.channels > 1:
            state = " (dropped)" if number in dropped else ""
            if not traits.present[number]:
                state = " (absent)"
            title += f"\nchannel {number}: {printable(channel.name)}{state}"
        black, white = grey_range(traits.intensities[number])
        rows.append(
            PreviewRow(
                title,
                # The notes are about all channels.
                notes if number == 0 else (),
                (stored_BCDHW[0, number].numpy(), stored_label[0].numpy()),
                (augmented_BCDHW[0, number].numpy(), augmented_label[0].numpy()),
                black,
                white,
            )
        )
    return rows


def describe_centre(centre: Centre | None, labels: LabelScheme) -> str:
    """Describe on what a patch is centred: a class, and which of a case's lesions."""
    if centre is None:
        return "at random"
    name = printable(labels.class_names[centre.label])
    # Voxels of organs have the component 0.
    return f"on {name} {centre.component}" if centre.component else f"on {name}"


def grey_range(intensity: IntensityConfig) -> tuple[float, float]:
    # A normalised value v stands for mean + v * std, so the bounds 0 and 1 of the clipping are
    # inverted.
    """Return the normalised values of the clipping bounds, for black and white."""
    black, white = (np.array([0.0, 1.0]) - intensity.mean) / intensity.std
    return float(black), float(white)
