"""Options of `liverseg phantom` for MR, several channels and structures beside the liver."""

import argparse
import math
from typing import Any

from liverseg_dist.console import write_lines
from liverseg_dist.errors import UserError, printable
from liverseg_dist.phantom.channel_case import MODALITIES, Modality, Recipe
from liverseg_dist.phantom.channel_dataset import (
    LAYOUTS,
    ChannelSet,
    Layout,
    check_channel_folder,
    write_channel_set,
)
from liverseg_dist.phantom.channel_montage import draw_channel_montage
from liverseg_dist.phantom.mr_signal import SEQUENCES
from liverseg_dist.phantom.organ_labels import (
    ORGANS,
    parse_organs,
    select_annotated,
)
from liverseg_dist.texts.paths import quote_path
from liverseg_dist.tracking.progress import show_progress
from liverseg_dist.tracking.terminal_table import print_table

DEFAULT_ORGANS = "liver"
# The default is about two voxels of small phantoms: fusion suffers without registration.
MISALIGNMENT_MM, MAX_MISALIGNMENT_MM = 6.0, 50.0
BENIGN_LESIONS, MAX_BENIGN_LESIONS = 3, 10
MAX_CHANNELS_4D = 4


def add_channel_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for modality, structures and layout."""
    group = parser.add_argument_group("modality, structures and layout")
    group.add_argument(
        "--modality",
        default="ct",
        metavar="NAME",
        help="ct, mr, or ct+mr: both of one patient, each on its own voxel grid (default ct)",
    )
    group.add_argument(
        "--organs",
        default=DEFAULT_ORGANS,
        metavar="NAMES",
        help="structures in the label, with commas: all, kidneys, "
        f"{', '.join(ORGANS)}; liver includes its tumours (default {DEFAULT_ORGANS})",
    )
    group.add_argument(
        "--annotate",
        metavar="NAMES",
        help="label only these of the structures (tumour on its own too), for partly labelled "
        "sets; the others are background (default: all of --organs)",
    )
    group.add_argument(
        "--mr-sequence",
        metavar="NAMES",
        help="MR images, with commas: gre (T1-weighted spoiled gradient echo), tse (T2-weighted "
        "turbo spin echo), pd (proton density); each is a channel (default gre)",
    )
    group.add_argument(
        "--misalignment-mm",
        type=float,
        metavar="MM",
        help="ct+mr: shift of the MR in the world, with a rotation of 0.25 degrees per mm; "
        f"truth/ states the motion (default {MISALIGNMENT_MM:g}, with msd4d 0)",
    )
    group.add_argument(
        "--missing-channel",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the cases that lack one channel, 0 to 1; nnunet only (default 0)",
    )
    group.add_argument(
        "--benign-lesions",
        type=int,
        metavar="N",
        help="1 to N benign lesions in each liver that look like tumours in CT or MR only and are "
        f"not labelled tumour; 0: none (default {BENIGN_LESIONS} with ct+mr, else 0)",
    )
    group.add_argument(
        "--layout",
        metavar="NAME",
        help="msd: Decathlon, one channel; nnunet: nnU-Net v2, a file for each channel; msd4d: "
        "Decathlon, 2 to 4 registered channels in one file (default msd for one channel and the "
        "liver, else nnunet)",
    )


def asks_for_task03(args: argparse.Namespace) -> bool:
    """Whether the options ask for CTs in the layout of Task03_Liver, without any other option."""
    is_ct = _parse_choice("--modality", args.modality, MODALITIES) == "ct"
    is_liver = parse_organs(args.organs) == parse_organs(DEFAULT_ORGANS)
    # Any of these options changes the label, the image or the layout.
    others = (
        args.annotate,
        args.mr_sequence,
        args.misalignment_mm,
        args.missing_channel,
        args.benign_lesions,
    )
    return is_ct and is_liver and args.layout in (None, "msd") and not any(others)


def plan_channel_set(args: argparse.Namespace) -> ChannelSet:
    """Return the set that the options describe.

    Raises:
        UserError: an option has no such value, or does not fit the others.
    """
    modality = _parse_choice("--modality", args.modality, MODALITIES)
    labels = parse_organs(args.organs)
    if args.annotate is not None:
        labels = select_annotated(labels, args.annotate)
    sequences = _parse_sequences(args.mr_sequence, modality)
    channels = len(sequences) + ("ct" in modality)
    # Task03's labels do not need nnU-Net's layout, which only states more.
    has_task03_labels = args.annotate is None and labels == parse_organs(DEFAULT_ORGANS)
    layout = _parse_layout(args.layout, channels, has_task03_labels)
    if args.benign_lesions is not None and not 0 <= args.benign_lesions <= MAX_BENIGN_LESIONS:
        raise UserError(f"--benign-lesions must be 0 to {MAX_BENIGN_LESIONS}")
    # Benign lesions give the second channel a purpose: only both channels together distinguish them from
    # tumours.
    default_benign = BENIGN_LESIONS if modality == "ct+mr" else 0
    recipe = Recipe(
        modality=modality,
        sequences=sequences,
        labels=labels,
        seed=args.seed,
        size=args.size,
        hard=args.difficulty == "hard",
        benign_lesions=default_benign if args.benign_lesions is None else args.benign_lesions,
        misalignment_mm=_check_misalignment(args.misalignment_mm, modality, layout),
        missing_share=_check_missing_share(args.missing_channel, channels, layout),
        one_grid=layout == "msd4d",
    )
    return ChannelSet(args.folder, args.cases, args.test_cases, recipe, layout)


def make_channel_set(args: argparse.Namespace, most_pictures: int) -> dict[str, Any]:
    """Make the set that the options describe, and return the result of the command."""
    wanted = plan_channel_set(args)
    names = " + ".join(wanted.recipe.channels)
    if args.dry_run:
        check_channel_folder(wanted)
        write_lines(
            f"would make {args.cases} labelled and {args.test_cases} unlabelled {args.size} cases "
            f"of {names} in {args.folder}"
        )
        return {"folder": str(args.folder), "dry_run": True}
    with show_progress("phantom", args.cases + args.test_cases) as line:
        cases = write_channel_set(
            wanted, args.workers, lambda case: line.advance(note=case["case"])
        )
    _print_table(cases)
    if args.montage:
        args.montage.parent.mkdir(parents=True, exist_ok=True)
        draw_channel_montage(wanted, most_pictures).save(args.montage)
        write_lines(f"picture: {args.montage}")
    write_lines(
        f"{len(cases)} cases of {names} in {args.folder}; "
        f"next: liverseg convert {quote_path(args.folder)} STORE"
    )
    return {"folder": str(args.folder), "cases": cases}


def _parse_choice(option: str, text: str, known: tuple[Any, ...]) -> Any:
    """Return the known name; upper and lower case do not matter."""
    name = text.strip().lower()
    if name not in known:
        raise UserError(f"{option} {printable(text)}: not known; known names: {', '.join(known)}")
    return name


def _parse_sequences(text: str | None, modality: Modality) -> tuple[str, ...]:
    if "mr" not in modality:
        if text is not None:
            raise UserError("--mr-sequence needs --modality mr or ct+mr")
        return ()
    names: list[str] = []
    for part in (text if text is not None else "gre").split(","):
        name = _parse_choice("--mr-sequence", part, tuple(SEQUENCES))
        if name in names:
            raise UserError(f"--mr-sequence: {name} is given twice")
        names.append(name)
    return tuple(names)


def _parse_layout(text: str | None, channels: int, has_task03_labels: bool) -> Layout:
    if text is None:
        return "msd" if channels == 1 and has_task03_labels else "nnunet"
    layout: Layout = _parse_choice("--layout", text, LAYOUTS)
    # One NIfTI file per case: a second channel has no place in this layout.
    if layout == "msd" and channels > 1:
        raise UserError(
            f"--layout msd holds one channel, not {channels}; use nnunet, or msd4d for registered "
            "channels"
        )
    if layout == "msd4d" and not 2 <= channels <= MAX_CHANNELS_4D:
        raise UserError(f"--layout msd4d holds 2 to {MAX_CHANNELS_4D} channels, not {channels}")
    return layout


def _check_misalignment(value_mm: float | None, modality: Modality, layout: Layout) -> float:
    if value_mm is None:
        return MISALIGNMENT_MM if modality == "ct+mr" and layout != "msd4d" else 0.0
    if not math.isfinite(value_mm) or not 0 <= value_mm <= MAX_MISALIGNMENT_MM:
        raise UserError(f"--misalignment-mm must be 0 to {MAX_MISALIGNMENT_MM:g}, not {value_mm:g}")
    # With 0.25 degrees per mm the shift also turns the image; the truth file states both.
    if value_mm and modality != "ct+mr":
        raise UserError(
            "--misalignment-mm is the shift between CT and MR; it needs --modality ct+mr"
        )
    if value_mm and layout == "msd4d":
        raise UserError("--layout msd4d holds registered channels; it excludes --misalignment-mm")
    return value_mm


def _check_missing_share(share: float, channels: int, layout: Layout) -> float:
    if not 0 <= share <= 1:
        raise UserError(f"--missing-channel must be 0 to 1, not {share:g}")
    # A 4D file has all its channels by definition.
    if share and (channels < 2 or layout != "nnunet"):
        raise UserError("--missing-channel needs two channels or more, and the layout nnunet")
    return share


def _print_table(cases: list[dict[str, Any]]) -> None:
    """Print one line for each channel of each case."""
    headings = ("case", "channel", "voxels zyx", "spacing mm zyx", "axes", "liver ml", "tumour ml")
    rows = []
    for case in cases:
        volumes = case.get("volumes_ml", {})
        found = [f"{volumes[name]:.1f}" if name in volumes else "-" for name in ("liver", "tumour")]
        for channel, is_present in case["channels"].items():
            if not is_present:
                rows.append((case["case"], channel, "absent", "-", "-", "-", "-"))
                continue
            grid = case["grids"][channel]
            voxels = "x".join(map(str, grid["shape_zyx"]))
            spacing = "x".join(f"{mm:.2f}" for mm in grid["spacing_mm_zyx"])
            rows.append((case["case"], channel, voxels, spacing, grid["orientation"], *found))
    print_table(headings, rows, right=headings[2:])
