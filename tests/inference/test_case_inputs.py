"""Parts of a scan joined on its own grid, and figures about calibration, against whole arrays."""

from collections.abc import Iterator

import numpy as np
import pytest

from liverseg_dist.inference.case_inputs import (
    AIR_HU,
    Piece,
    PieceAssembler,
    assemble_case,
    assign_slices_to_slabs,
    resample_image_to_grid,
)
from liverseg_dist.inference.segment_scan import NetworkImage
from liverseg_dist.volume import Grid, Volume

SHAPE = (12, 6, 8)
GRID = Grid(SHAPE, np.diag([1.0, 1.0, 2.0, 1.0]))
TURNED = np.array([[0, -1.0, 0, 5], [-1.0, 0, 0, 7], [0, 0, -2.0, 22], [0, 0, 0, 1]])
"""An affine whose slices run downwards and whose axes in plane are exchanged."""


def make_piece(slices: np.ndarray | None, grid: Grid = GRID) -> Piece:
    image = NetworkImage(np.zeros((1, *grid.shape), np.int16), grid, (None,), (True,))
    return Piece(image, slices)


def test_pieces_fill_their_own_slices() -> None:
    values = np.random.default_rng(1).integers(0, 3, SHAPE).astype(np.uint8)
    assembler = PieceAssembler(GRID, 9, np.uint8)
    assembler.add_piece(make_piece(np.arange(0, 5)), values)
    assembler.add_piece(make_piece(np.arange(5, 9)), values)
    assert np.array_equal(assembler.voxels[:9], values[:9])
    assert (assembler.voxels[9:] == 9).all(), "no piece covers these slices"


def test_slices_are_those_of_the_pieces_own_orientation() -> None:
    target = Grid((12, 8, 6), TURNED)
    values = np.random.default_rng(2).integers(0, 3, target.shape).astype(np.uint8)
    assembler = PieceAssembler(target, 9, np.uint8)
    assembler.add_piece(make_piece(np.arange(0, 4)), values)
    # Slices 0 to 3 from below are the last four of a scan that runs downwards.
    assert np.array_equal(assembler.voxels[8:], values[8:])
    assert (assembler.voxels[:8] == 9).all()


def test_a_piece_without_slices_is_the_whole_scan() -> None:
    values = np.ones(SHAPE, np.uint8)
    assembler = PieceAssembler(GRID, 0, np.uint8)
    assembler.add_piece(make_piece(None), values)
    assert assembler.voxels is values


@pytest.mark.parametrize("with_image", [False, True])
def test_a_case_is_joined_from_its_pieces(with_image: bool) -> None:
    halves = [np.arange(0, 6), np.arange(6, 12)]

    def pieces() -> Iterator[Piece]:
        for slices in halves:
            yield make_piece(slices)

    numbers = iter((1, 2))

    def segment(_piece: Piece) -> np.ndarray:
        return np.full(SHAPE, next(numbers), np.uint8)

    mask, image = assemble_case(pieces(), GRID, segment, with_image)
    assert mask[:, 0, 0].tolist() == [1] * 6 + [2] * 6
    assert (image is not None) == with_image


def test_each_slice_belongs_to_the_nearest_slab() -> None:
    scan = Grid((100, 4, 4), np.diag([1.0, 1.0, 1.5, 1.0]))
    slabs = []
    for first in (0, 30, 60):
        affine = scan.affine.copy()
        affine[2, 3] = 1.5 * first
        slabs.append(Grid((40, 4, 4), affine))
    parts = assign_slices_to_slabs(slabs, scan)
    assert np.array_equal(np.concatenate(parts), np.arange(100)), "each slice once, in order"
    centres = np.array([19.5, 49.5, 79.5])
    for number, part in enumerate(parts):
        distances = np.abs(part[:, None] - centres)
        assert (np.argmin(distances, axis=1) == number).all()


def test_an_image_is_shown_on_the_scans_voxels_with_air_outside() -> None:
    image = Volume(np.full((4, 6, 8), 50, np.int16), Grid((4, 6, 8), GRID.affine))
    shown = resample_image_to_grid(image, GRID)
    assert (shown[:4] == 50).all()
    # Half a voxel beyond the last slice belongs to it; everything after is air.
    assert (shown[5:] == AIR_HU).all()
    assert shown.dtype == np.int16
