"""The problems and warnings that `launch doctor` finds in the reports of the ranks.

Pure functions of the reports, so that tests need no cluster.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liverseg_dist.locks import LOCKS_REMEDY

from ..slurm.sbatch import Resources

SLOW_WRITE_MIB_S = 50.0
SLOW_NETWORK_GIB_S = {"cpu": 0.1, "gpu": 1.0}
"""10 GbE carries about 1 GiB/s; below that 3D U-Nets on GPUs wait for the network. Gloo over 1 GbE
reaches 0.1."""
TYPICAL_NETWORKS = "1 GbE 0.1, 10 GbE 1, 100 Gbit/s InfiniBand 10, 400 Gbit/s 40 GiB/s"
EXAMPLE_PARAMETERS, BYTES_PER_GRADIENT = 10_000_000, 4
MAX_CLOCK_OFFSET_S = 2.0
"""Larger offsets put logs and TensorBoard in the wrong order, and mislead checks of file times."""
MIN_FREE_SHARE = 0.9
"""Of the memory of a GPU; if less is free, another process uses the GPU."""

Report = dict[str, Any]
"""What one rank measured, see `probe`."""


@dataclass(frozen=True)
class Finding:
    """A problem (training would fail) or a warning (it would be slow, or logs confusing)."""

    level: str
    what: str
    remedy: str


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
    findings += _check_placement(reports)
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
    # The slowest rank determines the speed of a training.
    if not speeds or requested.nodes == 1 or min(speeds) >= limit:
        return []
    what = f"all-reduce moves {min(speeds):.2f} GiB/s between nodes, less than {limit}"
    remedy = (
        "NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME may name the wrong network; "
        "NCCL_DEBUG=INFO shows which is used"
    )
    return [Finding("warning", what, remedy)]


def describe_expected_exchange(reports: Sequence[Report], requested: Resources) -> str:
    """What the measured all-reduce means for a training; empty if it was not measured.

    Args:
        reports: The reports of the ranks.
        requested: The resources of the job.
    """
    speeds = [report["all_reduce_gib_s"] for report in reports if report.get("all_reduce_gib_s")]
    if not speeds:
        return ""
    ranks = len(reports)
    # All-reduce sends 2 (n - 1) / n of the data over the slowest connection.
    gib = 2 * (ranks - 1) / ranks * EXAMPLE_PARAMETERS * BYTES_PER_GRADIENT / 2**30
    between = "between nodes" if requested.nodes > 1 else "within the node"
    limit = SLOW_NETWORK_GIB_S["gpu" if requested.gpus_per_node else "cpu"]
    return (
        f"all-reduce {between}: {min(speeds):.2f} GiB/s; the gradients of 10 million parameters "
        f"(float32) take {gib / min(speeds) * 1000:.0f} ms a step, at least partly hidden behind "
        f"backward. Usual: {TYPICAL_NETWORKS}; a warning appears below {limit} GiB/s"
    )


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


def _check_placement(reports: Sequence[Report]) -> list[Finding]:
    """Ranks whose CPUs are far from their GPU, and ranks of a node that share their CPUs."""
    findings = []
    for report in reports:
        gpu_node, cpu_nodes = report.get("gpu_node"), report.get("cpu_nodes", [])
        if gpu_node is not None and cpu_nodes and gpu_node not in cpu_nodes:
            what = (
                f"{describe_place(report)} has its GPU on NUMA node {gpu_node}, but CPUs of node "
                f"{', '.join(map(str, cpu_nodes))} only"
            )
            remedy = (
                "give the ranks all cores of the node (--cpu-bind none, more --cpus-per-task): "
                "each then takes those near its GPU"
            )
            findings.append(Finding("warning", what, remedy))
    return findings


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
