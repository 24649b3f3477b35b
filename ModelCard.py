"""The trained networks that are committed in ``models/``. ``Report.weights_table`` describes them in ``models/README.md``.

model = load_classifier(COMMITTED.weights_path("stable-source-aware"))

Each classifier is that of one committed result with seed 0, each other network that of the committed ``gan.json``.
"""

from Results import COMMITTED, HEADLINE

# Together at most 25 MB, so not those of all arms.
CLASSIFIERS = (
    (COMMITTED, "imbalanced"),
    (COMMITTED, "logit-adjusted"),
    (COMMITTED, "stable-source-aware"),
    (HEADLINE, "stable-source-aware"),
)
GENERATOR, DISCRIMINATOR = COMMITTED.model_path("generator.pt"), COMMITTED.model_path("discriminator.pt")
