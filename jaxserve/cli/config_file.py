"""`--config FILE.yaml`: defaults for a command's flags, which the command line may overrule."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from typing import Any

from jaxserve.cli.vllm_flags import NEEDLESS, REFUSED, VllmFlag, told
from jaxserve.errors import ConfigError


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    """Add --config to a command."""
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="read flags from a YAML file, key = flag name; the command line wins",
    )


def apply_config_file(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """If `argv` names a --config file, turn its entries into defaults of `parser`.

    Raises ConfigError for a file that cannot be read, a key that is no flag, a value that the flag refuses.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    try:
        path = finder.parse_known_args(argv)[0].config
    except argparse.ArgumentError:
        return  # --config without a value: the full parser says so in its own words
    if path is None:
        return
    actions = _actions_by_key(parser)
    noted = argparse.Namespace()
    for key, value in _read(path).items():
        name = str(key).replace("_", "-").lstrip("-")
        action = actions.get(name)
        if action is None or name in ("config", "help"):
            near = difflib.get_close_matches(name, actions, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{path}: {key!r} is not a flag of this command{hint}")
        if isinstance(action, VllmFlag):
            said = f"{path}: {key}: {value}"
            action.see(noted, _switched(name, value) if action.option.is_switch else value, said)
            continue
        parser.set_defaults(**{action.dest: _convert(path, name, action, value)})
    parser.set_defaults(**{kind: told(noted, kind) for kind in (REFUSED, NEEDLESS)})


def _read(path: str) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: must hold `flag: value` lines, not a {type(content).__name__}")
    return content


def _actions_by_key(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Flag names without dashes, and the names of positional arguments."""
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:  # argparse offers no public list of a parser's arguments
        for option in action.option_strings:
            if option.startswith("--"):
                actions[option[2:]] = action
        if not action.option_strings:
            actions[action.dest] = action
    return actions


def _convert(path: str, name: str, action: argparse.Action, value: Any) -> Any:
    is_switch = action.nargs == 0
    if is_switch:
        if not isinstance(value, bool):
            raise ConfigError(f"{path}: {name}: {value!r} must be true or false")
        if isinstance(action, argparse.BooleanOptionalAction):
            return _switched(name, value)
        return action.const if value else not action.const  # of a store_false, const is False
    if value is None:
        return None
    if action.nargs in ("+", "*"):
        return [_one(path, name, action, item) for item in (value if isinstance(value, list) else [value])]
    return _one(path, name, action, value)


def _switched(name: str, value: bool) -> bool:
    """What a switch is set to: `no-x: true` is `x: false`."""
    return value != name.startswith("no-")


def _one(path: str, name: str, action: argparse.Action, value: Any) -> Any:
    text = json.dumps(value) if isinstance(value, dict | list | bool) else str(value)
    convert = action.type if callable(action.type) else str
    try:
        converted = convert(text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        detail = str(error) if isinstance(error, argparse.ArgumentTypeError) else f"{text!r} is not valid"
        raise ConfigError(f"{path}: {name}: {detail}") from error
    if action.choices is not None and converted not in action.choices:
        raise ConfigError(f"{path}: {name}: {text!r} must be one of {', '.join(map(str, action.choices))}")
    return converted
