"""The options of sbatch that `--sbatch` and `--stage-option` take, in every spelling sbatch itself accepts.

An option that launch sets is refused with the launch option to use instead: set twice, the job file would run another
job than the one that was planned. An unknown name is refused too, because sbatch reports it only at submission and
accepts abbreviations. Options of a site's SPANK plugins are passed on by `--sbatch-plugin`.
"""

import difflib
import re

from liverseg_dist.errors import UserError

SHORT = {
    "A": "account", "a": "array", "b": "begin", "B": "extra-node-info", "c": "cpus-per-task", "C": "constraint",
    "d": "dependency", "D": "chdir", "e": "error", "F": "nodefile", "G": "gpus", "H": "hold", "h": "help",
    "i": "input", "J": "job-name", "k": "no-kill", "L": "licenses", "M": "clusters", "m": "distribution",
    "n": "ntasks", "N": "nodes", "O": "overcommit", "o": "output", "p": "partition", "q": "qos", "Q": "quiet",
    "s": "oversubscribe", "S": "core-spec", "t": "time", "v": "verbose", "V": "version", "w": "nodelist",
    "W": "wait", "x": "exclude",
}  # fmt: skip
"""sbatch's one-letter options."""

RESOURCES = {"partition", "account", "qos", "constraint", "time", "mem", "cpus-per-task"}
"""Understood as the launch option of the same name, for the stage in question."""

REPLACED = {
    "array": "use --array", "dependency": "use --after JOBID", "job-name": "use --name",
    "output": "logs are in FOLDER/jobs; use --folder", "error": "logs are in FOLDER/jobs; use --folder",
    "input": "ranks read no standard input", "nodes": "use --nodes", "ntasks": "use --tasks-per-node",
    "ntasks-per-node": "use --tasks-per-node", "ntasks-per-gpu": "use --tasks-per-node",
    "ntasks-per-core": "use --tasks-per-node", "ntasks-per-socket": "use --tasks-per-node",
    "gpus-per-node": "use --gpus-per-node", "gpus": "use --gpus-per-node", "gpus-per-task": "use --gpus-per-node",
    "gpus-per-socket": "use --gpus-per-node", "cpus-per-gpu": "use --cpus-per-task",
    "mem-per-cpu": "use --mem (per node)", "mem-per-gpu": "use --mem (per node)",
    "signal": "use --signal SECONDS", "requeue": "launch sets it; --restarts limits it",
    "no-requeue": "use --restarts 0", "open-mode": "launch sets append, for requeued jobs",
    "kill-on-invalid-dep": "launch sets it for jobs that wait", "chdir": "jobs run in the folder of the call",
    "distribution": "use --distribution", "cpu-bind": "use --cpu-bind", "gpu-bind": "use --gpu-bind",
    "wrap": "launch writes the script", "test-only": "use --dry-run", "parsable": "use --parsable",
    "wait": "use --follow", "clusters": "submit from a login node of that cluster",
    "help": "see `sbatch --help`", "usage": "see `sbatch --help`", "version": "see `sbatch --version`",
    "ignore-pbs": "a job file has no #PBS lines",
    "quiet": "it has no effect in a job file", "verbose": "it has no effect in a job file",
}  # fmt: skip
"""What launch decides, and what to use instead."""

FLAGS = {
    "contiguous", "get-user-env", "hold", "no-bell", "overcommit", "reboot", "spread-job", "use-min-nodes",
    "stepmgr", "consolidate-segments",
}  # fmt: skip
OPTIONAL = {
    "exclusive",
    "nice",
    "no-kill",
    "oversubscribe",
    "propagate",
    "get-user-env",
    "resv-ports",
}
"""With or without a value."""
VALUED = {
    "acctg-freq", "batch", "bb", "bbf", "begin", "bcast", "cluster-constraint", "comment", "container", "container-id",
    "core-spec", "cores-per-socket", "cpu-freq", "deadline", "delay-boot", "exclude", "export", "export-file",
    "extra", "extra-node-info", "gid", "gpu-freq", "gres", "gres-flags", "hint", "licenses", "mail-type", "mail-user",
    "mcs-label", "mem-bind", "mincpus", "network", "nodefile", "nodelist", "power", "prefer", "priority", "profile",
    "reservation", "segment", "sockets-per-node", "switches", "thread-spec", "threads-per-core", "time-min", "tmp",
    "tres-bind", "tres-per-task", "uid", "wckey",
    # NVIDIA's container plugin (pyxis), which most GPU clusters have
    "container-image", "container-mounts", "container-workdir", "container-name", "container-save", "container-env",
    "container-mount-home", "no-container-mount-home", "container-remap-root", "no-container-remap-root",
    "container-entrypoint", "no-container-entrypoint", "container-writable", "container-readonly",
}  # fmt: skip
PYXIS_FLAGS = {
    name
    for name in VALUED
    if re.match(r"(no-)?container-(mount-home|remap-root|entrypoint|writ|readonly)", name)
}
KNOWN = FLAGS | OPTIONAL | VALUED | RESOURCES

EVERY_STAGE = {
    "comment", "export", "export-file", "get-user-env", "exclude", "mail-type", "mail-user", "nice", "priority",
    "reservation", "wckey", "mcs-label", "delay-boot", "profile", "acctg-freq", "account",
}  # fmt: skip
"""Of `--sbatch`: what is passed to all jobs of a plan. The others describe the nodes of the job that trains and its
evaluation; the conversion of a chain and the aggregate job get theirs by `--stage-option`."""
FIRST_JOB = {"begin", "hold", "deadline"}
"""Of `--sbatch`: what only the first job of a plan needs, as the others wait for it."""

Option = tuple[str, str | None]
"""Name and value; None for a flag."""


def parse_sbatch_option(text: str, source: str = "--sbatch") -> Option:
    """`KEY=VALUE`, `--KEY=VALUE`, `--KEY VALUE`, `-K VALUE`, `-KVALUE` or `KEY`, as a name and a value.

    Raises:
        UserError: an unknown name, one that launch sets, or a value that is missing or not wanted.
    """
    name, value = _split_option(text, source)
    if name in REPLACED:
        raise UserError(f"{source} {text}: {REPLACED[name]}")
    if name == "gres" and re.search(r"(^|[,/])gpu\b", value or ""):
        raise UserError(f"{source} {text}: use --gpus-per-node")
    if name not in KNOWN:
        close = difflib.get_close_matches(
            name.lower().replace("_", "-"), sorted(KNOWN | set(REPLACED)), 1
        )
        guess = f"; did you mean {close[0]}?" if close else ""
        raise UserError(
            f"{source} {text}: sbatch has no option {name or text}{guess}"
            + ("" if close else "; for an option of your site's plugins use --sbatch-plugin")
        )
    takes_none = name in FLAGS | PYXIS_FLAGS
    if value is None and not takes_none and name not in OPTIONAL:
        raise UserError(f"{source} {text}: {name} needs a value, {name}=VALUE")
    if value is not None and takes_none and name not in OPTIONAL:
        raise UserError(f"{source} {text}: {name} takes no value")
    return name, value


def parse_plugin_option(text: str) -> Option:
    """An option that only the site knows, passed on unchecked. Raises `UserError` for one that sbatch itself has."""
    name, value = _split_option(text, "--sbatch-plugin")
    if name in KNOWN | set(REPLACED):
        raise UserError(
            f"--sbatch-plugin {text}: {name} is an option of sbatch itself; use --sbatch"
        )
    return name, value


def format_option(option: Option) -> str:
    """As `Resources.extra` keeps it: KEY=VALUE or KEY."""
    name, value = option
    return name if value is None else f"{name}={value}"


def _split_option(text: str, source: str) -> Option:
    if not text.isprintable():
        raise UserError(
            f"{source} {text!r}: control characters cannot be part of a job file's option"
        )
    words = text.strip()
    if match := re.fullmatch(r"-([A-Za-z])(?:\s*=?\s*(\S.*))?", words):
        if match[1] not in SHORT:
            raise UserError(f"{source} {text}: sbatch has no option -{match[1]}")
        return SHORT[match[1]], match[2]
    match = re.fullmatch(r"(?:--)?([A-Za-z][A-Za-z0-9_-]*)(?:(?:\s*=\s*|\s+)(.*))?", words)
    if match is None:
        raise UserError(f"{source} {text}: an option is written KEY=VALUE, e.g. reservation=NAME")
    name = match[1]
    # `--sbatch a=0-4` without the dash of the short form
    if len(name) == 1 and name in SHORT:
        name = SHORT[name]
    value = match[2]
    if value == "":
        raise UserError(f"{source} {text}: {name} has an empty value")
    return name, value
