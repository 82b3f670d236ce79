"""The resources of each stage: convert, train, evaluate, aggregate.

The options of the command line describe the job that trains. Its evaluation gets the same nodes
for a shorter time. Conversion and aggregate run in one process on a CPU node: they get neither GPUs
nor the GPU partition. `--stage-option STAGE:KEY=VALUE` changes any of them.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from liverseg_dist.errors import UserError

from .launch_options import DEFAULT_TIME, DEFAULT_TIME_OTHERS
from .option_values import parse_resource, positive_int
from .sbatch import Resources
from .sbatch_options import (
    OPTIONS_OF_ALL_STAGES,
    OPTIONS_OF_FIRST_STAGE,
    RESOURCES,
    format_option,
    parse_sbatch_option,
)
from .units import parse_gpus, shorter_time, time_to_seconds

LAUNCH_KEYS = ("nodes", "tasks-per-node", "gpus-per-node")
"""Keys of `--stage-option` that are options of launch, not of sbatch."""
GPU_STAGES = ("train", "evaluate")

StageOption = tuple[str, str]
"""The stage, and the text after its colon."""


def parse_stage_options(
    texts: Sequence[str], convert_options: Sequence[str] = ()
) -> tuple[StageOption, ...]:
    """Split `STAGE:KEY=VALUE` into (STAGE, KEY=VALUE).

    Args:
        texts: The values of `--stage-option`.
        convert_options: The values of `--convert-sbatch`, which belong to the stage convert.

    Raises:
        UserError: A text has another form.
    """
    found = []
    for text in texts:
        stage, colon, option = text.partition(":")
        if not colon or not option or not stage.isalpha():
            raise UserError(
                f"--stage-option {text}: write it as STAGE:KEY=VALUE, e.g. aggregate:time=1h"
            )
        found.append((stage, option))
    found += [("convert", text) for text in convert_options]
    return tuple(found)


def check_stages(options: Sequence[StageOption], stages: Sequence[str]) -> None:
    """Raise `UserError` for options of a stage that the command does not have."""
    for stage, option in options:
        if stage not in stages:
            raise UserError(f"--stage-option {stage}:{option}: the stages are {', '.join(stages)}")


def compute_stage_resources(
    main: Resources,
    stage: str,
    options: Sequence[StageOption] = (),
    *,
    cpu_partition: str = "",
    is_first: bool = False,
) -> Resources:
    """The resources of one stage.

    Args:
        main: The resources of the command line, which the training gets.
        stage: convert, train, evaluate or aggregate.
        options: All of `--stage-option`; those of other stages are skipped.
        cpu_partition: Partition of the stages that need no GPU.
        is_first: Whether this stage starts first, so that `--sbatch hold` applies to it.

    Raises:
        UserError: The stage cannot have one of the options.
    """
    resources = main
    if stage != "train":
        time = shorter_time(DEFAULT_TIME.get(stage, DEFAULT_TIME_OTHERS), main.time)
        resources = dataclasses.replace(
            resources, time=time, signal_s=_limit_signal_time(main, time)
        )
    if stage not in GPU_STAGES:
        resources = _move_to_cpu_node(resources, cpu_partition)
    extra = _select_sbatch_options(main.extra, stage, is_first=is_first)
    resources = dataclasses.replace(resources, extra=extra)
    for stage_of_option, text in options:
        if stage_of_option == stage:
            resources = _apply_option(resources, stage, text)
    if main.gpus_per_node and not resources.gpus_per_node and stage in GPU_STAGES:
        resources = _leave_gpu_nodes(resources, main, cpu_partition)
    if resources.signal_s >= time_to_seconds(resources.time):
        signal_s = _limit_signal_time(main, resources.time)
        resources = dataclasses.replace(resources, signal_s=signal_s)
    return resources


def limit_to_one_process(resources: Resources) -> Resources:
    """The resources of a command that does not divide its work among ranks."""
    return dataclasses.replace(resources, nodes=1, tasks_per_node=1)


def _move_to_cpu_node(resources: Resources, cpu_partition: str) -> Resources:
    """One process on a CPU node."""
    kept = dataclasses.replace(
        limit_to_one_process(resources),
        gpus_per_node=0,
        gpu_type="",
        gpu_bind="",
        cpu_bind="",
        distribution="",
    )
    if not resources.gpus_per_node:
        return dataclasses.replace(kept, partition=cpu_partition or kept.partition)
    # Partition, QoS, constraint and memory were chosen for GPU nodes: CPU nodes do not fit them.
    return dataclasses.replace(
        kept, partition=cpu_partition, qos="", constraint="", mem="", mem_gib=0
    )


def _leave_gpu_nodes(resources: Resources, main: Resources, cpu_partition: str) -> Resources:
    """Drop the choice of GPU nodes from an evaluation that was moved to the CPU.

    A value that equals that of the training was meant for GPU nodes.
    """
    return dataclasses.replace(
        resources,
        partition=cpu_partition if resources.partition == main.partition else resources.partition,
        qos="" if resources.qos == main.qos else resources.qos,
        constraint="" if resources.constraint == main.constraint else resources.constraint,
    )


def _select_sbatch_options(extra: Sequence[str], stage: str, *, is_first: bool) -> tuple[str, ...]:
    """The options of `--sbatch` that apply to this stage."""
    selected = []
    for text in extra:
        name = text.partition("=")[0]
        for_first = name in OPTIONS_OF_FIRST_STAGE and is_first
        for_gpu_nodes = name not in OPTIONS_OF_FIRST_STAGE and stage in GPU_STAGES
        # If one job runs in a container, all do: the container has the program.
        for_container = name.startswith(("container", "no-container"))
        if name in OPTIONS_OF_ALL_STAGES or for_container or for_first or for_gpu_nodes:
            selected.append(text)
    return tuple(selected)


def _apply_option(resources: Resources, stage: str, text: str) -> Resources:
    """Change the resources by one `--stage-option`. Raises `UserError`."""
    source = f"--stage-option {stage}:{text}"
    name, _, value = text.partition("=")
    name = name.strip().removeprefix("--")
    if name in LAUNCH_KEYS:
        return _apply_launch_option(resources, stage, name, value, source)
    name, given = parse_sbatch_option(text, f"--stage-option {stage}:")
    if name in RESOURCES:
        field = name.replace("-", "_")
        changes: dict[str, str | int] = {field: parse_resource(name, given or "", source)}
        if name == "mem":
            changes["mem_gib"] = 0
        return dataclasses.replace(resources, **changes)  # type: ignore[arg-type]
    others = [option for option in resources.extra if option.partition("=")[0] != name]
    return dataclasses.replace(resources, extra=(*others, format_option((name, given))))


def _apply_launch_option(
    resources: Resources, stage: str, name: str, value: str, source: str
) -> Resources:
    """Change nodes, tasks per node or GPUs per node of a stage. Raises `UserError`."""
    if stage == "train":
        raise UserError(f"{source}: for training use --{name}")
    if stage == "aggregate" or (stage == "convert" and name != "gpus-per-node"):
        raise UserError(f"{source}: {stage} runs in one process, and aggregate uses no GPU")
    if name == "gpus-per-node":
        request = parse_gpus(value, source)
        if stage == "convert" and request.count > 1:
            raise UserError(f"{source}: convert runs in one process, which uses one GPU")
        bind = resources.gpu_bind if request.count else ""
        return dataclasses.replace(
            resources, gpus_per_node=request.count, gpu_type=request.model, gpu_bind=bind
        )
    field = name.replace("-", "_")
    try:
        return dataclasses.replace(resources, **{field: positive_int(value)})  # type: ignore[arg-type]
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{source}: {error}") from None


def _limit_signal_time(main: Resources, time: str) -> int:
    """Seconds before the time limit: as for training, but at most half of a short limit."""
    return min(main.signal_s, time_to_seconds(time) // 2)
