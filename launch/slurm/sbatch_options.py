"""The options of sbatch that `--sbatch` and `--stage-option` accept, in every spelling of sbatch.

An option that launch sets itself is refused, and the message names the launch option to use. If it
were set twice, the batch file would start another job than the one that was checked. An unknown
name is refused too, because sbatch reports it only at submission and accepts abbreviations. Options
of the SPANK plugins of a site are passed on by `--sbatch-plugin`.
"""

import re

from liverseg_dist.errors import UserError
from liverseg_dist.texts.suggestions import suggest_name

SHORT_OPTIONS = {
    "A": "account", "a": "array", "b": "begin", "B": "extra-node-info", "c": "cpus-per-task",
    "C": "constraint", "d": "dependency", "D": "chdir", "e": "error", "F": "nodefile",
    "G": "gpus", "H": "hold", "h": "help", "i": "input", "J": "job-name", "k": "no-kill",
    "L": "licenses", "M": "clusters", "m": "distribution", "n": "ntasks", "N": "nodes",
    "O": "overcommit", "o": "output", "p": "partition", "q": "qos", "Q": "quiet",
    "s": "oversubscribe", "S": "core-spec", "t": "time", "v": "verbose", "V": "version",
    "w": "nodelist", "W": "wait", "x": "exclude",
}  # fmt: skip
"""The one-letter options of sbatch."""

RESOURCES = {"partition", "account", "qos", "constraint", "time", "mem", "cpus-per-task"}
"""Have the effect of the launch option of the same name, for the stage in question."""

REPLACED = {
    "array": "use --array",
    "dependency": "use --after JOBID",
    "job-name": "use --name",
    "output": "logs are in JOB_DIR/jobs; use --job-dir",
    "error": "logs are in JOB_DIR/jobs; use --job-dir",
    "input": "ranks do not read standard input",
    "nodes": "use --nodes",
    "ntasks": "use --tasks-per-node",
    "ntasks-per-node": "use --tasks-per-node",
    "ntasks-per-gpu": "use --tasks-per-node",
    "ntasks-per-core": "use --tasks-per-node",
    "ntasks-per-socket": "use --tasks-per-node",
    "gpus-per-node": "use --gpus-per-node",
    "gpus": "use --gpus-per-node",
    "gpus-per-task": "use --gpus-per-node",
    "gpus-per-socket": "use --gpus-per-node",
    "cpus-per-gpu": "use --cpus-per-task",
    "mem-per-cpu": "use --mem (per node)",
    "mem-per-gpu": "use --mem (per node)",
    "signal": "use --signal SECONDS",
    "requeue": "launch sets it; --restarts limits it",
    "no-requeue": "use --restarts 0",
    "open-mode": "launch sets append, for requeued jobs",
    "kill-on-invalid-dep": "launch sets it for jobs that wait for others",
    "chdir": "jobs run in the current folder",
    "distribution": "use --distribution",
    "cpu-bind": "use --cpu-bind",
    "gpu-bind": "use --gpu-bind",
    "wrap": "launch writes the script",
    "test-only": "use --dry-run",
    "parsable": "use --parsable",
    "wait": "use --follow",
    "clusters": "submit from a login node of that cluster",
    "help": "see `sbatch --help`",
    "usage": "see `sbatch --help`",
    "version": "see `sbatch --version`",
    "ignore-pbs": "a job file has no #PBS lines",
    "quiet": "it has no effect in a job file",
    "verbose": "it has no effect in a job file",
}
"""Options that launch sets -> what to use instead."""

FLAGS = {
    "contiguous", "get-user-env", "hold", "no-bell", "overcommit", "reboot", "spread-job",
    "use-min-nodes", "stepmgr", "consolidate-segments",
}  # fmt: skip
OPTIONALLY_VALUED = {
    "exclusive", "nice", "no-kill", "oversubscribe", "propagate", "get-user-env", "resv-ports",
}  # fmt: skip
"""With or without a value."""
VALUED = {
    "acctg-freq", "batch", "bb", "bbf", "begin", "bcast", "cluster-constraint", "comment",
    "container", "container-id", "core-spec", "cores-per-socket", "cpu-freq", "deadline",
    "delay-boot", "exclude", "export", "export-file", "extra", "extra-node-info", "gid",
    "gpu-freq", "gres", "gres-flags", "hint", "licenses", "mail-type", "mail-user", "mcs-label",
    "mem-bind", "mincpus", "network", "nodefile", "nodelist", "power", "prefer", "priority",
    "profile", "reservation", "segment", "sockets-per-node", "switches", "thread-spec",
    "threads-per-core", "time-min", "tmp", "tres-bind", "tres-per-task", "uid", "wckey",
    # pyxis, NVIDIA's container plugin, which most GPU clusters have
    "container-image", "container-mounts", "container-workdir", "container-name",
    "container-save", "container-env", "container-mount-home", "no-container-mount-home",
    "container-remap-root", "no-container-remap-root", "container-entrypoint",
    "no-container-entrypoint", "container-writable", "container-readonly",
}  # fmt: skip
_PYXIS_FLAG = re.compile(r"(no-)?container-(mount-home|remap-root|entrypoint|writ|readonly)")
PYXIS_FLAGS = {name for name in VALUED if _PYXIS_FLAG.match(name)}
KNOWN = FLAGS | OPTIONALLY_VALUED | VALUED | RESOURCES

OPTIONS_OF_ALL_STAGES = {
    "comment", "export", "export-file", "get-user-env", "exclude", "mail-type", "mail-user",
    "nice", "priority", "reservation", "wckey", "mcs-label", "delay-boot", "profile",
    "acctg-freq", "account",
}  # fmt: skip
"""Options of `--sbatch` that apply to all jobs of a submission. The others describe the nodes of
the jobs that train and evaluate; `--stage-option` sets those of conversion and aggregate."""
OPTIONS_OF_FIRST_STAGE = {"begin", "hold", "deadline"}
"""Options of `--sbatch` that only the first job needs, because the others wait for it."""

Option = tuple[str, str | None]
"""Name and value; None for a flag."""


def parse_sbatch_option(text: str, source: str = "--sbatch") -> Option:
    """Parse an option of sbatch.

    Args:
        text: `KEY=VALUE`, `--KEY=VALUE`, `--KEY VALUE`, `-K VALUE`, `-KVALUE` or `KEY`.
        source: The launch option to name in the error message.

    Raises:
        UserError: The name is unknown or set by launch, or a value is missing or not accepted.
    """
    name, value = _split_option(text, source)
    if name in REPLACED:
        raise UserError(f"{source} {text}: {REPLACED[name]}")
    # GPUs as gres would contradict --gpus-per-node.
    if name == "gres" and re.search(r"(^|[,/])gpu\b", value or ""):
        raise UserError(f"{source} {text}: use --gpus-per-node")
    if name not in KNOWN:
        close = suggest_name(name.lower().replace("_", "-"), sorted(KNOWN | set(REPLACED)))
        hint = "for an option of the plugins of your site use --sbatch-plugin"
        if close is not None:
            hint = f"did you mean {close}?"
        raise UserError(f"{source} {text}: sbatch has no option {name or text}; {hint}")
    is_flag = name in FLAGS | PYXIS_FLAGS
    if value is None and not is_flag and name not in OPTIONALLY_VALUED:
        raise UserError(f"{source} {text}: {name} needs a value, {name}=VALUE")
    if value is not None and is_flag and name not in OPTIONALLY_VALUED:
        raise UserError(f"{source} {text}: {name} takes no value")
    return name, value


def parse_plugin_option(text: str) -> Option:
    """Parse an option of a plugin of the site, whose name cannot be checked.

    Raises:
        UserError: sbatch itself has an option of this name.
    """
    name, value = _split_option(text, "--sbatch-plugin")
    if name in KNOWN | set(REPLACED):
        raise UserError(
            f"--sbatch-plugin {text}: {name} is an option of sbatch itself; use --sbatch"
        )
    return name, value


def format_option(option: Option) -> str:
    """KEY=VALUE or KEY, as in `Resources.extra`."""
    name, value = option
    return name if value is None else f"{name}={value}"


def _split_option(text: str, source: str) -> Option:
    """Name and value of an option in any spelling. Raises `UserError`."""
    if not text.isprintable():
        raise UserError(
            f"{source} {text!r}: an option of a batch file cannot have control characters"
        )
    stripped = text.strip()
    if match := re.fullmatch(r"-([A-Za-z])(?:\s*=?\s*(\S.*))?", stripped):
        if match[1] not in SHORT_OPTIONS:
            raise UserError(f"{source} {text}: sbatch has no option -{match[1]}")
        return SHORT_OPTIONS[match[1]], match[2]
    match = re.fullmatch(r"(?:--)?([A-Za-z][A-Za-z0-9_-]*)(?:(?:\s*=\s*|\s+)(.*))?", stripped)
    if match is None:
        raise UserError(f"{source} {text}: write an option as KEY=VALUE, e.g. reservation=NAME")
    name = match[1]
    # `--sbatch a=0-4`, without the dash of the short form
    if len(name) == 1 and name in SHORT_OPTIONS:
        name = SHORT_OPTIONS[name]
    value = match[2]
    if value == "":
        raise UserError(f"{source} {text}: {name} has an empty value")
    return name, value
