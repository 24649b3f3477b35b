"""What the study compares: profiles (how much an arm may cost) and arms (how each one rebalances the data).

    name, settings = resolve_profile("quick")
    X_res, y_res = ARMS["smote"].fit_resample(X, y, seed=0)

An arm is one entry of :data:`ARMS`: a :class:`Methods.Method`, which is a sampler, a loss and batches. Everything else is the same in all arms: the network,
the recipe, the number of training steps, the evaluation.
"""

from dataclasses import dataclass, field, replace
from functools import partial

from imblearn.over_sampling import SMOTE, RandomOverSampler
from sklearn.base import clone

from ClassifierTraining import Recipe
from GANGeneration import GANOverSampler, GANSettings
from ImageOverSampler import UnsuitableImagesError, fewer_images_strategy, source_balanced_strategy
from Methods import METHODS, Method, adjusted
from NonSyntheticGeneration import AugmentationOverSampler, PixelOverSampler
from Runtime import choose_device
from StableDiffusionSampler import StableDiffusionOverSampler

REFERENCE_SPLIT = "cat-50"
DIGITS_SPLIT = "8-0.01"
# The profile whose plots and weights have the plain names, such as images/cm_nsd.png: its results on the
# reference split are committed. All other profiles write into folders of their own, so that no run replaces a
# committed plot of another profile.
COMMITTED_PROFILE = "cpu"


def default_split(data):
    """Name of the split that the notebooks use: cat-50, or 8-0.01 for the digits.

    Parameters
    ----------
    data : ImbalancedCIFAR10.ImageDataSet
    """
    return REFERENCE_SPLIT if data.name == "cifar10" else DIGITS_SPLIT


# --- Profiles -----------------------------------------------------------------------------------

MOST_PASSES = 60  # over the imbalanced training set; only the small digits reach this


@dataclass(frozen=True)
class Profile:
    """How much an arm may cost. All arms of a profile have the same network and number of training steps.

    Attributes
    ----------
    width : int
        Channels of the ResNet-18's first stage: 64 is standard, 42 the reference study's.
    steps : int
        Training steps, at most ``MOST_PASSES`` passes over the imbalanced training set.
    gan : GANTrainingStep.GANSettings
        How the GAN is trained.
    evidence : bool
        Whether its results are meant to be quoted.
    purpose : str
    most_images_a_class : int or None
        How many training images and how many test images of each class are used, see
        :meth:`ImbalancedCIFAR10.ImageDataSet.part`. None: all.
    mirrored : bool
        Whether filters come in mirrored pairs (see :class:`ClassifierNetwork.ResNet18`), if the data allows it.
    recipe_changes : dict
        Arguments of :class:`ClassifierTraining.Recipe` that differ from its defaults.
    arms : tuple of str, or None
        Names of the only arms that are run. None: all.
    """

    width: int
    steps: int
    gan: GANSettings
    evidence: bool
    purpose: str
    most_images_a_class: int | None = None
    mirrored: bool = False
    recipe_changes: dict = field(default_factory=dict)
    arms: tuple | None = None

    def network(self, flip):
        """The network of every arm: a dict of arguments of :func:`ClassifierNetwork.create_classifier`.

        ``flip`` is whether a mirrored image keeps its class. If not, the network has to tell the two apart.
        """
        return {"width": self.width, "mirrored": self.mirrored and flip}

    def changes(self, flip):
        """Arguments of the recipe that differ from its defaults: a dict. For ``flip`` see :meth:`recipe`."""
        return {"flip": flip and not self.mirrored, **self.recipe_changes}

    def recipe(self, real_images, flip):
        """The training recipe of every arm.

        Parameters
        ----------
        real_images : int
            Number of images in the imbalanced training set.
        flip : bool
            Whether a mirrored image keeps its class. A network with mirrored filters needs no mirrored images.

        Returns
        -------
        ClassifierTraining.Recipe
        """
        recipe = Recipe(steps=self.steps, **self.changes(flip))
        steps_of_a_pass = max(1, real_images // recipe.batch_size)
        return replace(recipe, steps=min(self.steps, MOST_PASSES * steps_of_a_pass))


# Small networks and batches give the most updates for little compute. Widths are multiples of 16, where bfloat16
# convolutions are fast.
CPU_GAN = GANSettings(steps=20000)

# Which arms the profile headline compares: the best ones of their kinds on the development splits.
BEST_WITHOUT_IMAGES = "logit-adjusted"
BEST_WITH_STABLE_DIFFUSION = "stable-source-aware"

PROFILES = {
    "smoke": Profile(
        width=4,
        steps=6,
        gan=GANSettings(
            steps=6, batch_size=20, channels=4, latent_size=16, records=2, quality_images=60
        ),
        evidence=False,
        purpose="does it run? Its numbers mean nothing",
        most_images_a_class=150,  # 50 or 1 % of a class leave two images or more, also of the small digits
    ),
    "quick": Profile(
        width=16,
        steps=350,
        gan=GANSettings(steps=2000, channels=16, records=6, quality_images=2000),
        evidence=False,
        purpose="a first look on a CPU: about 90 seconds an arm on two cores",
    ),
    "cpu": Profile(
        width=16,
        steps=2000,
        gan=CPU_GAN,
        evidence=True,
        purpose="evidence from a CPU: 10 to 45 minutes an arm on one core",
    ),
    "full": Profile(
        width=64,
        steps=7000,
        # Width, batch and the two discriminator updates approach Miyato and Koyama's (2018).
        gan=GANSettings(
            steps=30000, batch_size=64, channels=96, discriminator_steps=2,
            discriminator_learning_rate=2e-4, ema_decay=0.9999, records=30, quality_images=10000,
        ),
        evidence=True,
        purpose="evidence from a CUDA GPU: 40 passes, near the reference's 50",
    ),
    # Network and recipe of the benchmarks' sixth try at 94 %, but shorter, without smoothed labels, and without leaving out
    # easy images. The last two would treat rare and common classes differently.
    "headline": Profile(
        width=32,
        steps=3000,
        gan=CPU_GAN,
        evidence=True,
        purpose="the strongest network and recipe that a CPU can afford, for five arms",
        mirrored=True,
        recipe_changes={"padding": 4, "cutout": 10, "norm_shift_rate": 16.0, "muon_learning_rate": 0.07},
        arms=("imbalanced", BEST_WITHOUT_IMAGES, "stable", BEST_WITH_STABLE_DIFFUSION, "balanced"),
    ),
}  # fmt: skip


def resolve_profile(name="auto", device=None):
    """Return ``(name, Profile)``; ``auto`` is ``full`` on a CUDA GPU, else ``quick``.

    ``device`` (str or torch.device) is where the study will run; default: the fastest there is.

    Raises
    ------
    ValueError
        If the profile is unknown; the message lists the valid ones. Or if ``auto`` needs a device that this machine lacks.
    """
    if name == "auto":
        name = "full" if choose_device(device).type == "cuda" else "quick"
    if name not in PROFILES:
        raise ValueError(f"Unknown profile {name!r}. Choose one of auto, {', '.join(PROFILES)}.")
    return name, PROFILES[name]


# --- Arms ---------------------------------------------------------------------------------------


class ArmUnavailableError(RuntimeError):
    """The arm cannot run on this data; the message says why."""


@dataclass(frozen=True)
class Arm:
    """One method of the comparison.

    Attributes
    ----------
    title : str
        For plots and tables.
    image_tag : str
        Part of the file names ``images/cm_<image_tag>.png`` and ``images/test_<image_tag>.png``.
    weights_name : str
        Part of the file name ``models/<weights_name>.pt``.
    method : Methods.Method
        Sampler, loss and batches. Default: nothing is added, and the loss is cross-entropy.
    whole_training_set : bool
        Whether it trains on all images of the data set, none removed: the ceiling.
    story : bool
        Whether ``Main.ipynb`` compares it. Not for an arm that needs a GAN, which Main.ipynb does not train.
    """

    title: str
    image_tag: str
    weights_name: str
    method: Method = Method()
    whole_training_set: bool = False
    story: bool = False

    def __post_init__(self):
        if self.method.changes or self.method.compute != 1:
            raise ValueError(
                f"The arm {self.title!r} changes the recipe, but all arms of a study have the same one: see Profile.recipe."
            )

    @property
    def needs_gan(self):
        return self.method.needs_gan

    @property
    def needs_stable_diffusion(self):
        return self.method.needs_stable_diffusion

    def fit_resample(self, X, y, *, seed, generator=None):
        """Rebalance an imbalanced training set as this arm does.

        Parameters
        ----------
        X : ndarray of uint8, shape (n, height, width, 3)
            What ``Split.cut`` left. Removed images must not be in it.
        y : ndarray of int64, shape (n,)
        seed : int
            Of the run; the sampler gets ``sampling_seed(seed)``.
        generator : GANNetworks.Generator or path, optional
            The trained generator; only an arm that needs a GAN uses it.

        Returns
        -------
        X_res, y_res : ndarrays of shape (m, height, width, 3) and (m,)
            The first n rows are the input, unchanged and in order; the others are synthetic.

        Raises
        ------
        ArmUnavailableError
            If the sampler cannot make the images from these, or there are too few of them.
        ValueError
            If the arm trains on the whole data set, or needs a generator and there is none.
        """
        if self.whole_training_set:
            raise ValueError(
                f"The arm {self.title!r} trains on data.X_train and data.y_train, not on a cut set."
            )
        if self.needs_gan and generator is None:
            raise ValueError(
                f"The arm {self.title!r} needs a generator: pass generator=prepare_generator(study, data)."
            )
        try:
            return self.method.fit_resample(X, y, seed=seed, generator=generator)
        except UnsuitableImagesError as error:
            raise ArmUnavailableError(str(error)) from error


ARMS = {
    "imbalanced": Arm("Imbalanced", "imbalanced", "resnet_imbalanced", story=True),
    "random-oversampling": Arm(
        "Random oversampling", "random_oversampling", "resnet_random_oversampling",
        Method(PixelOverSampler(RandomOverSampler())),
    ),
    "smote": Arm("SMOTE", "smote", "resnet_smote", Method(PixelOverSampler(SMOTE()))),
    "non-synthetic-reference": Arm(
        "Non-synthetic, reference's augmentation", "nsd_reference", "resnet_non_synthetic_reference",
        Method(AugmentationOverSampler(preset="reference")),
    ),
    # Black corners are a cue for the minority: rotation leaves them, and no other class has them.
    "non-synthetic-black-corners": Arm(
        "Non-synthetic, mild augmentation, black corners", "nsd_black_corners",
        "resnet_non_synthetic_black_corners", Method(AugmentationOverSampler(preset="mild-black-corners")),
    ),
    "non-synthetic": Arm(
        "Non-synthetic, mild augmentation", "nsd", "resnet_non_synthetic",
        Method(AugmentationOverSampler()), story=True,
    ),
    "gan": Arm("GAN, minority only", "gan", "resnet_gan", Method(GANOverSampler())),
    "gan-source-balanced": Arm(
        "GAN, source-balanced", "gan_source_balanced", "resnet_gan_source_balanced",
        Method(GANOverSampler(sampling_strategy=source_balanced_strategy)),
    ),
    "gan-source-balanced-adjusted": Arm(
        "GAN, source-balanced, logit-adjusted per source", "gan_source_balanced_adjusted",
        "resnet_gan_source_balanced_adjusted",
        Method(GANOverSampler(sampling_strategy=source_balanced_strategy), adjusted),
    ),
    "gan-source-aware": Arm(
        "GAN, source-aware", "gan_source_aware", "resnet_gan_source_aware",
        METHODS["gan-spectrum-quarter-real-last"],
    ),
    "stable": Arm(
        "Stable Diffusion, minority only", "stable", "resnet_stable_diffusion",
        Method(StableDiffusionOverSampler()), story=True,
    ),
    "stable-source-balanced": Arm(
        "Stable Diffusion, source-balanced", "stable_source_balanced", "resnet_stable_diffusion_source_balanced",
        Method(StableDiffusionOverSampler(sampling_strategy=source_balanced_strategy)),
    ),
    "logit-adjusted": Arm(
        "Logit-adjusted loss, no added image", "logit_adjusted", "resnet_logit_adjusted",
        Method(loss=adjusted), story=True,
    ),
    "adjusted-after-training": Arm(
        "Logits adjusted after training, no added image", "adjusted_after_training", "resnet_adjusted_after_training",
        METHODS["adjusted-after-training"],
    ),
    "stable-adjusted-after-training": Arm(
        "Stable Diffusion, minority only, logits adjusted after training", "stable_adjusted_after_training",
        "resnet_stable_diffusion_adjusted_after_training", METHODS["stable-adjusted-after-training"],
    ),
    "stable-source-balanced-adjusted": Arm(
        "Stable Diffusion, source-balanced, logit-adjusted per source", "stable_source_balanced_adjusted",
        "resnet_stable_diffusion_source_balanced_adjusted",
        Method(StableDiffusionOverSampler(sampling_strategy=source_balanced_strategy), adjusted), story=True,
    ),
    # Chosen on development splits, see docs/development.md. The next four lack one ingredient each.
    "stable-source-aware": Arm(
        "Stable Diffusion, source-aware", "stable_source_aware", "resnet_stable_diffusion_source_aware",
        METHODS["stable-spectrum-quarter-real-last"], story=True,
    ),
    "stable-source-aware-unmatched": Arm(
        "Stable Diffusion, source-aware, spectrum not matched", "stable_source_aware_unmatched",
        "resnet_stable_diffusion_source_aware_unmatched", METHODS["stable-quarter-real-last"],
    ),
    "stable-source-aware-shared-statistics": Arm(
        "Stable Diffusion, source-aware, shared batch-norm statistics", "stable_source_aware_shared_statistics",
        "resnet_stable_diffusion_source_aware_shared_statistics",
        METHODS["stable-spectrum-quarter-real-last-shared-statistics"],
    ),
    "stable-source-aware-cross-entropy": Arm(
        "Stable Diffusion, source-aware, cross-entropy", "stable_source_aware_cross_entropy",
        "resnet_stable_diffusion_source_aware_cross_entropy",
        METHODS["stable-spectrum-quarter-real-last-not-adjusted"],
    ),
    "stable-source-aware-to-the-end": Arm(
        "Stable Diffusion, source-aware, synthetic images to the end", "stable_source_aware_to_the_end",
        "resnet_stable_diffusion_source_aware_to_the_end", METHODS["stable-spectrum-quarter"],
    ),
    "stable-source-aware-placebo": Arm(
        "Stable Diffusion, source-aware, labels shuffled (placebo)", "stable_source_aware_placebo",
        "resnet_stable_diffusion_source_aware_placebo", METHODS["stable-placebo-real-last"],
    ),
    "copies-source-aware": Arm(
        "Copies of real images, source-aware", "copies_source_aware", "resnet_copies_source_aware",
        METHODS["copies-quarter-real-last"],
    ),
    "balanced": Arm(
        "Balanced (ceiling: no image removed)", "balanced", "resnet_balanced", whole_training_set=True,
    ),
}  # fmt: skip

STORY = tuple(name for name, arm in ARMS.items() if arm.story)
GAN_STORY = (
    "imbalanced",
    "logit-adjusted",
    "gan",
    "gan-source-balanced-adjusted",
    "gan-source-aware",
)

# The questions that the study asks of two arms: does the second find more of the minority than the first?
QUESTIONS = {
    ("imbalanced", "non-synthetic"): "Do augmented copies raise the recall?",
    ("non-synthetic-black-corners", "non-synthetic"): "Do augmented copies raise the recall more without black corners?",
    ("imbalanced", "stable"): "Do Stable Diffusion images of the minority raise the recall?",
    ("imbalanced", "gan"): "Do the GAN's images of the minority raise the recall?",
    ("non-synthetic", "gan"): "Does the GAN beat augmented copies?",
    ("gan", "stable"): "Does Stable Diffusion beat the GAN?",
    ("gan", "gan-source-balanced"): "Does it raise the recall to give every class images of the GAN?",
    ("stable", "stable-source-balanced"): "Does it raise the recall to give every class Stable Diffusion images?",
    ("imbalanced", "logit-adjusted"): "Does a loss that needs no image raise the recall?",
    ("logit-adjusted", "adjusted-after-training"): "Does it raise the recall to adjust the logits after the training instead of the loss?",
    ("adjusted-after-training", "stable-adjusted-after-training"):
        "With logits adjusted after training, do Stable Diffusion images of the minority raise the recall?",
    ("stable-adjusted-after-training", "stable-source-aware"):
        "Does source-aware training beat Stable Diffusion images of the minority with logits adjusted after training?",
    ("stable", "logit-adjusted"): "Does a loss that needs no image beat Stable Diffusion images of the minority?",
    ("logit-adjusted", "gan-source-balanced-adjusted"): "Do the GAN's images add to the adjusted loss?",
    ("logit-adjusted", "stable-source-balanced-adjusted"): "Do Stable Diffusion images of every class add to the adjusted loss?",
    ("logit-adjusted", "stable-source-aware"): "Do Stable Diffusion images add to the adjusted loss in source-aware training?",
    ("logit-adjusted", "stable-source-aware-placebo"): "Do Stable Diffusion images with shuffled labels add to the adjusted loss in source-aware training?",
    ("stable-source-aware-placebo", "stable-source-aware"): "Do true labels of Stable Diffusion images raise the recall of source-aware training over shuffled ones?",
    ("logit-adjusted", "copies-source-aware"): "Do the batches of source-aware training raise the recall without new images?",
    ("copies-source-aware", "stable-source-aware"): "In source-aware training, does Stable Diffusion beat copies of real images?",
    ("stable-source-aware-unmatched", "stable-source-aware"): "Does the matched spectrum raise the recall of source-aware training?",
    ("stable-source-aware-shared-statistics", "stable-source-aware"):
        "Do batch-norm statistics per source raise the recall of source-aware training?",
    ("stable-source-aware-cross-entropy", "stable-source-aware"): "Does the adjusted loss raise the recall of source-aware training?",
    ("stable-source-aware-to-the-end", "stable-source-aware"): "Does ending on real images raise the recall of source-aware training?",
    ("logit-adjusted", "gan-source-aware"): "Do the GAN's images add to the adjusted loss in source-aware training?",
    ("gan-source-aware", "stable-source-aware"): "In source-aware training, does Stable Diffusion beat the GAN?",
    ("gan-source-balanced-adjusted", "stable-source-balanced-adjusted"):
        "With the adjusted loss, does Stable Diffusion beat the GAN?",
}  # fmt: skip


def find_arm(name, profile_name=None):
    """Return the arm of that name.

    Parameters
    ----------
    name : str
        A key of :data:`ARMS`. After ``@`` may stand the number of synthetic images of the minority, such as
        ``stable@500``: the same arm with fewer synthetic images, in the same proportions of the classes.
    profile_name : str, optional
        A key of :data:`PROFILES`: the arm must be one that this profile runs.

    Raises
    ------
    ValueError
        If there is no such arm; the message lists the valid names. If the number is none, or the arm adds no image.
    """
    name, at, count = name.partition("@")
    if name not in ARMS:
        raise ValueError(f"Unknown arm {name!r}. Choose one of {', '.join(ARMS)}.")
    names = None if profile_name is None else PROFILES[profile_name].arms
    if names is not None and name not in names:
        raise ValueError(
            f"The profile {profile_name} does not run the arm {name!r}. Choose one of {', '.join(names)}."
        )
    return _with_fewer_images(name, count) if at else ARMS[name]


def _with_fewer_images(name, count):
    arm = ARMS[name]
    if arm.method.sampler is None:
        raise ValueError(
            f"The arm {name!r} adds no image, so no number of images can follow it: got @{count}."
        )
    # Also without leading zeros: stable@007 and stable@7 would be two runs of the same arm.
    if not count.isdecimal() or int(count) < 1 or count != str(int(count)):
        raise ValueError(f"After {name}@ a whole number of images from 1 on is needed, not {count!r}.")
    sampler = clone(arm.method.sampler)
    strategy = partial(fewer_images_strategy, strategy=sampler.sampling_strategy, count=int(count))
    return replace(
        arm,
        title=f"{arm.title}, {int(count):,} synthetic images of the minority",
        image_tag=f"{arm.image_tag}_{count}",
        weights_name=f"{arm.weights_name}_{count}",
        method=replace(arm.method, sampler=sampler.set_params(sampling_strategy=strategy)),
        story=False,
    )


def expand_arms(names, profile_name):
    """Arms in place of ``story`` (those of ``Main.ipynb``) and ``all``. A profile of few arms has them in place of both.

    Parameters
    ----------
    names : sequence of str
    profile_name : str
        A key of :data:`PROFILES`.

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        If a name is unknown, or of an arm that the profile does not run.
    """
    few = PROFILES[profile_name].arms
    groups = {"story": few or STORY, "all": few or tuple(ARMS)}
    arms = [arm for name in names for arm in groups.get(name, (name,))]
    for arm in arms:
        find_arm(arm, profile_name)
    return arms
