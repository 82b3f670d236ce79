"""Everything about probabilities that labels depend on, in one small integer for each voxel.

The search for post-processing tries thresholds without the network. For each voxel it stores the
label without thresholds, for each organ with lesions the label as if its lesions did not exist, and
for each lesion how many of `THRESHOLDS` its probability reaches. These are the digits of a number
of mixed radix: one byte for Task03. Used by `postprocess_search`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from liverseg_dist.errors import UserError
from liverseg_dist.inference.label_assignment import (
    ThresholdedOrgan,
    apply_thresholds,
    assign_most_likely,
    assign_without_lesions,
    list_thresholded_organs,
    sum_structure_probability,
)
from liverseg_dist.model.outputs import OutputChannels

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
CODES_VERSION = 2
"""Part of the fingerprint of stored codes."""
CODE_TYPES = (np.uint8, np.uint16, np.uint32, np.uint64)


@dataclass(frozen=True)
class LabelCodes:
    """Encodes probabilities, and decodes labels for given thresholds.

    Attributes:
        outputs: what the channels of the network mean.
    """

    outputs: OutputChannels

    @cached_property
    def groups(self) -> list[ThresholdedOrgan]:
        """Each organ with its lesions."""
        names = [lesion.name for lesion in self.outputs.labels.lesions]
        return list_thresholded_organs(self.outputs, names)

    @cached_property
    def radices(self) -> list[int]:
        """Number of values of each digit, the label without thresholds first."""
        classes = self.outputs.labels.num_classes
        radices = [classes]
        for group in self.groups:
            radices += [classes, *[len(THRESHOLDS) + 1] * len(group.lesions)]
        return radices

    @cached_property
    def dtype(self) -> type[np.unsignedinteger]:
        """Smallest type for the codes.

        Raises:
            UserError: too many lesion structures for one number.
        """
        # The product counts the different codes; the largest code is one less.
        codes = 1
        for radix in self.radices:
            codes *= radix
        for kind in CODE_TYPES:
            if codes - 1 <= np.iinfo(kind).max:
                return kind
        raise UserError(
            f"the labels have {len(self.outputs.labels.lesions)} lesion structures; "
            "liverseg postprocess supports fewer"
        )

    def encode(self, foreground_FDHW: Tensor) -> np.ndarray:
        """The codes (D, H, W) of probabilities."""
        # The order of the digits is that of `radices`; `decode` reads them in the same order.
        digits = [assign_most_likely(foreground_FDHW, self.outputs)]
        for group in self.groups:
            digits.append(assign_without_lesions(foreground_FDHW, self.outputs, group))
            for lesion in group.lesions:
                probability = sum_structure_probability(foreground_FDHW, lesion, self.outputs)
                level = torch.zeros_like(digits[0])
                # A count instead of one bit per threshold: reaching one includes all lower ones.
                for threshold in THRESHOLDS:
                    level += probability >= threshold
                digits.append(level)
        codes = np.zeros(digits[0].shape, dtype=self.dtype)
        factor = 1
        for digit, radix in zip(digits, self.radices, strict=True):
            codes += digit.cpu().numpy().astype(self.dtype) * self.dtype(factor)
            factor *= radix
        return codes

    def decode(self, codes: np.ndarray, thresholds: Mapping[str, float]) -> np.ndarray:
        """The labels (uint8) that the predictor assigns with thresholds.

        Args:
            codes: result of `encode`.
            thresholds: for lesions, one of `THRESHOLDS`; those without an entry have none.
        """
        rest = codes
        digits = []
        for radix in self.radices:
            # Division with remainder takes the digits off in the order in which they were
            # multiplied.
            rest, digit = np.divmod(rest, self.dtype(radix))
            digits.append(torch.from_numpy(digit.astype(np.uint8)))
        label = digits.pop(0)
        for group in self.groups:
            without_lesions = digits.pop(0)
            reached, lesions = [], []
            for lesion in group.lesions:
                level = digits.pop(0)
                if lesion.name in thresholds:
                    lesions.append(lesion)
                    # The level counts reached thresholds: it exceeds the index of each one.
                    reached.append(level > THRESHOLDS.index(thresholds[lesion.name]))
            # Without a threshold the stored most likely label already is the result.
            if lesions:
                subset = ThresholdedOrgan(group.organ, tuple(lesions))
                label = apply_thresholds(label, without_lesions, reached, self.outputs, subset)
        return label.numpy()
