"""The trained networks that are committed in ``models/``, and the table of their scores in ``models/README.md``.

model = load_classifier(COMMITTED.weights_path("stable-source-aware"))

Each classifier is that of one committed result with seed 0, each other network that of the committed ``gan.json``.
"""

from Arms import ARMS
from Documents import NOT_RUN
from Results import COMMITTED, HEADLINE, configuration_of, network_name, read_result
from Utils import markdown_table

# Together at most 25 MB, so not those of all arms.
CLASSIFIERS = (
    (COMMITTED, "imbalanced"),
    (COMMITTED, "logit-adjusted"),
    (COMMITTED, "stable-source-aware"),
    (HEADLINE, "stable-source-aware"),
)
GENERATOR, DISCRIMINATOR = COMMITTED.model_path("generator.pt"), COMMITTED.model_path("discriminator.pt")


def weights_table():
    """Markdown table of the committed networks: file, what it is, and its scores in percent."""
    rows = []
    for study, name in CLASSIFIERS:
        path = study.result_path(name)
        if not path.exists():
            continue
        result = read_result(path)
        configuration, metrics = configuration_of(result), result["metrics"]
        minority = metrics["minority"]
        called = sum(
            row[result["class_names"].index(minority["classes"][0])] for row in metrics["confusion_matrix"]
        )
        precision = f"{100 * minority['precision']:.1f}" if called else "–"
        rows.append(
            (
                f"`{study.weights_path(name).relative_to('models')}`",
                f"{network_name(configuration)}, {configuration['parameters']:,} parameters",
                f"{ARMS[name].title}, profile `{study.profile}`",
                f"{100 * minority['recall']:.1f}",
                precision,
                f"{100 * metrics['accuracy']:.1f}",
            )
        )
    if COMMITTED.record_path("gan.json").exists():
        parameters = COMMITTED.read_gan_record()["parameters"]
        for path in (GENERATOR, DISCRIMINATOR):
            network = f"{path.stem} of the GAN, {parameters[path.stem]:,} parameters"
            rows.append((f"`{path.name}`", network, f"profile `{COMMITTED.profile}`", "", "", ""))
    if not rows:
        return NOT_RUN
    head = ("file", "network", "trained by", "minority recall", "minority precision", "accuracy")
    return markdown_table(head, rows, "left")
