"""Where a study goes that needs no trained run: a folder with its numbers and its picture."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from lehr.vae.run_folder import to_json, write_faults


def write(out: Path, name: str, result: dict[str, Any], figure: Figure, *, to_stdout: bool) -> None:
    """Writes NAME.json and NAME.png into `out`, and the numbers to standard output if asked for.

    Raises `lehr.errors.InputError` where it cannot write.
    """
    with write_faults(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(to_json(result, indent=2) + "\n")
        figure.savefig(out / f"{name}.png", dpi=110)
    if to_stdout:
        print(to_json(result))
    text = f"{name}.json and {name}.png are in {out}"
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
