"""How much a search trains under each profile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from effspinenet_lib.data import DataConfig
from effspinenet_lib.data.coco import HeldOutSplit
from effspinenet_lib.data.config import UNKNOWN_ROOT
from effspinenet_lib.data.shapescenes import CATEGORIES
from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.models.specs import SCALES, betas_text
from effspinenet_lib.models.zoo import COCO_CLASSES
from effspinenet_lib.training.config import RunConfig
from effspinenet_lib.training.recipes import SEARCH_HELD_OUT_IMAGES, Recipe, get_recipe

OWN_FORMAT = "shapescenes"
HELD_OUT = "search"  # split of ShapeScenes that no training and no table sees


@dataclass(frozen=True)
class SearchSettings:
    """The search of a profile.

    Attributes:
        profile: `smoke`, `proxy` or `paper`.
        model: scale-permuted model that a trial trains with the betas of its sample.
        image_size: side of the square input in pixels.
        data: what a trial is trained and, on the held-out split, evaluated on.
        recipe: how a trial is trained.
        methods: those of `all`.
        trials: samples of each method.
        batch: samples between two updates of a method.
        timeout: seconds after which an attempt at a trial counts as hung.
        micro_batch: images of a batch that a trial computes at once, which its norms see; None:
            all of them.
    """

    profile: str
    model: str
    image_size: int
    data: DataConfig
    recipe: Recipe
    methods: tuple[str, ...]
    trials: int
    batch: int
    timeout: float
    micro_batch: int | None = None

    def on(
        self, root: Path | None, batch_size: int | None = None, micro_batch: int | None = None
    ) -> SearchSettings:
        """The same search on the data in a user's folder, with the recipe scaled to a batch.

        Raises:
            UserError: a folder is needed and not given, or is given and not needed.
        """
        needed = self.data.format != OWN_FORMAT
        if needed and (root is None or not root.is_dir()):
            raise UserError(
                f"the profile {self.profile!r} searches on COCO 2017: name its folder with --data"
                + (f" ({root} is none)" if root else "")
            )
        if not needed and root is not None:
            raise UserError(f"the profile {self.profile!r} has data of its own; leave out --data")
        recipe = self.recipe if batch_size is None else self.recipe.for_batch(batch_size)
        data = self.data if root is None else replace(self.data, root=str(root.resolve()))
        return replace(self, data=data, recipe=recipe, micro_batch=micro_batch)

    def config(self, betas: tuple[int, ...], seed: int) -> RunConfig:
        """The run of a trial."""
        return RunConfig(
            model=self.model,
            task="detection",
            image_size=self.image_size,
            data=self.data,
            recipe=self.recipe,
            seed=seed,
            model_options={"betas": betas_text(betas)},
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of a trial."""
        return self.recipe.steps

    @property
    def classes(self) -> int:
        """Classes that the costs of a trial's model are counted with."""
        return len(CATEGORIES) if self.data.format == OWN_FORMAT else COCO_CLASSES

    @property
    def description(self) -> str:
        """What a trial is, in a few words."""
        data = self.data
        counts = (data.train_images, data.eval_images)
        images = "all" if counts == (None, None) else "/".join(map(str, counts))
        scaled = self.recipe.scaled_from_batch is not None
        return (
            f"{self.model}, {data.format} {data.train_split}/{data.eval_split} {images} images, "
            f"{self.image_size}x{self.image_size}, {self.recipe.name}"
            + (f" scaled to batch {self.recipe.batch_size}" if scaled else "")
            + (f", {self.micro_batch} images at once" if self.micro_batch else "")
        )


def _paper_part(side: Literal["held", "rest"]) -> str:
    return HeldOutSplit("train2017", side, SEARCH_HELD_OUT_IMAGES).name


SEARCHES: dict[str, SearchSettings] = {
    settings.profile: settings
    for settings in (
        SearchSettings(
            "smoke",
            model="eff_spinenet_m0",
            image_size=64,
            data=DataConfig(
                OWN_FORMAT,
                eval_split=HELD_OUT,
                train_images=16,
                eval_images=4,
                image_size=64,
            ),
            recipe=get_recipe("smoke_search"),
            methods=("ppo", "reinforce", "random", "evolution"),
            trials=4,
            batch=2,
            timeout=300,  # our choice: the first trial of a process imports torch
        ),
        SearchSettings(
            "proxy",
            model="eff_spinenet_m0",
            # Our choice: in about 45 seconds of one core 96 pixels gave 2.1 AP, 64 pixels 1.0,
            # 128 pixels 1.8.
            image_size=96,
            # Our choice: each image is seen once; 300 to find objects in take 2 seconds.
            data=DataConfig(
                OWN_FORMAT,
                eval_split=HELD_OUT,
                train_images=2000,
                eval_images=300,
                image_size=96,
            ),
            recipe=get_recipe("proxy_search"),
            methods=("ppo", "random", "evolution"),
            trials=50,
            batch=10,  # our choice: four updates, as the last batch is never told
            timeout=900,  # our choice: twenty times what a trial takes
        ),
        SearchSettings(
            "paper",
            model="eff_spinenet_d0",
            image_size=SCALES["D0"].input_size,  # paper 5.1.1: SP-EfficientNet-B0 at 512
            data=DataConfig("coco", UNKNOWN_ROOT, _paper_part("rest"), _paper_part("held")),
            recipe=get_recipe("paper_search_trial"),
            methods=("ppo",),  # paper 5.1.1: reinforcement learning
            trials=5_000,  # paper 5.1.1: about 5k architectures are sampled
            batch=20,  # our choice: the paper does not say how many samples make an update
            timeout=24 * 3600,  # our choice: many times what a trial takes on one accelerator
        ),
    )
}


def get_search(profile: str) -> SearchSettings:
    """The search of a profile.

    Raises:
        UnknownName: there is none.
    """
    if profile not in SEARCHES:
        raise UnknownName("profile of a search", profile, SEARCHES)
    return SEARCHES[profile]
