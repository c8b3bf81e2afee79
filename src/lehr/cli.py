"""The command line. Nothing heavy is imported before the options are read: `lehr --help` answers within a second."""

import sys
from typing import Any

import tyro

from lehr.commands import Evaluate, Figure2, Study, Train
from lehr.errors import InputError

_COMMANDS: dict[str, Any] = {"train": Train, "evaluate": Evaluate, "study": Study}
_STUDIES: dict[str, Any] = {"figure2": Figure2}


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; a fault of the user's is one sentence on standard error and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["study"]:
            # The placeholder is there because a choice of one would not be a subcommand.
            command = _choose(
                _STUDIES | {"list": Study}, "lehr study", "Figures and tables of the papers.", arguments[1:]
            )
        else:
            command = _choose(_COMMANDS, "lehr", "Evidence you can differentiate.", arguments)
        code = command.run(arguments)
    except InputError as error:
        print(f"lehr: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("lehr: stopped at once; the last checkpoint is kept", file=sys.stderr)
        code = 130
    sys.exit(code)


def _choose(commands: dict[str, Any], prog: str, description: str, arguments: list[str]) -> Any:
    return tyro.extras.subcommand_cli_from_dict(commands, prog=prog, description=description, args=arguments)


if __name__ == "__main__":
    main()
