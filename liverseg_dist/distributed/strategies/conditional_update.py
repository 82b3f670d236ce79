"""An optimizer step that the device makes or leaves out, so that the host need not know which.

A fused optimizer has this built in: `found_inf`, made for torch.amp.GradScaler, leaves weights, state
and step counters as they are. Every other optimizer updates them, and they are copied back where the
step is to be left out; that takes a copy of weights and state during the update. On a GPU the host
waits for an optimizer that is not fused and counts steps, because its counters are on the CPU.
`optimizers` builds none of this kind, except for ZeRO, which does not use this module.
"""

import torch
from torch import Tensor

from liverseg_dist.distributed.strategies.optimizers import fill_optimizer_state


@torch.no_grad()
def update_unless(optimizer: torch.optim.Optimizer, is_left_out: Tensor) -> None:
    """Make an optimizer step, or none, as if `optimizer.step()` had not been called.

    Args:
        optimizer: its parameters have gradients.
        is_left_out: bool, scalar on the device of the parameters.
    """
    if all(group.get("fused") for group in optimizer.param_groups):
        _update_fused(optimizer, is_left_out)
        return
    before = {key: tensor.clone() for key, tensor in _changing_tensors(optimizer).items()}
    optimizer.step()
    for key, tensor in _changing_tensors(optimizer).items():
        # State that the step has created: its start value is 0, see `fill_optimizer_state`.
        old = before[key] if key in before else torch.zeros_like(tensor)
        left_out = is_left_out.to(tensor.device)
        tensor.copy_(torch.where(left_out, old, tensor))


def _update_fused(optimizer: torch.optim.Optimizer, is_left_out: Tensor) -> None:
    # A momentum buffer that a left out step creates would have no values.
    fill_optimizer_state(optimizer)
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = is_left_out.float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def _changing_tensors(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """Return weights and state of the parameters that have a gradient; own shards only."""
    tensors: dict[tuple[int, str], Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            tensors[id(parameter), ""] = _own_shard(parameter.detach())
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[id(parameter), key] = _own_shard(value)
    return tensors


def _own_shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
