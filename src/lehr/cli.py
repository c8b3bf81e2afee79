"""The command line. Nothing heavy is imported before the options are read: `lehr --help` answers within a second."""

import sys
from typing import Any

import tyro

from lehr.commands import Compare, Evaluate, Evidence, Figure1, Figure2, GradientNoise, Sticking, Study, Train
from lehr.errors import InputError
from lehr.mh_studies import STUDIES

_COMMANDS: dict[str, Any] = {
    "evidence": Evidence,
    "compare": Compare,
    "train": Train,
    "evaluate": Evaluate,
    "study": Study,
}
_STUDIES: dict[str, Any] = {
    "figure1": Figure1,
    "figure2": Figure2,
    "gradient-noise": GradientNoise,
    "sticking": Sticking,
    **STUDIES,
    "list": Study,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; a fault of the user's is one sentence on standard error and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = None
    try:
        command = parse(arguments)
        code = command.run(arguments)
    except InputError as error:
        print(f"lehr: {error}", file=sys.stderr)
        code = 2
    except OSError as error:
        place = error.filename or "a file"
        why = error.strerror or error
        print(f"lehr: cannot read or write {place} ({why}): check its permissions and the free space", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"lehr: stopped at once; {getattr(command, 'when_stopped', 'nothing was written')}", file=sys.stderr)
        code = 130
    sys.exit(code)


def parse(arguments: list[str]) -> Any:
    """The command, with its options (their ranges are checked when it runs); exits with 2 for unknown ones."""
    prog, commands, description = "lehr", _COMMANDS, "Evidence you can differentiate."
    if arguments[:1] == ["study"]:
        prog, commands, description = "lehr study", _STUDIES, "Figures and tables of the papers."
        arguments = arguments[1:]
    return tyro.extras.subcommand_cli_from_dict(commands, prog=prog, description=description, args=arguments)


if __name__ == "__main__":
    main()
