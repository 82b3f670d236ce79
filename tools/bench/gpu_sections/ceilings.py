"""What the hardware reaches: copies, matrix products, and the convolution that dominates the networks.

The inputs are random: a GPU computes zeros faster than data.
"""

import torch
from step_timing import time_calls
from torch import nn

from .context import Context, Figures

REPEATS = 20
COPY_GIB = 4
GEMM_EDGE = 8192
PRECISIONS = {
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bf16": (torch.bfloat16, True),
    "fp16": (torch.float16, True),
}
"""Type of the tensors, and whether float32 products may round their inputs to TF32."""


def run(context: Context) -> None:
    context.measure("copy on the device", "", lambda: measure_copy(context))
    for direction in ("to the device", "from the device"):
        for memory in ("pinned", "pageable"):
            context.measure(
                f"copy {direction}, {memory}",
                "",
                lambda d=direction, m=memory: measure_host_copy(context, d, m),
                needs_cuda=True,
            )
    for precision in PRECISIONS:
        context.measure("matrix product", precision, lambda p=precision: measure_gemm(context, p))
    for layout in ("NCDHW", "NDHWC"):
        for precision in PRECISIONS:
            context.measure(
                f"conv3d 32 to 32 channels, {layout}",
                precision,
                lambda p=precision, form=layout: measure_convolution(context, p, form),
            )


def measure_copy(context: Context) -> Figures:
    count = context.choose(COPY_GIB << 28, 1 << 20)
    source = torch.randn(count, device=context.device)
    target = torch.empty_like(source)
    seconds = repeat(context, lambda: target.copy_(source))
    # Read and written.
    return {"ms": seconds * 1e3, "gb_per_s": 2 * source.nbytes / seconds / 1e9}


def measure_host_copy(context: Context, direction: str, memory: str) -> Figures:
    count = 1 << 26
    on_host = torch.randn(count)
    if memory == "pinned":
        on_host = on_host.pin_memory()
    on_device = torch.empty(count, device=context.device)
    source, target = (on_host, on_device) if direction == "to the device" else (on_device, on_host)
    seconds = repeat(context, lambda: target.copy_(source, non_blocking=memory == "pinned"))
    return {"ms": seconds * 1e3, "gb_per_s": source.nbytes / seconds / 1e9}


def measure_gemm(context: Context, precision: str) -> Figures:
    edge = context.choose(GEMM_EDGE, 64)
    dtype, allows_tf32 = PRECISIONS[precision]
    torch.backends.cuda.matmul.allow_tf32 = allows_tf32
    first, second = (torch.randn(edge, edge, device=context.device).to(dtype) for _ in range(2))
    seconds = repeat(context, lambda: first @ second)
    return {"ms": seconds * 1e3, "tflop_per_s": 2 * edge**3 / seconds / 1e12}


def measure_convolution(context: Context, precision: str, layout: str) -> Figures:
    """Forward and backward of the convolution at full resolution of the M preset."""
    batch, shape = context.choose((2, (64, 160, 160)), (1, (8, 8, 8)))
    dtype, allows_tf32 = PRECISIONS[precision]
    torch.backends.cudnn.allow_tf32 = allows_tf32
    torch.backends.cudnn.benchmark = True
    form = torch.channels_last_3d if layout == "NDHWC" else torch.contiguous_format
    layer = nn.Conv3d(32, 32, 3, padding=1, bias=False).to(context.device, dtype)
    layer = layer.to(memory_format=form)
    image = torch.randn(batch, 32, *shape, device=context.device).to(dtype)
    image = image.contiguous(memory_format=form).requires_grad_()
    gradient = torch.randn_like(image)
    flops = 2 * 27 * 32 * 32 * batch * shape[0] * shape[1] * shape[2]
    forward_s = repeat(context, lambda: layer(image))
    # Gradients of input and weight take as many operations each as forward.
    both_s = repeat(context, lambda: layer(image).backward(gradient))
    return {
        "forward_ms": forward_s * 1e3,
        "forward_tflop_per_s": flops / forward_s / 1e12,
        "forward_backward_ms": both_s * 1e3,
        "forward_backward_tflop_per_s": 3 * flops / both_s / 1e12,
    }


def repeat(context: Context, call: object) -> float:
    """Median seconds of a call, after warm-up."""
    for _ in range(context.choose(5, 1)):
        call()  # type: ignore[operator]
    timing = time_calls(call, context.choose(REPEATS, 2), context.device)  # type: ignore[arg-type]
    return max(timing.median_s, 1e-9)
