"""Existing weights: which tensors are loaded, adapted or refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from liverseg_dist.config import ModelConfig
from liverseg_dist.errors import UserError
from liverseg_dist.model import build_model
from liverseg_dist.model.pretrained import load_pretrained
from liverseg_dist.model.topology import resolve_topology


def make(seed: int, **changes: object) -> nn.Module:
    torch.manual_seed(seed)
    config = resolve_topology(
        ModelConfig(**{"features": (4, 8, 8), **changes}), (16, 32, 32), (3.0, 3.0, 3.0)
    )
    return build_model(config)


def test_own_weights_are_loaded_completely(tmp_path: Path) -> None:
    source, target = make(1), make(2)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    report = load_pretrained(target, tmp_path)
    assert not report.missing
    assert not report.unused
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in source.state_dict().items())


def test_prefixes_of_external_state_dict_are_removed(tmp_path: Path) -> None:
    source, target = make(1), make(2)
    state = {f"module._orig_mod.{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "foreign.pt")
    assert not load_pretrained(target, tmp_path / "foreign.pt").missing
    assert torch.equal(next(source.parameters()), next(target.parameters()))


def test_heads_for_other_classes_are_not_loaded_and_reported(tmp_path: Path) -> None:
    source, target = make(1), make(2, regions=True)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    fresh = target.heads[0].weight.clone()
    report = load_pretrained(target, tmp_path / "w.safetensors")
    assert sorted(report.missing) == ["heads.0.bias", "heads.0.weight"]
    assert "2 not in the file (heads.0.weight, heads.0.bias)" in str(report)
    assert torch.equal(target.heads[0].weight, fresh)


def test_two_dimensional_kernels_are_inflated(tmp_path: Path) -> None:
    flat, deep = nn.Conv2d(3, 4, 3), nn.Conv3d(1, 4, 3)
    save_file(
        {"weight": flat.weight.detach(), "bias": flat.bias.detach()}, tmp_path / "w.safetensors"
    )
    assert load_pretrained(deep, tmp_path / "w.safetensors").adapted == ["weight"]
    picture = torch.randn(1, 1, 5, 5)
    # One channel with three equal planes gives the result of three equal channels.
    expected = flat(picture.expand(1, 3, 5, 5))
    assert torch.allclose(
        deep(picture.unsqueeze(2).expand(1, 1, 3, 5, 5))[:, :, 0], expected, atol=1e-5
    )


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_pretrained(make(1), tmp_path / "absent.pt")
    save_file({"other": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="none of the 1 tensors fits"):
        load_pretrained(make(1), tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 nothing ")
    with pytest.raises(UserError, match="not readable as weights"):
        load_pretrained(make(1), tmp_path / "broken.safetensors")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    """Some tensor of any network has a shape that fits."""
    save_file(make(1, features=(8, 16, 16)).state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(
        UserError,
        match=r"another network: encoder\..* has shape \[8, .*\] in the file and \[4, .*\] in",
    ):
        load_pretrained(make(2), tmp_path / "wide.safetensors")


class Dangerous:
    def __reduce__(self) -> tuple:
        return print, ("this must never run",)


def test_pickle_with_code_is_never_executed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"weights": Dangerous()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="contains more than tensors"):
        load_pretrained(make(1), tmp_path / "evil.pt")
    assert "must never run" not in capsys.readouterr().out
