"""Translate the values of predicted masks into those of the true masks, structure by structure.

A network that was trained on other data may use 2 for the spleen where the truth uses 2 for a
tumour. `liverseg predict` and nnU-Net write a `dataset.json` beside their masks, so `liverseg score`
compares structures by their names and leaves out those that the predictions cannot have.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from liverseg_dist.errors import UserError, printable
from liverseg_dist.labels import LARGEST_VALUE, LabelScheme
from liverseg_dist.texts.names import list_some

UNKNOWN = -1


@dataclass(frozen=True)
class LabelTranslation:
    """How predicted values become values of the truth.

    Attributes:
        table: Value of the truth for each predicted value; `UNKNOWN` for values without a name.
        scored: Structures of the truth that the predictions have as well.
        left_out: Structures of the truth that the predictions have not.
        known: The predicted values with their names, for messages.
    """

    table: tuple[int, ...]
    scored: tuple[str, ...]
    left_out: tuple[str, ...]
    known: str

    def apply(self, mask_zyx: np.ndarray, where: str) -> np.ndarray:
        """Return a mask with the values of the truth.

        Raises:
            UserError: The mask has a value that the labels of the predictions do not name.
        """
        if not np.issubdtype(mask_zyx.dtype, np.integer) or mask_zyx.size == 0:
            # Refused by the scoring, with the same message as without a translation.
            return mask_zyx
        if mask_zyx.min() < 0 or mask_zyx.max() > LARGEST_VALUE:
            return mask_zyx
        translated = np.array(self.table, dtype=np.int16)[mask_zyx]
        if (translated == UNKNOWN).any():
            value = int(mask_zyx[translated == UNKNOWN].max())
            raise UserError(f"{where}: the prediction has label {value}; known are {self.known}")
        return translated.astype(np.uint8)


def translate_labels(
    predicted: LabelScheme, truth: LabelScheme, fold_name: Callable[[str], str]
) -> LabelTranslation | None:
    """Match the structures of two schemes by name.

    Args:
        predicted: Scheme of the predictions.
        truth: Scheme of the true masks.
        fold_name: Key of a name; equal keys are one structure.

    Returns:
        The translation, or None where both schemes have the same structures and values.

    Raises:
        UserError: No structure has the same name, or the values of the predictions do not
            distinguish what the truth distinguishes.
    """
    by_name = {fold_name(structure.name): structure for structure in predicted.structures}
    known = {fold_name(structure.name): structure.values for structure in truth.structures}
    if {name: structure.values for name, structure in by_name.items()} == known:
        return None
    scored: list[str] = []
    left_out: list[str] = []
    for name in truth.structure_names:
        (scored if fold_name(name) in by_name else left_out).append(name)
    if not scored:
        raise UserError(
            f"predictions and truth have no structure of the same name: "
            f"{_list_names(predicted)} against {_list_names(truth)}; --labels names the values"
        )
    table = np.full(LARGEST_VALUE + 1, UNKNOWN, dtype=np.int16)
    table[[0, *(value for value, _ in predicted.values)]] = 0
    for index, value in truth.paint_order:
        structure = by_name.get(fold_name(truth.structures[index].name))
        if structure is not None:
            table[list(structure.values)] = value
    for name in scored:
        expected = set(by_name[fold_name(name)].values)
        found = np.flatnonzero(np.isin(table, truth.structure(name).values))
        if set(found.tolist()) != expected:
            raise UserError(
                f"the values of {printable(name)} in the predictions "
                f"({', '.join(map(str, sorted(expected)))}) cannot be translated into those of the "
                "truth, whose structures overlap in another way; --labels names the values"
            )
    shown = ", ".join(f"{value} {printable(name)}" for value, name in predicted.values)
    return LabelTranslation(tuple(table.tolist()), tuple(scored), tuple(left_out), shown)


def _list_names(labels: LabelScheme) -> str:
    return list_some([printable(name) for name in labels.structure_names])
