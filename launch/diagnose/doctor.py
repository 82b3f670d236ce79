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
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from liverseg_dist.commands.doctor import LOCKS_REMEDY
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
from .probe import LINE_PREFIX, MARKER_PREFIX

LOG_TIMEOUT_S = 30.0
"""How long a network file system may need to show a log that a node has written."""
SLOW_WRITE_MIB_S = 50.0
SLOW_NETWORK_GIB_S = {"cpu": 0.1, "gpu": 1.0}
"""10 GbE carries about 1 GiB/s; below that 3D U-Nets on GPUs wait for the network. Gloo over 1 GbE
reaches 0.1."""
MAX_CLOCK_OFFSET_S = 2.0
"""Larger offsets put logs and TensorBoard in the wrong order, and mislead checks of file times."""
MIN_FREE_SHARE = 0.9
"""Of the memory of a GPU; if less is free, another process uses the GPU."""
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

Report = dict[str, Any]
"""What one rank measured, see `probe`."""


@dataclass(frozen=True)
class Finding:
    """A problem (training would fail) or a warning (it would be slow, or logs confusing)."""

    level: str
    what: str
    remedy: str


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
        print(render_batch_file(job), end="")
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
    print(format_node_table(reports))
    for finding in findings:
        print(f"{finding.level}: {finding.what}; {finding.remedy}")
    has_problem = any(finding.level == "problem" for finding in findings)
    print(f"verdict: {_format_verdict(findings, has_problem=has_problem)}")
    if print_json:
        result = {
            "job_id": status.job_id,
            "ready": not has_problem,
            "ranks": reports,
            "findings": [asdict(finding) for finding in findings],
        }
        if failure := print_checked(json.dumps(result)):
            print(f"launch: the result could not be written to stdout: {failure}", file=sys.stderr)
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
            print(f"-- job {job_id}: {last_state}", file=sys.stderr, flush=True)
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


def find_problems(
    reports: Sequence[Report], requested: Resources, *, job_state: str, log: Path
) -> list[Finding]:
    """All findings, problems first.

    Args:
        reports: The reports of the ranks.
        requested: The resources of the job.
        job_state: SLURM's state of the job.
        log: The log of the job, to name it in a remedy.
    """
    if not reports:
        return [_explain_missing_reports(job_state, log)]
    findings = []
    for report in reports:
        if "error" in report:
            what = f"{describe_place(report)}: {report['error']}"
            findings.append(Finding("problem", what, "see above"))
    missing = sorted(set(range(requested.ranks)) - {report["rank"] for report in reports})
    if missing:
        what = f"rank {', '.join(map(str, missing))} of {requested.ranks} printed no report"
        remedy = f"its node may lack the project or its .venv; read {log}"
        findings.append(Finding("problem", what, remedy))
    findings += _check_connections(reports)
    findings += _check_clocks(reports)
    findings += _check_bandwidth(reports, requested)
    findings += _check_folder(reports)
    findings += _check_gpus(reports, requested)
    findings += _check_versions(reports)
    # "problem" comes before "warning" in the alphabet.
    return sorted(findings, key=lambda finding: finding.level)


def _explain_missing_reports(job_state: str, log: Path) -> Finding:
    """The problem of a job without any report."""
    if log.exists():
        return Finding(
            "problem", f"no rank printed a report (job {job_state})", f"read the reason in {log}"
        )
    remedy = (
        "the nodes do not see its folder, or SLURM could not start the job; "
        "choose a --job-dir that all nodes share"
    )
    return Finding("problem", f"{log} was never written (job {job_state})", remedy)


def describe_place(report: Report) -> str:
    """`rank 3 on node2`."""
    return f"rank {report['rank']} on {report['node']}"


def _check_connections(reports: Sequence[Report]) -> list[Finding]:
    findings = []
    for report in reports:
        if report.get("meets", False) or "error" in report:
            continue
        reason = report.get("network_error", "it ended during the test")
        what = f"{describe_place(report)} cannot connect to the other ranks: {reason}"
        remedy = (
            "select the network between the nodes: "
            "export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0"
        )
        findings.append(Finding("problem", what, remedy))
    return findings


def _check_clocks(reports: Sequence[Report]) -> list[Finding]:
    findings = []
    reference = reports[0]["node"]
    for report in reports:
        offset_s = report.get("clock_s", 0.0)
        if abs(offset_s) > MAX_CLOCK_OFFSET_S:
            what = f"the clock of {report['node']} is {offset_s:+.1f} s off that of {reference}"
            remedy = "ask the administrator to repair its time service (chrony, ntpd)"
            findings.append(Finding("warning", what, remedy))
    return findings


def _check_bandwidth(reports: Sequence[Report], requested: Resources) -> list[Finding]:
    speeds = [report["all_reduce_gib_s"] for report in reports if report.get("all_reduce_gib_s")]
    limit = SLOW_NETWORK_GIB_S["gpu" if requested.gpus_per_node else "cpu"]
    if not speeds or requested.nodes == 1 or min(speeds) >= limit:
        return []
    what = f"all-reduce moves {min(speeds):.2f} GiB/s between nodes, less than {limit}"
    remedy = (
        "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME may name the wrong network; "
        "NCCL_DEBUG=INFO shows which is used"
    )
    return [Finding("warning", what, remedy)]


def _check_folder(reports: Sequence[Report]) -> list[Finding]:
    findings = []
    for report in reports:
        node = report["node"]
        if report.get("sees_folder") is False:
            what = f"{node} does not see the folder that this command wrote to"
            remedy = "choose --job-dir (and run.dir) on a file system that all nodes share"
            findings.append(Finding("problem", what, remedy))
        if "write_error" in report:
            what = f"{node} cannot write there: {report['write_error']}"
            remedy = "check quota and permissions of the folder"
            findings.append(Finding("problem", what, remedy))
        if report.get("write_mib_s", SLOW_WRITE_MIB_S) < SLOW_WRITE_MIB_S:
            what = f"{node} writes {report['write_mib_s']:.0f} MiB/s there"
            remedy = (
                "checkpoints will be slow: use a scratch file system, "
                "or a larger checkpoint.every_steps"
            )
            findings.append(Finding("warning", what, remedy))
        if report.get("locks") is False:
            what = f"the folder has no file locks on {node}"
            findings.append(Finding("warning", what, LOCKS_REMEDY))
    # The ranks of a node find the same.
    return list(dict.fromkeys(findings))


def _check_gpus(reports: Sequence[Report], requested: Resources) -> list[Finding]:
    if not requested.gpus_per_node:
        return []
    findings = []
    for report in reports:
        gpus = report.get("gpus", [])
        node = report["node"]
        if not gpus and "error" not in report:
            what = f"{describe_place(report)} sees no GPU, requested: {requested.gpus_per_node}"
            remedy = "run LIVERSEG_TORCH=cuda tools/setup; `srun nvidia-smi` shows the driver"
            findings.append(Finding("problem", what, remedy))
        for number, (free_gib, total_gib) in enumerate(gpus):
            if free_gib < MIN_FREE_SHARE * total_gib:
                what = f"GPU {number} of {node} has {free_gib:.0f} of {total_gib:.0f} GiB free"
                remedy = (
                    f"another process uses it: exclude the node with --sbatch exclude={node}, "
                    "and report it to the administrator"
                )
                findings.append(Finding("warning", what, remedy))
    # Several ranks may see the same GPU.
    return list(dict.fromkeys(findings))


def _check_versions(reports: Sequence[Report]) -> list[Finding]:
    findings = []
    with_versions = [report for report in reports if "versions" in report]
    names = {name for report in with_versions for name in report["versions"]}
    for name in sorted(names):
        nodes_by_version: dict[str, set[str]] = {}
        for report in with_versions:
            version = report["versions"].get(name, "none")
            nodes_by_version.setdefault(version, set()).add(report["node"])
        if len(nodes_by_version) > 1:
            parts = []
            for version, nodes in sorted(nodes_by_version.items()):
                parts.append(f"{version} on {'/'.join(sorted(nodes))}")
            what = f"{name} differs: {', '.join(parts)}"
            remedy = "use one .venv and one project on the shared file system for all nodes"
            findings.append(Finding("problem", what, remedy))
    return findings


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
