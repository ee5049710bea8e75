"""The parameters that every notebook takes, checked before any work starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.experiments.items import PROFILES, Profile
from effspinenet_lib.files import ensure_folder
from effspinenet_lib.results import ResultsStore
from effspinenet_lib.training.accelerator import present_accelerators
from effspinenet_lib.training.devices import ACCELERATORS, AUTO, CPU

ENGINES = ("local",)
# Our choice: the paper's batches of 256 and more take days a step on a processor. The activations
# of two images of the largest own model, Eff-SpineNet-D2, take 5 GB in float32 (`plan` counts
# them), which a machine with 8 GB holds; a number that depended on the memory would make another
# run of the same command on another machine.
CPU_BATCH = 2


@dataclass(frozen=True)
class Parameters:
    """The parameters of a notebook, checked and resolved.

    `initial_weights` is no parameter of a notebook: the weights file that the paper's runs start
    from, in the place of the run that an item names.
    """

    profile: Profile
    data_root: Path | None
    results_dir: Path
    device: str
    devices: int
    seeds: tuple[int, ...]
    force: bool
    initial_weights: Path | None = None

    @property
    def paper_on_processor(self) -> bool:
        """Whether the paper's own settings are to be trained without an accelerator."""
        return self.profile.data is None and self.device == CPU


def default_results_dir() -> Path:
    """`results` of the checkout that the library is installed from, else of the current folder."""
    checkout = Path(__file__).resolve().parents[2]
    return (checkout if (checkout / "pyproject.toml").exists() else Path.cwd()) / "results"


def check_parameters(
    profile: str = "smoke",
    data_root: str | os.PathLike[str] | None = None,
    results_dir: str | os.PathLike[str] | None = None,
    accelerator: str = AUTO,
    devices: int | str = AUTO,
    seeds: str | int | Sequence[int] | None = None,
    engine: str = "local",
    force: bool = False,
) -> Parameters:
    """Check a notebook's parameters before any work starts; "" and None take the default.

    Args:
        profile: `smoke`, `proxy` or `paper`.
        data_root: folder of the data that the paper uses for an item's task, such as COCO 2017;
            only the `paper` profile reads it.
        results_dir: where the CSVs and runs go.
        accelerator: `auto`, `cpu`, `gpu` or `tpu`; `auto` takes an accelerator where there is
            one.
        devices: runs at once; `auto` is one for each processor core on a CPU. An accelerator
            takes one run at a time.
        seeds: such as "0,1,2", a number or a list; default the profile's own.
        engine: `local`.
        force: run again what is finished.

    Raises:
        UnknownName: an unknown profile, accelerator or engine.
        UserError: an accelerator that is not there, a seed or a number of devices that is none,
            a missing data root, a folder that cannot be written.
    """
    if profile not in PROFILES:
        raise UnknownName("profile", str(profile), PROFILES)
    if engine not in ENGINES:
        raise UnknownName("engine", str(engine), ENGINES)
    if not isinstance(force, bool):
        raise UserError(f"force is {force!r}; write True or False")
    device = find_device(accelerator)
    count = run_count(devices, device)
    numbers = _seed_list(seeds)
    chosen = PROFILES[profile]
    root = Path(data_root) if data_root else None
    if chosen.data is None and (root is None or not root.is_dir()):
        raise UserError(
            f"the profile {profile!r} trains on the paper's data (COCO 2017 for detection): set "
            "data_root to its folder" + (f" ({root} is none)" if root else "")
        )
    folder = Path(results_dir) if results_dir else default_results_dir()
    ensure_folder(ResultsStore(folder, profile).folder)
    return Parameters(
        chosen,
        root.resolve() if root else None,
        folder.resolve(),
        device,
        count,
        numbers or chosen.seeds,
        force,
    )


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_device(accelerator: str) -> str:
    """The kind of device that runs use: `cpu`, or an accelerator that is there.

    Raises:
        UnknownName: an unknown accelerator.
        UserError: it is not there.
    """
    if accelerator not in ACCELERATORS:
        raise UnknownName("accelerator", str(accelerator), ACCELERATORS)
    present = {CPU} | present_accelerators()
    if accelerator == AUTO:
        return next(iter(sorted(present - {CPU})), CPU)
    if accelerator not in present:
        there = ", ".join(sorted(present))
        raise UserError(f"accelerator {accelerator!r} is not on this machine; it has {there}")
    return accelerator


def run_count(devices: int | str, device: str) -> int:
    """Runs at once; `auto` is one for each processor core, or one on an accelerator.

    Raises:
        UserError: no positive number, or more than one on an accelerator.
    """
    if devices in (AUTO, ""):
        return usable_cores() if device == CPU else 1
    try:
        count = int(devices)
    except ValueError:
        count = 0
    if count < 1:
        raise UserError(f"devices is {devices!r}; give a positive number or 'auto'")
    if count > 1 and device != CPU:
        raise UserError(f"devices is {devices!r}; {device} takes one run at a time: give 1")
    return count


def _seed_list(seeds: str | int | Sequence[int] | None) -> tuple[int, ...]:
    if isinstance(seeds, str):
        values: list[str | int] = [part for part in seeds.split(",") if part.strip()]
    elif isinstance(seeds, int):
        values = [seeds]
    else:
        values = list(seeds or ())
    try:
        numbers = tuple(int(value) for value in values)
    except ValueError:
        numbers = (-1,)
    if any(number < 0 for number in numbers):
        raise UserError(f"seeds is {seeds!r}; give numbers from 0 up, such as '0,1,2'")
    return tuple(dict.fromkeys(numbers))
