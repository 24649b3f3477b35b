"""A number that is not finite is refused, whatever holds it."""

import numpy as np
import pytest
import torch

from FiniteNumbers import NotFiniteError, require_finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "kind", [float, np.float32, lambda x: np.array([0, x]), lambda x: torch.tensor([0, x]), lambda x: {"a": torch.ones(1), "b": torch.tensor(x)}],
)  # fmt: skip
def test_a_number_that_is_not_finite_is_refused_with_cause_and_cure(kind, bad):
    with pytest.raises(NotFiniteError, match="Logits: NaN or infinity.*Use float32"):
        require_finite(kind(bad), "Logits", "Use float32.")
    require_finite(kind(1.0), "Logits", "Use float32.")


def test_the_error_for_numbers_that_are_not_finite_is_caught_as_either_kind():
    assert issubclass(NotFiniteError, ValueError) and issubclass(NotFiniteError, FloatingPointError)
    require_finite({"steps": torch.tensor(3), "trained": torch.tensor([True])}, "Weights", "")
