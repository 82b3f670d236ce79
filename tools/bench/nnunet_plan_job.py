"""nnU-Net v2's fingerprint and plan of one data set as a process, for `plan.py`.

  python tools/bench/nnunet_plan_job.py DATASET_ID GPU_MEMORY_GB

It needs nnunetv2 only, so that an environment of its own can run it. The folders are set by
nnU-Net's three environment variables. The last line of stdout is the plan as JSON.
"""

import json
import sys
import time

from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
    DatasetFingerprintExtractor,
)
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)


def main() -> None:
    dataset_id, memory_gb = int(sys.argv[1]), float(sys.argv[2])
    started = time.perf_counter()
    fingerprint = DatasetFingerprintExtractor(dataset_id, 2, verbose=False).run()
    fingerprint_s = time.perf_counter() - started
    planner = ExperimentPlanner(dataset_id, gpu_memory_target_in_gb=memory_gb)
    plans = planner.plan_experiment()
    plan_s = time.perf_counter() - started - fingerprint_s
    chosen = plans["configurations"]["3d_fullres"]
    network = chosen["architecture"]["arch_kwargs"]
    lowres = plans["configurations"].get("3d_lowres")
    # nnU-Net moves its coarsest axis to the front; the plans are compared in z, y, x.
    back = [int(axis) for axis in plans["transpose_backward"]]
    spacing, patch = chosen["spacing"], chosen["patch_size"]
    result = {
        "spacing_mm": [float(spacing[axis]) for axis in back],
        "patch": [int(patch[axis]) for axis in back],
        "batch": int(chosen["batch_size"]),
        "normalisation": list(chosen["normalization_schemes"]),
        "features": list(network["features_per_stage"]),
        "strides": [[stride[axis] for axis in back] for stride in network["strides"]],
        "kernels": [[kernel[axis] for axis in back] for kernel in network["kernel_sizes"]],
        "lowres_spacing_mm": [float(lowres["spacing"][n]) for n in back] if lowres else None,
        "cases": len(fingerprint["spacings"]),
        "fingerprint_s": round(fingerprint_s, 2),
        "plan_s": round(plan_s, 2),
    }
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
