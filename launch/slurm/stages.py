"""What each job of a plan asks SLURM for: the stages that need no GPU get neither GPUs nor the GPU partition.

The command's own options describe the job that trains. Its evaluation gets the same nodes for a shorter time.
Conversion and aggregate run in one process on a CPU node. `--stage-option STAGE:KEY=VALUE` changes any of them.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from liverseg_dist.errors import UserError

from .launch_options import DEFAULT_TIME, OTHER_TIME, positive, read_resource
from .sbatch import Resources
from .sbatch_options import EVERY_STAGE, FIRST_JOB, RESOURCES, format_option, parse_sbatch_option
from .units import parse_gpus, shorter_time, time_seconds

OWN_KEYS = ("nodes", "tasks-per-node", "gpus-per-node")
"""Keys of `--stage-option` that are launch options, not sbatch's."""
GPU_STAGES = ("train", "evaluate")

StageOption = tuple[str, str]
"""Stage, and what follows its colon."""


def parse_stage_options(
    texts: Sequence[str], of_convert: Sequence[str] = ()
) -> tuple[StageOption, ...]:
    """`STAGE:KEY=VALUE` as (STAGE, KEY=VALUE); `of_convert` are those of `--convert-sbatch`. Raises `UserError`."""
    found = []
    for text in texts:
        stage, colon, option = text.partition(":")
        if not colon or not option or not stage.isalpha():
            raise UserError(
                f"--stage-option {text}: is written STAGE:KEY=VALUE, e.g. aggregate:time=1h"
            )
        found.append((stage, option))
    return (*found, *(("convert", text) for text in of_convert))


def check_stages(options: Sequence[StageOption], stages: Sequence[str]) -> None:
    """Refuse options of a stage that the plan does not have. Raises `UserError`."""
    for stage, option in options:
        if stage not in stages:
            raise UserError(
                f"--stage-option {stage}:{option}: the plan's stages are {', '.join(stages)}"
            )


def stage_resources(
    main: Resources,
    stage: str,
    options: Sequence[StageOption] = (),
    *,
    cpu_partition: str = "",
    is_first: bool = False,
) -> Resources:
    """The resources of one stage of a plan.

    Args:
        main: what the command line asks for, which is what training gets.
        stage: convert, train, evaluate or aggregate.
        options: all of `--stage-option`; those of other stages are skipped.
        cpu_partition: partition of stages that need no GPU.
        is_first: whether the plan begins with this stage, so that `--sbatch hold` holds it.

    Raises:
        UserError: an option that the stage cannot have.
    """
    resources = main
    if stage != "train":
        time = shorter_time(DEFAULT_TIME.get(stage, OTHER_TIME), main.time)
        resources = dataclasses.replace(resources, time=time, signal_s=_signal(main, time))
    if stage not in GPU_STAGES:
        resources = _without_gpus(resources, cpu_partition)
    resources = dataclasses.replace(
        resources, extra=_shared_options(main.extra, stage, is_first=is_first)
    )
    for of_stage, text in options:
        if of_stage == stage:
            resources = _apply(resources, stage, text)
    if main.gpus_per_node and not resources.gpus_per_node and stage in GPU_STAGES:
        resources = _leave_gpu_nodes(resources, main, cpu_partition)
    if resources.signal_s >= time_seconds(resources.time):
        resources = dataclasses.replace(resources, signal_s=_signal(main, resources.time))
    return resources


def one_process(resources: Resources) -> Resources:
    """For a command that does not divide its work among ranks."""
    return dataclasses.replace(resources, nodes=1, tasks_per_node=1)


def _without_gpus(resources: Resources, cpu_partition: str) -> Resources:
    """One process on a CPU node.

    Partition, QoS, constraint and memory that were chosen for GPU nodes do not fit there.
    """
    kept = dataclasses.replace(
        one_process(resources),
        gpus_per_node=0,
        gpu_type="",
        gpu_bind="",
        cpu_bind="",
        distribution="",
    )
    if not resources.gpus_per_node:
        return dataclasses.replace(kept, partition=cpu_partition or kept.partition)
    return dataclasses.replace(
        kept, partition=cpu_partition, qos="", constraint="", mem="", mem_gib=0
    )


def _leave_gpu_nodes(resources: Resources, main: Resources, cpu_partition: str) -> Resources:
    """For an evaluation that was moved to the CPU: what still is as for training was meant for GPU nodes."""
    return dataclasses.replace(
        resources,
        partition=cpu_partition if resources.partition == main.partition else resources.partition,
        qos="" if resources.qos == main.qos else resources.qos,
        constraint="" if resources.constraint == main.constraint else resources.constraint,
    )


def _shared_options(extra: Sequence[str], stage: str, *, is_first: bool) -> tuple[str, ...]:
    """Of `--sbatch`: what this stage gets."""
    found = []
    for text in extra:
        name = text.partition("=")[0]
        of_first = name in FIRST_JOB and is_first
        of_nodes = name not in FIRST_JOB and stage in GPU_STAGES
        # Where one job runs in a container, all do: the program is in it.
        in_container = name.startswith(("container", "no-container"))
        if name in EVERY_STAGE or in_container or of_first or of_nodes:
            found.append(text)
    return tuple(found)


def _apply(resources: Resources, stage: str, text: str) -> Resources:
    source = f"--stage-option {stage}:{text}"
    name, _, value = text.partition("=")
    name = name.strip().removeprefix("--")
    if name in OWN_KEYS:
        return _apply_own(resources, stage, name, value, source)
    name, given = parse_sbatch_option(text, f"--stage-option {stage}:")
    if name in RESOURCES:
        changes: dict[str, str | int] = {
            name.replace("-", "_"): read_resource(name, given or "", source)
        }
        if name == "mem":
            changes["mem_gib"] = 0
        return dataclasses.replace(resources, **changes)  # type: ignore[arg-type]
    kept = [other for other in resources.extra if other.partition("=")[0] != name]
    return dataclasses.replace(resources, extra=(*kept, format_option((name, given))))


def _apply_own(resources: Resources, stage: str, name: str, value: str, source: str) -> Resources:
    if stage == "train":
        raise UserError(f"{source}: for training use --{name}")
    if stage == "aggregate" or (stage == "convert" and name != "gpus-per-node"):
        raise UserError(f"{source}: {stage} runs in one process, and aggregate on no GPU")
    if name == "gpus-per-node":
        request = parse_gpus(value, source)
        if stage == "convert" and request.count > 1:
            raise UserError(f"{source}: convert runs in one process, which uses one GPU")
        bind = resources.gpu_bind if request.count else ""
        return dataclasses.replace(
            resources, gpus_per_node=request.count, gpu_type=request.kind, gpu_bind=bind
        )
    try:
        return dataclasses.replace(resources, **{name.replace("-", "_"): positive(value)})  # type: ignore[arg-type]
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{source}: {error}") from None


def _signal(main: Resources, time: str) -> int:
    """Seconds before the limit: as for training, but at most half of a short limit."""
    return min(main.signal_s, time_seconds(time) // 2)
