"""`lehr train`: options to a run, with a progress bar, and a report at the end."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lehr.errors import InputError
from lehr.vae import data as image_data, session
from lehr.vae.run_folder import RunFolder
from lehr.vae.setting import Setting

if TYPE_CHECKING:
    from lehr.commands import Train


def train(options: "Train", arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit code. Raises `InputError` for faults of the user's."""
    console = Console(stderr=True)
    if options.resume is None:
        setting = _setting_of(options)
        if (options.data == "npz") != (options.file is not None):
            raise InputError("--data npz and --file go together: give both or neither")
        data = image_data.load(options.data, options.data_dir, file=options.file)
        if setting.batch_size > len(data.train):
            raise InputError(
                f"a batch of {setting.batch_size} is larger than the {len(data.train)} training images: "
                f"give --batch-size {len(data.train)} or less"
            )
        folder = RunFolder.create(
            options.out or _free_folder(data.name, setting.objective), _config(setting, options, data)
        )
    else:
        folder = RunFolder.open(options.resume)
        _check_resumed(options, arguments, folder)
        setting, data = load_run(folder, options.data_dir)
    say(
        console,
        f"{data.name}: {len(data.train):,} images to train, {len(data.test):,} to test; objective {setting.objective}; "
        f"folder {folder.path}",
    )
    try:
        rates = _run_with_progress(setting, data, folder, resume=options.resume is not None, console=console)
    except session.Interrupted as interrupted:
        say(console, f"{interrupted}; go on with: lehr train --resume {shlex.quote(str(folder.path))}")
        return 130
    from lehr.vae.report import write_report

    print(write_report(folder, setting, data, session.images_per_second(rates)))
    return 0


def say(console: Console, sentence: str) -> None:
    """Prints a sentence as it is: Rich would break paths at the edge, and take brackets in them for markup."""
    console.print(sentence, soft_wrap=True, markup=False, highlight=False)


def _run_with_progress(
    setting: Setting, data: image_data.ImageData, folder: RunFolder, *, resume: bool, console: Console
) -> list[float]:
    rates: list[float] = []
    columns = (
        TextColumn("epoch {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("bound {task.fields[train]} (test {task.fields[test]}) nats  {task.fields[rate]} images/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=setting.epochs, train="-", test="-", rate="-")

        def on_epoch(row: dict[str, Any], rate: float) -> None:
            rates.append(rate)
            progress.update(
                task,
                completed=row["epoch"],
                train=f"{row['train_bound']:.2f}",
                test=f"{row['test_bound']:.2f}",
                rate=f"{rate:,.0f}",
            )
            # A file or a pipe shows no bar: give it a line an epoch, not too many.
            if not console.is_terminal and (row["epoch"] % max(1, setting.epochs // 20) == 0):
                say(
                    console,
                    f"epoch {row['epoch']}/{setting.epochs}  bound {row['train_bound']:.3f}  "
                    f"test {row['test_bound']:.3f}  {rate:,.0f} images/s",
                )

        session.run(
            setting, data, folder, resume=resume, on_epoch=on_epoch, say=lambda fault: say(console, f"lehr: {fault}")
        )
        progress.update(task, completed=setting.epochs)
    return rates


def _setting_of(options: "Train") -> Setting:
    return Setting(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Setting)})


def _config(setting: Setting, options: "Train", data: image_data.ImageData) -> dict[str, Any]:
    return {
        "setting": dataclasses.asdict(setting),
        "data": {
            "name": data.name,
            "file": None if options.file is None else str(options.file.absolute()),
            "fingerprint": data.fingerprint,
        },
        "versions": {"lehr": version("lehr"), "jax": version("jax"), "python": sys.version.split()[0]},
    }


def load_run(folder: RunFolder, data_dir: Path | None) -> tuple[Setting, image_data.ImageData]:
    """Setting and data of an existing run. Raises `InputError` if the data are not those it was trained on."""
    setting, name, file, fingerprint = _parsed_config(folder)
    what = f"the data set {name!r}"
    if file is not None:
        file = file if data_dir is None else data_dir / file.name
        what = f"the array file {file}"
        if not file.is_file():
            raise InputError(
                f"{what} of the run {folder.path} is not there: put it back, or name its folder with --data-dir"
            )
    data = image_data.load(name, data_dir, file=file)
    if data.fingerprint != fingerprint:
        raise InputError(
            f"{what} is not what the run {folder.path} was trained on: put that back, or train anew with another --out"
        )
    return setting, data


def _parsed_config(folder: RunFolder) -> tuple[Setting, str, Path | None, str]:
    """Setting, and name, file and fingerprint of the data."""
    config = folder.config()
    try:
        data = config["data"]
        file = None if data["file"] is None else Path(data["file"])
        return Setting(**config["setting"]), data["name"], file, data["fingerprint"]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder.path}/config.json is not one that lehr train wrote ({error}): restore it, or train anew"
        ) from error


def _check_resumed(options: "Train", arguments: Sequence[str], folder: RunFolder) -> None:
    """Raises `InputError` for an option that was given and differs from the run's."""
    given = {
        argument.split("=")[0].lstrip("-").replace("-", "_") for argument in arguments if argument.startswith("--")
    }
    if "out" in given:
        raise InputError("--out does not go with --resume: a run is resumed in its own folder")
    setting, data, file, _ = _parsed_config(folder)
    stored = {**dataclasses.asdict(setting), "data": data, "file": file}
    for name in sorted(given & stored.keys()):
        value = getattr(options, name)
        if (value.absolute() if isinstance(value, Path) else value) != stored[name]:
            raise InputError(
                f"--{name.replace('_', '-')} {value} differs from {stored[name]} of the run "
                f"{folder.path}: resume without it, or train anew with --out"
            )


def _free_folder(name: str, objective: str) -> Path:
    """runs/NAME-OBJECTIVE, or with the first number that is free."""
    first = Path("runs") / f"{name}-{objective}"
    numbered = (first.with_name(f"{first.name}-{number}") for number in range(2, 10_000))
    return next(path for path in (first, *numbered) if not path.exists())
