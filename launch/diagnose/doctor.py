"""A short job tests the cluster: `python -m launch doctor --nodes 2 --gpus-per-node 4`.

It tests what training needs: whether the nodes see the folder and how fast they write there,
whether all ranks can connect, the all-reduce bandwidth between them, clocks, versions and free
GPUs. The output is a table with a row per node, the findings with a remedy for each, and a verdict.
The exit code is 1 if training would fail. `--json` adds everything as the last line.
"""

import argparse
import dataclasses
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from liverseg_dist.console import write_error, write_lines, write_progress
from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, UserError
from liverseg_dist.streams import print_checked
from liverseg_dist.tracking.terminal_table import format_table, terminal_width

from .. import PACKAGE, PROGRAM
from ..slurm.executors import start_locally, submit_to_slurm
from ..slurm.frozen_inputs import find_setup_file
from ..slurm.launch_options import build_parser
from ..slurm.option_parser import OneLineParser, list_option_strings, suggest_option
from ..slurm.sbatch import BatchJob, Resources, render_batch_file
from ..slurm.status import POLL_S, JobStatus, list_jobs
from ..slurm.submit import record_submission
from ..slurm.units import time_to_seconds
from .findings import Finding, Report, describe_expected_exchange, find_problems
from .probe import LINE_PREFIX, MARKER_PREFIX

LOG_TIMEOUT_S = 30.0
"""How long a network file system may need to show a log that a node has written."""
TABLE_HEADINGS = (
    "node",
    "ranks",
    "connected",
    "folder",
    "write MiB/s",
    "all-reduce GiB/s",
    "clock s",
    "GPUs free",
    "torch",
)


def submit_command(
    args: argparse.Namespace, resources: Resources, command: str, arguments: Sequence[str]
) -> int:
    """Submit the job, wait for it, print table and verdict.

    Args:
        args: The options of launch.
        resources: The resources of the job.
        command: doctor.
        arguments: The other words of the line, of which only --json is accepted.

    Returns:
        The exit code.

    Raises:
        UserError: The line has another argument, or a value of --cluster without nodes.
    """
    print_json = _parse_arguments(arguments)
    if args.cluster == "debug":
        raise UserError(
            "doctor: tests nodes, so it needs --cluster slurm or local; "
            "`liverseg doctor` tests this machine"
        )
    folder = (args.job_dir or Path("runs")).absolute()
    # Random, so that the file of an earlier or another test is not mistaken for this one.
    marker = secrets.token_hex(4)
    job = build_doctor_job(folder, resources, marker, launcher=args.launcher, name=args.name)
    job = dataclasses.replace(job, environment=tuple(args.env), setup=find_setup_file(args.setup))
    if args.dry_run:
        write_lines(render_batch_file(job).removesuffix("\n"))
        return EXIT_DONE
    folder.mkdir(parents=True, exist_ok=True)
    marker_file = folder / f"{MARKER_PREFIX}{marker}"
    marker_file.touch()
    try:
        status = _run_job(job, is_local=args.cluster == "local")
    finally:
        marker_file.unlink(missing_ok=True)
    reports = read_reports(_wait_for_log(status.log))
    findings = find_problems(reports, resources, job_state=status.state, log=status.log)
    lines = [format_node_table(reports)]
    expected = describe_expected_exchange(reports, resources)
    if expected:
        lines.append(expected)
    for finding in findings:
        lines.append(f"{finding.level}: {finding.what}; {finding.remedy}")
    has_problem = any(finding.level == "problem" for finding in findings)
    write_lines(*lines, f"verdict: {_format_verdict(findings, has_problem=has_problem)}")
    if print_json:
        result = {
            "job_id": status.job_id,
            "ready": not has_problem,
            "ranks": reports,
            "findings": [asdict(finding) for finding in findings],
        }
        if failure := print_checked(json.dumps(result)):
            write_error(f"the result could not be written to stdout: {failure}", "launch")
            return EXIT_FAILED
    return EXIT_FAILED if has_problem else EXIT_DONE


def _parse_arguments(arguments: Sequence[str]) -> bool:
    """Whether --json is given. Raises `UserError` for any other argument."""
    parser = OneLineParser(prog=f"{PROGRAM} doctor", add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    args, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        guess = suggest_option(unknown[0], [*list_option_strings(build_parser()), "--json"])
        raise UserError(
            f"doctor takes no {unknown[0]}{guess}; {PROGRAM} --help lists the options of its job"
        )
    return bool(args.json)


def _format_verdict(findings: Sequence[Finding], *, has_problem: bool) -> str:
    if has_problem:
        return "training would fail here"
    return "works, see the warnings" if findings else "ready"


def build_doctor_job(
    folder: Path, resources: Resources, marker: str, *, launcher: str = "srun", name: str = ""
) -> BatchJob:
    """The job that runs `probe` on every rank.

    Args:
        folder: The folder to test, which also gets the log.
        resources: The resources of the job.
        marker: Name of the file in `folder` that the nodes must see.
        launcher: srun or torchrun.
        name: Job name; empty: liverseg-doctor.
    """
    arguments = ["--folder", str(folder), "--marker", marker]
    arguments += ["--gpus", str(resources.gpus_per_node)]
    return BatchJob(
        name=name or "liverseg-doctor",
        module=(f"{PACKAGE}.diagnose.probe", *arguments),
        folder=folder,
        resources=resources,
        launcher=launcher,
        restarts=0,
    )


def _run_job(job: BatchJob, *, is_local: bool) -> JobStatus:
    """Run the job; returns its status at the end."""
    process = None
    if is_local:
        started = start_locally(job, minutes=max(1, time_to_seconds(job.resources.time) // 60))
        job_id, process = started.job_id, started._process
        record_submission(job, job_id, "local")
    else:
        text = render_batch_file(job)
        job_id = submit_to_slurm(job, text)
        record_submission(job, job_id, "slurm", text)
    last_state = ""
    while True:
        status = next(status for status in list_jobs(job.folder) if status.job_id == job_id)
        if status.state != last_state:
            last_state = status.state
            write_progress(f"-- job {job_id}: {last_state}")
        if status.is_finished:
            if process is not None:
                process.wait()
            return status
        if process is not None:
            # A zombie would count as running.
            process.poll()
        time.sleep(POLL_S / 4)


def _wait_for_log(path: Path) -> str:
    """The text of the log; empty if it does not appear."""
    end = time.monotonic() + LOG_TIMEOUT_S
    while not path.exists() and time.monotonic() < end:
        time.sleep(POLL_S / 4)
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def read_reports(log: str) -> list[Report]:
    """The reports of the ranks in a log, in rank order."""
    found: dict[int, Report] = {}
    for line in log.splitlines():
        _, prefix, text = line.partition(LINE_PREFIX)
        # A killed rank may have written half a line.
        if prefix and text.endswith("}"):
            content = json.loads(text)
            found.setdefault(int(content["rank"]), {}).update(content)
    return [found[rank] for rank in sorted(found)]


def format_node_table(reports: Sequence[Report]) -> str:
    """A table with a row per node, folded to the width of the terminal."""
    lines = []
    for node in dict.fromkeys(report["node"] for report in reports):
        lines.append(_format_node(node, [report for report in reports if report["node"] == node]))
    folded = format_table(TABLE_HEADINGS, lines, terminal_width(), right=TABLE_HEADINGS)
    return "\n".join(line.plain for line in folded)


def _format_node(node: str, reports: Sequence[Report]) -> tuple[str, ...]:
    """The cells of one node."""
    merged: Report = {}
    # The values of the node's first rank have precedence.
    for report in reversed(reports):
        merged |= report
    free = [f"{free:.0f}/{total:.0f}" for free, total in merged.get("gpus", [])]
    return (
        node,
        str(len(reports)),
        "yes" if all(report.get("meets") for report in reports) else "NO",
        "seen" if all(report.get("sees_folder") for report in reports) else "NO",
        _format_number(merged.get("write_mib_s"), ".0f"),
        _format_number(merged.get("all_reduce_gib_s"), ".2f"),
        _format_number(merged.get("clock_s"), "+.3f"),
        " ".join(free) or "-",
        merged.get("versions", {}).get("torch", "?"),
    )


def _format_number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
