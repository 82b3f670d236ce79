"""`python -m launch doctor --nodes 2 --gpus-per-node 4 --folder runs`: a short job tries what training needs.

Whether the nodes see the folder and how fast they write there, whether all ranks meet, the all-reduce bandwidth between
them, clocks, versions, free GPUs: a row per node, then a verdict with a remedy for each finding. Exit code 1 when
something stands in the way. `--json` adds all of it as the last line.
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

from liverseg_dist.errors import EXIT_DONE, EXIT_FAILED, UserError
from liverseg_dist.locks import LOCKS_REMEDY
from liverseg_dist.streams import print_checked
from liverseg_dist.tracking.terminal_table import format_table, terminal_width

from .. import PACKAGE, PROGRAM
from ..slurm.executors import start_here, submit_to_slurm
from ..slurm.frozen_inputs import find_setup_file
from ..slurm.launch_options import OneLineParser, build_parser, option_strings, suggest_option
from ..slurm.sbatch import BatchJob, Resources, render_batch_file
from ..slurm.status import POLL_S, JobRow, list_jobs
from ..slurm.submit import record_submission
from ..slurm.units import time_seconds
from .probe import MARK

LOG_S = 30.0
"""How long a network file system may take to show a log that a node has written."""
SLOW_WRITE_MIB_S = 50.0
SLOW_NETWORK_GIB_S = {"cpu": 0.1, "gpu": 1.0}
"""10 GbE carries about 1 GiB/s; below that 3D U-Nets on GPUs wait for each other. Gloo over 1 GbE reaches 0.1."""
SKEW_S = 2.0
"""Clocks further apart disorder logs and TensorBoard, and confuse `make`-like checks of file times."""
FREE_SHARE = 0.9

Report = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """`level`: problem (training would fail) or warning (it would be slow or confusing)."""

    level: str
    what: str
    remedy: str


def submit_command(
    args: argparse.Namespace, resources: Resources, command: str, arguments: Sequence[str]
) -> int:
    """Submit, wait, print table and verdict; the exit code. Raises `UserError`."""
    parser = OneLineParser(prog=f"{PROGRAM} doctor", add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    own, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        guess = suggest_option(unknown[0], [*option_strings(build_parser()), "--json"])
        raise UserError(
            f"doctor takes no {unknown[0]}{guess}; see {PROGRAM} --help for what it asks SLURM for"
        )
    if args.cluster == "debug":
        raise UserError(
            "doctor: tries nodes, so it needs --cluster slurm or local; `liverseg doctor` looks at this one"
        )
    folder = (args.folder or Path("runs")).absolute()
    word = secrets.token_hex(4)
    job = doctor_job(folder, resources, word, launcher=args.launcher, name=args.name)
    job = dataclasses.replace(job, environment=tuple(args.env), setup=find_setup_file(args.setup))
    if args.dry_run:
        print(render_batch_file(job), end="")
        return EXIT_DONE
    folder.mkdir(parents=True, exist_ok=True)
    sign = folder / f".doctor-{word}"
    sign.touch()
    try:
        row = _run(job, local=args.cluster == "local")
    finally:
        sign.unlink(missing_ok=True)
    reports = read_reports(_log(row.log))
    found = find_problems(reports, resources, job_state=row.state, log=row.log)
    print(format_node_table(reports))
    for finding in found:
        print(f"{finding.level}: {finding.what}; {finding.remedy}")
    bad = any(finding.level == "problem" for finding in found)
    print(
        f"verdict: {'training would fail here' if bad else 'ready' if not found else 'works, see the warnings'}"
    )
    if own.json:
        findings = [asdict(finding) for finding in found]
        result = {"job_id": row.job_id, "ready": not bad, "ranks": reports, "findings": findings}
        if failure := print_checked(json.dumps(result)):
            print(f"launch: the result could not be written to stdout: {failure}", file=sys.stderr)
            return EXIT_FAILED
    return EXIT_FAILED if bad else EXIT_DONE


def doctor_job(
    folder: Path, resources: Resources, word: str, *, launcher: str = "srun", name: str = ""
) -> BatchJob:
    words = ["--folder", str(folder), "--word", word, "--gpus", str(resources.gpus_per_node)]
    return BatchJob(
        name=name or "liverseg-doctor",
        module=(f"{PACKAGE}.diagnose.probe", *words),
        folder=folder,
        resources=resources,
        launcher=launcher,
        restarts=0,
    )


def _run(job: BatchJob, *, local: bool) -> JobRow:
    """The job's row when it is over."""
    process = None
    if local:
        started = start_here(job, minutes=max(1, time_seconds(job.resources.time) // 60))
        job_id, process = started.job_id, started._process
        record_submission(job, job_id, "local")
    else:
        text = render_batch_file(job)
        job_id = submit_to_slurm(job, text)
        record_submission(job, job_id, "slurm", text)
    state = ""
    while True:
        row = next(row for row in list_jobs(job.folder) if row.job_id == job_id)
        if row.state != state:
            state = row.state
            print(f"-- job {job_id}: {state}", file=sys.stderr, flush=True)
        if row.is_over:
            if process is not None:
                process.wait()
            return row
        if process is not None:
            process.poll()  # reaped, it is seen to be over
        time.sleep(POLL_S / 4)


def _log(path: Path) -> str:
    end = time.monotonic() + LOG_S
    while not path.exists() and time.monotonic() < end:
        time.sleep(POLL_S / 4)
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def read_reports(log: str) -> list[Report]:
    """What each rank said, in rank order."""
    found: dict[int, Report] = {}
    for line in log.splitlines():
        _, mark, text = line.partition(MARK)
        if mark and text.endswith("}"):  # not what a killed rank left half-written
            content = json.loads(text)
            found.setdefault(int(content["rank"]), {}).update(content)
    return [found[rank] for rank in sorted(found)]


def find_problems(
    reports: Sequence[Report], asked: Resources, *, job_state: str, log: Path
) -> list[Finding]:
    """What stands in the way, the gravest first. Pure."""
    if not reports:
        if log.exists():
            return [
                Finding("problem", f"no rank said anything (job {job_state})", f"read why in {log}")
            ]
        remedy = "the nodes do not see its folder, or SLURM could not start the job; choose a shared --folder"
        return [Finding("problem", f"{log} was never written (job {job_state})", remedy)]
    found = [
        Finding("problem", f"{describe_place(report)}: {report['error']}", "see above")
        for report in reports
        if "error" in report
    ]
    if missing := sorted(set(range(asked.ranks)) - {report["rank"] for report in reports}):
        what = f"rank {', '.join(map(str, missing))} of {asked.ranks} said nothing"
        found.append(
            Finding("problem", what, f"its node may lack the project or its .venv; read {log}")
        )
    found += [
        *_network(reports, asked),
        *_folder(reports),
        *_gpus(reports, asked),
        *_versions(reports),
    ]
    return sorted(found, key=lambda finding: finding.level)


def describe_place(report: Report) -> str:
    return f"rank {report['rank']} on {report['node']}"


def _network(reports: Sequence[Report], asked: Resources) -> list[Finding]:
    found = []
    for report in reports:
        if not report.get("meets", False) and "error" not in report:
            why = report.get("network_error", "it died while it tried")
            remedy = "name the interface that joins the nodes: export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0"
            found.append(
                Finding(
                    "problem", f"{describe_place(report)} does not meet the others: {why}", remedy
                )
            )
        if abs(report.get("clock_s", 0.0)) > SKEW_S:
            what = f"the clock of {report['node']} is {report['clock_s']:+.1f} s off that of {reports[0]['node']}"
            found.append(Finding("warning", what, "have its time service (chrony, ntpd) mended"))
    speeds = [report["all_reduce_gib_s"] for report in reports if report.get("all_reduce_gib_s")]
    limit = SLOW_NETWORK_GIB_S["gpu" if asked.gpus_per_node else "cpu"]
    if speeds and asked.nodes > 1 and min(speeds) < limit:
        what = f"all-reduce moves {min(speeds):.2f} GiB/s between nodes, less than {limit}"
        remedy = "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME may name the wrong network; NCCL_DEBUG=INFO shows which"
        found.append(Finding("warning", what, remedy))
    return found


def _folder(reports: Sequence[Report]) -> list[Finding]:
    found = []
    for report in reports:
        if report.get("sees_folder") is False:
            what = f"{report['node']} does not see the folder that this command wrote to"
            found.append(
                Finding(
                    "problem",
                    what,
                    "give --folder (and run.dir) on a file system that all nodes share",
                )
            )
        if "write_error" in report:
            what = f"{report['node']} cannot write there: {report['write_error']}"
            found.append(Finding("problem", what, "check quota and permissions of the folder"))
        if report.get("write_mib_s", SLOW_WRITE_MIB_S) < SLOW_WRITE_MIB_S:
            what = f"{report['node']} writes {report['write_mib_s']:.0f} MiB/s there"
            remedy = (
                "checkpoints will lag: a scratch file system, or a larger checkpoint.every_steps"
            )
            found.append(Finding("warning", what, remedy))
        if report.get("locks") is False:
            what = f"the folder has no file locks on {report['node']}"
            found.append(Finding("warning", what, LOCKS_REMEDY))
    return list(dict.fromkeys(found))


def _gpus(reports: Sequence[Report], asked: Resources) -> list[Finding]:
    found = []
    for report in reports:
        gpus = report.get("gpus", [])
        if asked.gpus_per_node and not gpus and "error" not in report:
            remedy = "LIVERSEG_TORCH=cuda tools/setup; `srun nvidia-smi` shows the driver"
            found.append(
                Finding(
                    "problem",
                    f"{describe_place(report)} sees no GPU, {asked.gpus_per_node} were asked for",
                    remedy,
                )
            )
        for number, (free, total) in enumerate(gpus):
            if asked.gpus_per_node and free < FREE_SHARE * total:
                what = f"GPU {number} of {report['node']} has {free:.0f} of {total:.0f} GiB free"
                remedy = f"somebody's process sits there: --sbatch exclude={report['node']}, and tell the administrator"
                found.append(Finding("warning", what, remedy))
    return list(dict.fromkeys(found))


def _versions(reports: Sequence[Report]) -> list[Finding]:
    found = []
    told = [report for report in reports if "versions" in report]
    for name in sorted({name for report in told for name in report["versions"]}):
        where: dict[str, set[str]] = {}
        for report in told:
            where.setdefault(report["versions"].get(name, "none"), set()).add(report["node"])
        if len(where) > 1:
            differs = ", ".join(
                f"{version} on {'/'.join(sorted(nodes))}"
                for version, nodes in sorted(where.items())
            )
            remedy = "let all nodes use one .venv and one project on the shared file system"
            found.append(Finding("problem", f"{name} differs: {differs}", remedy))
    return found


def format_node_table(reports: Sequence[Report]) -> str:
    """A row per node; folded to the terminal's width."""
    heads = (
        "node",
        "ranks",
        "meets",
        "folder",
        "write MiB/s",
        "all-reduce GiB/s",
        "clock s",
        "GPUs free",
        "torch",
    )
    lines: list[Sequence[str]] = []
    for node in dict.fromkeys(report["node"] for report in reports):
        mine = [report for report in reports if report["node"] == node]
        merged: Report = {}
        for report in reversed(mine):
            merged |= report
        free = [f"{free:.0f}/{total:.0f}" for free, total in merged.get("gpus", [])]
        lines.append((
            node,
            str(len(mine)),
            "yes" if all(report.get("meets") for report in mine) else "NO",
            "seen" if all(report.get("sees_folder") for report in mine) else "NO",
            _number(merged.get("write_mib_s"), ".0f"),
            _number(merged.get("all_reduce_gib_s"), ".2f"),
            _number(merged.get("clock_s"), "+.3f"),
            " ".join(free) or "-",
            merged.get("versions", {}).get("torch", "?"),
        ))  # fmt: skip
    folded = format_table(heads, lines, terminal_width(), right=heads)
    return "\n".join(line.plain for line in folded)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
