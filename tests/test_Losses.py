"""The losses for rare classes; plain and logit-adjusted ones also in test_ClassifierTraining.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_ClassifierNetwork import X, small_model
from test_ClassifierNetwork import y as labels

from ClassifierTraining import Recipe, train_classifier
from Losses import ClassBalancedLoss, CrossEntropy, LDAMLoss, LogitAdjustedLoss, class_balanced_weights

Y = np.repeat([0, 1, 2], [100, 10, 1])
LOGITS, TARGETS = torch.tensor([[0.2, -0.4, 0.9], [0.5, 0.1, -0.3]]), torch.tensor([2, 0])
ROWS = torch.tensor([110, 0])


def test_class_balanced_weights_are_those_of_the_paper():
    weights = class_balanced_weights(Y, 3, beta=0.9)
    expected = np.array([0.1 / (1 - 0.9**n) for n in (100, 10, 1)])
    assert weights.numpy() == pytest.approx(expected * 3 / expected.sum(), rel=1e-5)
    assert class_balanced_weights(Y, 3, beta=0).tolist() == [1, 1, 1]
    inverse = 1 / np.array([100, 10, 1])
    assert class_balanced_weights(Y, 3, beta=1 - 1e-9).numpy() == pytest.approx(
        3 * inverse / inverse.sum(), rel=1e-3
    )
    assert class_balanced_weights(Y, 4, beta=0.9)[3] == 0
    for beta in (1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="beta must be at least 0 and below 1"):
            class_balanced_weights(Y, 3, beta=beta)


def test_classes_weigh_the_same_until_the_weights_are_due():
    loss = ClassBalancedLoss(Y, 3, deferred_until=0.8)
    loss.progress = 0.79
    assert loss(LOGITS, TARGETS, ROWS) == F.cross_entropy(LOGITS, TARGETS)
    loss.progress = 0.8
    expected = F.cross_entropy(LOGITS, TARGETS, weight=class_balanced_weights(Y, 3))
    assert loss(LOGITS, TARGETS, ROWS) == expected != F.cross_entropy(LOGITS, TARGETS)


def test_ldam_lowers_the_true_logit_by_a_margin_that_grows_with_rarity():
    loss = LDAMLoss(Y, 3, max_margin=0.5, scale=30, deferred_until=0.8)
    loss.progress = 0.0
    assert loss.margins.numpy() == pytest.approx(0.5 * np.array([0.01, 0.1, 1]) ** 0.25)
    lowered = LOGITS.clone()
    lowered[0, 2] -= 0.5
    lowered[1, 0] -= 0.5 * 0.01**0.25
    assert loss(LOGITS, TARGETS, ROWS).item() == pytest.approx(
        float(F.cross_entropy(30 * lowered, TARGETS)), rel=1e-5
    )
    loss.progress = 0.9
    weighted = F.cross_entropy(30 * lowered, TARGETS, weight=class_balanced_weights(Y, 3))
    assert loss(LOGITS, TARGETS, ROWS).item() == pytest.approx(float(weighted), rel=1e-5)
    with pytest.raises(
        ValueError, match=r"LDAM needs an image of every class; the classes have \[100, 10, 1, 0\]"
    ):
        LDAMLoss(Y, 4)


@pytest.mark.parametrize("tau", [0.0, 0.5, 2.0])
def test_tau_scales_the_adjustment(tau):
    priors = torch.log(torch.tensor([100, 10, 1]) / 111)
    expected = F.cross_entropy(LOGITS + tau * priors, TARGETS)
    assert LogitAdjustedLoss(Y, 3, tau=tau)(LOGITS, TARGETS, ROWS).item() == pytest.approx(
        float(expected), rel=1e-5
    )


def test_synthetic_rows_can_have_the_real_rows_prior():
    sources = np.arange(len(Y)) % 2
    real_only = LogitAdjustedLoss(Y[sources == 0], 3).log_prior_of_row[0]
    rows = LogitAdjustedLoss(Y, 3, sources, real_prior_for_all=True).log_prior_of_row
    assert torch.allclose(rows, real_only)
    assert not (LogitAdjustedLoss(Y, 3, sources).log_prior_of_row == real_only).all()


def test_the_real_rows_prior_needs_a_real_row_of_each_synthetic_class():
    # Class 2 is synthetic only, so the real prior would make its loss infinite.
    sources = ((Y == 2) | (np.arange(len(Y)) == 105)).astype(int)
    with pytest.raises(ValueError, match=r"needs a real image of each class, but there is none of \[2\]"):
        LogitAdjustedLoss(Y, 3, sources, real_prior_for_all=True)
    LogitAdjustedLoss(Y, 3, sources)


def test_rows_may_be_left_out_if_all_have_one_prior():
    loss = LogitAdjustedLoss(Y, 3)
    assert loss(LOGITS, TARGETS) == loss(LOGITS, TARGETS, ROWS)
    with pytest.raises(ValueError, match="Pass the rows"):
        LogitAdjustedLoss(Y, 3, np.arange(len(Y)) % 2)(LOGITS, TARGETS)


def test_labels_may_be_a_list():
    as_list = LogitAdjustedLoss(Y.tolist(), 3, (np.arange(len(Y)) % 2).tolist())
    assert repr(as_list) == repr(LogitAdjustedLoss(Y, 3, np.arange(len(Y)) % 2))


def test_a_class_without_a_row_is_refused_because_its_logit_would_compete_untrained():
    with pytest.raises(ValueError, match=r"No row is of the classes \[0, 4\].*return_inverse"):
        LogitAdjustedLoss(Y + 1, 5)


def test_a_class_that_a_source_lacks_stays_impossible_in_it_whatever_tau_is():
    sources = (np.arange(len(Y)) % 2 == 1) & (Y < 2)
    for tau in (0.0, 2.0):
        priors = LogitAdjustedLoss(Y, 3, sources, tau=tau).log_prior_of_row
        assert priors[sources, 2].eq(-torch.inf).all() and priors[~sources].isfinite().all()


def test_a_source_of_one_class_is_refused_because_it_would_teach_nothing():
    sources = np.arange(len(Y)) >= 105
    Y_new = np.where(sources, 1, Y)
    Y_new[0] = 2
    with pytest.raises(ValueError, match="All rows of source 1 are of class 1, so their loss is always 0"):
        LogitAdjustedLoss(Y_new, 3, sources)
    loss = LogitAdjustedLoss(Y_new, 3, sources, real_prior_for_all=True)
    assert loss(LOGITS, torch.tensor([1, 1]), torch.tensor([105, 106])) > 0


def test_tau_must_be_a_number_that_makes_sense():
    for tau in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="tau must be a finite number, 0 or more"):
            LogitAdjustedLoss(Y, 3, tau=tau)


def test_a_loss_is_told_how_far_the_training_is():
    seen = []

    class Watching(ClassBalancedLoss):
        def forward(self, logits, targets, rows):
            seen.append(self.progress)
            return super().forward(logits, targets, rows)

    loss = Watching(labels, 10)
    train_classifier(small_model(), X, labels, Recipe(steps=4, batch_size=20), seed=0, loss=loss)
    assert seen == [0, 0.25, 0.5, 0.75]


def test_losses_that_differ_have_different_names_for_checkpoints():
    losses = [
        ClassBalancedLoss(Y, 3), ClassBalancedLoss(Y, 3, beta=0.99), ClassBalancedLoss(Y, 3, deferred_until=0.8),
        ClassBalancedLoss(Y[5:], 3), LDAMLoss(Y, 3), LDAMLoss(Y, 3, scale=10), LDAMLoss(Y[5:], 3), LDAMLoss(Y, 3, max_margin=1),
        LogitAdjustedLoss(Y, 3), LogitAdjustedLoss(Y, 3, tau=2.0),
    ]  # fmt: skip
    assert len({repr(loss) for loss in losses}) == len(losses)


def test_a_loss_that_does_not_fit_the_network_or_the_labels_is_refused():
    def train(loss, recipe=None, **options):
        model = small_model(**options)
        recipe = recipe or Recipe(steps=1, batch_size=20)
        return train_classifier(model, X, labels, recipe, seed=0, loss=loss)

    with pytest.raises(ValueError, match="LDAM needs cosines: create the network with cosine_head=True"):
        train(LDAMLoss(labels, 10))
    with pytest.raises(ValueError, match="made from other labels or classes"):
        train(LogitAdjustedLoss(np.resize(np.arange(12), len(labels)), 12))
    with pytest.raises(ValueError, match="made from other labels or classes"):
        sources = np.arange(len(labels)) >= len(labels) // 2
        train(LogitAdjustedLoss(np.where(sources, labels // 2, labels), 10, sources))
    with pytest.raises(ValueError, match="ClassBalancedLoss has no label smoothing"):
        train(ClassBalancedLoss(labels, 10), Recipe(steps=1, batch_size=20, label_smoothing=0.1))
    with pytest.raises(ValueError, match="Labels run from -1 to 2"):
        LogitAdjustedLoss(np.array([-1, 0, 2]), 3)


@pytest.mark.parametrize("make_loss", [LogitAdjustedLoss, ClassBalancedLoss, LDAMLoss])
@pytest.mark.parametrize(
    ("labels", "classes", "error"),
    [(Y + 1, 3, ValueError), (Y - 1, 3, ValueError), (Y.astype(float), 3, TypeError), (Y.astype(bool), 3, TypeError),
     (Y.astype(str), 3, TypeError), (Y[:0], 3, ValueError), (Y, 3.0, ValueError), (Y, 0, ValueError)],
)  # fmt: skip
def test_labels_that_are_no_classes_are_refused(make_loss, labels, classes, error):
    with pytest.raises(error, match="y|num_classes"):
        make_loss(labels, classes)


@pytest.mark.parametrize(
    "make_loss",
    [lambda: CrossEntropy(-0.1), lambda: CrossEntropy(float("nan")), lambda: ClassBalancedLoss(Y, 3, deferred_until=2),
     lambda: LDAMLoss(Y, 3, max_margin=-1), lambda: LDAMLoss(Y, 3, scale=0), lambda: LDAMLoss(Y, 3, deferred_until=-1)],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(make_loss):
    with pytest.raises(ValueError, match="must be"):
        make_loss()


@pytest.mark.parametrize(
    "loss", [LDAMLoss(Y, 3), ClassBalancedLoss(Y, 3, deferred_until=0.5)], ids=["LDAM", "balanced"]
)
def test_a_loop_that_does_not_say_its_progress_is_told_to(loss):
    with pytest.raises(RuntimeError, match=r"loss\.progress = step / steps"):
        loss(LOGITS, TARGETS)
    loss.progress = 0.9
    late = loss(LOGITS, TARGETS)
    loss.progress = 0.1
    assert loss(LOGITS, TARGETS) != late


def test_rows_are_needed_only_where_they_differ():
    assert CrossEntropy()(LOGITS, TARGETS) == F.cross_entropy(LOGITS, TARGETS)
    assert ClassBalancedLoss(Y, 3)(LOGITS, TARGETS) == ClassBalancedLoss(Y, 3)(LOGITS, TARGETS, ROWS)
