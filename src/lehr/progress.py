"""A progress bar on standard error, with a line on what is known so far."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress as RichProgress, TextColumn, TimeElapsedColumn


class Progress:
    """Work done out of `total`, and a line of text; a context manager that shows nothing unless `show`."""

    def __init__(self, total: int, *, show: bool):
        columns = (BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
        self._bar = RichProgress(
            *columns, TextColumn("{task.description}"), console=Console(stderr=True), disable=not show
        )
        self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.stop()

    def at(self, done: int, text: str) -> None:
        """Shows that `done` of the total is done, and the text."""
        self._bar.update(self._task, completed=done, description=text)
