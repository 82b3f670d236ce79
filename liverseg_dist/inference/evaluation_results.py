"""Results of an evaluation: from the entries of all ranks in the ledger to summary, tables and report.

`liverseg evaluate` calls it on rank 0 after all ranks have scored their cases. Nothing in the summary and the report
depends on the number of ranks, on time or on the machine, so that two evaluations can be compared byte by byte.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from liverseg_dist.config import CT_CHANNELS
from liverseg_dist.data.audit.audit_summary import summarize_audit
from liverseg_dist.errors import RunFailed, UserError, printable
from liverseg_dist.evaluation.case_scores import structures_of_summary
from liverseg_dist.evaluation.curves import Curves, read_curves
from liverseg_dist.evaluation.ledger import Ledger
from liverseg_dist.evaluation.report.tensorboard import write_tensorboard
from liverseg_dist.evaluation.results import PICTURES, SUMMARY, write_results
from liverseg_dist.inference.case_inputs import CaseInputs
from liverseg_dist.inference.evaluate_cases import CaseEvaluator
from liverseg_dist.inference.load_run import POSTPROCESS, LoadedRun
from liverseg_dist.inference.postprocess_operations import select_active_operations
from liverseg_dist.inference.postprocess_report import describe_postprocessing
from liverseg_dist.inference.scan_checks import select_warnings
from liverseg_dist.inference.structure_settings import dump_inference
from liverseg_dist.inference.structure_values import is_task03
from liverseg_dist.texts.paths import quote_path
from liverseg_dist.tracking.provenance import collect_provenance

PART_TITLES = {
    "test": "test cases",
    "validation": "validation cases",
    "train": "training cases",
    "cases": "chosen cases",
}
SETTINGS_SHOWN = ("inference", "data", "convert", "model", "loss", "train")
SHARED_DISK_PATIENCE_S = 60.0
"""A network file system may take this long to show a file that another node has written."""
MAX_NAMED_CASES = 5


def refuse_slabs_over_scans(folder: Path) -> None:
    """Keep scores of slabs from replacing scores of whole scans, which are the ones to publish.

    Args:
        folder: folder of the results, with or without an earlier evaluation.

    Raises:
        UserError: the folder contains the scores of whole scans.
    """
    try:
        # Only the part of the data that decides is read, so that summaries of older versions work
        # too.
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        has_scan_scores = summary["details"]["input"] == "scan"
    # Without a readable summary there are no earlier scores to protect.
    except (OSError, ValueError, KeyError, TypeError):
        return
    if has_scan_scores:
        raise UserError(
            f"{folder}: contains the scores of whole scans; "
            "give --source again, or another --out for the scores of slabs"
        )


def input_kind(inputs: CaseInputs) -> str:
    """What the network is given: "slab" (of the store) or "scan" (whole, from its file)."""
    return "slab" if inputs.sources is None else "scan"


def read_complete_ledger(
    ledger: Ledger, wanted: set[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Read the scores and failures of the wanted cases.

    Waits up to `SHARED_DISK_PATIENCE_S` until the entries of other nodes are visible on this node.

    Returns:
        (records of scored cases, reason of each failed case).

    Raises:
        RunFailed: a case has neither a score nor a failure.
    """
    end = time.monotonic() + SHARED_DISK_PATIENCE_S
    while True:
        # Entries of other parts of the store lie in the same folder.
        cases = [case for case in ledger.read_all() if case["case_id"] in wanted]
        failures = {name: text for name, text in ledger.failures().items() if name in wanted}
        missing = sorted(wanted - {case["case_id"] for case in cases} - set(failures))
        if not missing:
            return cases, failures
        # After the read, so that the entries are read at least once.
        if time.monotonic() > end:
            names = ", ".join(missing[:MAX_NAMED_CASES])
            raise RunFailed(f"{ledger.folder}: no entry for {names}; run the same line again")
        # Short, compared with the seconds that network file systems take to show a new file.
        time.sleep(0.5)


def describe_evaluation(
    run_dir: Path,
    runs: Sequence[LoadedRun],
    inputs: CaseInputs,
    part: str,
    weights: str,
    leakage_warning: str,
) -> dict[str, Any]:
    """Collect what the report states about the evaluation, for `summary["details"]`.

    Args:
        run_dir: run folder as given on the command line.
        part: part of the store, or "cases" for chosen ones.
        weights: "last", "best" or "both".
        leakage_warning: one line, empty if no case was used in training.
    """
    run = runs[0]
    # The folder's name only: a path may contain the name of a user or a patient.
    run_name = printable(run_dir.resolve().name)
    data_set = str(inputs.store.root["name"] or Path(inputs.store.path).name)
    details: dict[str, Any] = {
        "title": f"{run_name}: evaluation on the {PART_TITLES[part]} of {data_set}",
        "run": run_name,
        "data_set": data_set,
        "store": Path(inputs.store.path).resolve().name,
        "postprocessing": describe_postprocessing(
            run.settings.inference, run.settings.data.label_scheme, run_dir
        ),
        "part": part,
        "fold": run.settings.data.fold,
        "input": input_kind(inputs),
        "weights": weights,
        "weights_sha256": [one.weights_sha256 for one in runs],
    }
    notes = []
    if inputs.sources is None:
        notes.append(
            "64-slice slabs, placed with the help of the truth; outside them all is background"
        )
    if part == "validation" and (run_dir / POSTPROCESS).is_file():
        notes.append("post-processing was chosen on these cases: expect a little less on others")
    if leakage_warning:
        notes.append(f"{leakage_warning}: expect less on others")
    if notes:
        details["note"] = "; ".join(notes)
    settings = run.settings.model_dump(mode="json")
    for name in SETTINGS_SHOWN:
        details[name] = settings[name]
    labels = run.settings.data.label_scheme
    details["inference"] = dump_inference(run.settings.inference, labels)
    # Absent for the labels of Task03 and one channel of CT, as in earlier versions.
    if is_task03(labels):
        del details["data"]["labels"]
    if run.settings.data.image_channels == CT_CHANNELS:
        del details["data"]["channels"], details["data"]["optional_channels"]
    # The path of the store is not part of the result, and reports must not contain paths.
    details["data"].pop("store")
    details["audit"] = summarize_audit(inputs.store.audit)
    return details


def add_scan_note(details: dict[str, Any], cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the details with a note about scans with warnings and scans that --force let through."""
    notes = [details["note"]] if "note" in details else []
    for is_forced, phrase in (
        (True, "segmented by --force although the audit refuses them"),
        (False, "with warnings"),
    ):
        names = []
        for case in cases:
            # Warnings come from scans only; slabs were checked in conversion.
            findings = select_warnings(case.get("scan_findings", ()))
            codes = sorted({finding["code"] for finding in findings})
            if codes and bool(case.get("forced")) == is_forced:
                names.append(f"{case['case_id']} ({', '.join(codes)})")
        if names:
            notes.append(f"{phrase}: {', '.join(names)}")
    return {**details, "note": "; ".join(notes)} if notes else details


def read_training_curves(runs: Sequence[LoadedRun]) -> dict[str, Curves]:
    """Read the training curves by run name.

    Runs of one name are numbered. A run that was given twice appears once.
    """
    # A dict removes duplicates and keeps the order, which a set does not.
    folders = list(dict.fromkeys(run.path.resolve() for run in runs))
    names = [folder.name for folder in folders]
    curves = {}
    for number, folder in enumerate(folders, start=1):
        is_unique = names.count(folder.name) == 1
        title = folder.name if is_unique else f"{folder.name} ({number})"
        curves[title] = read_curves(folder)
    return curves


def describe_moved_results(moved: Path, folder: Path) -> str:
    """Line for the user: where the results of other weights or settings were moved, with their Dice."""
    summary = json.loads((moved / SUMMARY).read_text(encoding="utf-8"))
    scores = []
    for name in structures_of_summary(summary):
        dice = summary[name]["dice_per_case"]
        scores.append(f"{name} Dice {'undefined' if dice is None else f'{dice:.4f}'}")
    return (
        f"earlier results of other weights or settings are kept in {moved} ({', '.join(scores)}); "
        f"to compare: liverseg compare {quote_path(moved)} {quote_path(folder)}"
    )


def write_evaluation(
    evaluation: CaseEvaluator,
    folder: Path,
    details: dict[str, Any],
    training: dict[str, Curves],
    cases: list[dict[str, Any]],
    failures: dict[str, str],
) -> dict[str, Any]:
    """Write summary, tables, report and TensorBoard pictures of a finished evaluation.

    Returns:
        The content of summary.json.

    Raises:
        RunFailed: no case could be scored.
    """
    if not cases:
        first = next(iter(failures.values()), "no reason was recorded")
        raise RunFailed(
            f"{folder}: none of {len(evaluation.inputs.slabs)} cases could be scored; "
            f"the first: {first}"
        )
    predictor = evaluation.predictor
    # Date and machine are kept apart from the summary, so that equal results stay equal files.
    environment = {"date": time.strftime("%Y-%m-%d"), **collect_provenance(predictor.device)}
    summary = write_results(
        folder,
        cases,
        failures,
        add_scan_note(details, cases),
        evaluation.ledger,
        environment,
        training=training,
        postprocessing=select_active_operations(predictor.config, predictor.outputs.labels),
    )
    max_steps = evaluation.inputs.settings.train.max_steps
    write_tensorboard(folder, summary, cases, folder / PICTURES, max_steps)
    return summary
