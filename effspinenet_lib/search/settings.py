"""How much a search trains under each profile."""

from __future__ import annotations

from dataclasses import dataclass

from effspinenet_lib.choices.learned import betas_text
from effspinenet_lib.data import DataConfig
from effspinenet_lib.errors import UnknownName
from effspinenet_lib.recipes import get_recipe
from effspinenet_lib.training.config import RunConfig

HELD_OUT = "search"  # split of ShapeScenes that no training and no table sees


@dataclass(frozen=True)
class SearchSettings:
    """The search of a profile.

    Attributes:
        profile: `smoke` or `proxy`.
        model: scale-permuted model that a trial trains with the betas of its sample.
        image_size: side of the square input in pixels.
        data: what a trial is trained and, on the held-out split, evaluated on.
        recipe: name of the recipe of a trial.
        methods: those of `all`.
        trials: samples of each method.
        batch: samples between two updates of a method.
        timeout: seconds after which an attempt at a trial counts as hung.
    """

    profile: str
    model: str
    image_size: int
    data: DataConfig
    recipe: str
    methods: tuple[str, ...]
    trials: int
    batch: int
    timeout: float

    def config(self, betas: tuple[int, ...], seed: int) -> RunConfig:
        """The run of a trial."""
        return RunConfig(
            model=self.model,
            task="detection",
            image_size=self.image_size,
            data=self.data,
            recipe=get_recipe(self.recipe),
            seed=seed,
            model_options={"betas": betas_text(betas)},
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of a trial."""
        return get_recipe(self.recipe).steps

    @property
    def description(self) -> str:
        """What a trial is, in a few words."""
        data = self.data
        return (
            f"{self.model}, {data.format} {data.train_split}/{data.eval_split} "
            f"{data.train_images}/{data.eval_images} images, {self.image_size}x{self.image_size}, "
            f"{self.recipe}"
        )


SEARCHES: dict[str, SearchSettings] = {
    settings.profile: settings
    for settings in (
        SearchSettings(
            "smoke",
            model="eff_spinenet_m0",
            image_size=64,
            data=DataConfig(
                "shapescenes",
                eval_split=HELD_OUT,
                train_images=16,
                eval_images=4,
                image_size=64,
            ),
            recipe="smoke_search",
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
                "shapescenes",
                eval_split=HELD_OUT,
                train_images=2000,
                eval_images=300,
                image_size=96,
            ),
            recipe="proxy_search",
            methods=("ppo", "random", "evolution"),
            trials=50,
            batch=10,  # our choice: five updates
            timeout=900,  # our choice: twenty times what a trial takes
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
