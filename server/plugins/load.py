"""Loads plug-in files: what they register can be asked for by name afterwards."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from jaxserve.errors import ConfigError
from jaxserve.server.parser_api.abstract import ToolParser, ToolParserManager
from jaxserve.server.parser_api.class_registry import ParserRegistry
from jaxserve.server.parser_api.reasoning import ReasoningParserManager
from jaxserve.server.plugins.finder import PLUGIN_MODULES, PluginLoader, import_plugin_module

# Where vLLM keeps its registries, for plug-ins that were loaded with a real vLLM.
_REAL_MANAGERS = (
    ("vllm.tool_parsers.abstract_tool_parser", "ToolParserManager"),
    ("vllm.entrypoints.openai.tool_parsers.abstract_tool_parser", "ToolParserManager"),
    ("vllm.reasoning.abs_reasoning_parsers", "ReasoningParserManager"),
)

_RECORD = "__jaxserve_registered__"  # of a plug-in's module: what it registered, with each registry


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plug-in that was loaded."""

    module: ModuleType
    tool_parsers: tuple[str, ...]  # names that it registered
    reasoning_parsers: tuple[str, ...]

    def parser_classes(self) -> tuple[type[ToolParser], ...]:
        """The tool parsers that its file defines, registered or not."""
        return tuple(
            each
            for each in vars(self.module).values()
            if inspect.isclass(each)
            and issubclass(each, ToolParser)
            and each.__module__ == self.module.__name__
        )


def load_plugin(path: str | Path) -> Plugin:
    """Import a plug-in: a Python file, or the dotted name of an installed module.

    It may import vLLM's names (`vllm_names.py`) as if vLLM were installed, then and later.  What it registers
    replaces what had the same name.  A file is run once, however often it is asked for.

    Raises ConfigError with the plug-in's own error, and the line of the plug-in that it came from.
    """
    registries = (ToolParserManager.registry, ReasoningParserManager.registry)
    before = [registry.entries() for registry in registries]
    try:
        module = _module(str(path))
    except ConfigError:
        for registry, entries in zip(registries, before, strict=True):
            registry.restore(entries)
        raise
    if _RECORD not in vars(module):
        _adopt_from_real_vllm(module, *registries)
        for registry in registries:
            _find_lazy_classes(module, registry)
        vars(module)[_RECORD] = [
            {name: entry for name, entry in registry.entries().items() if old.get(name) is not entry}
            for registry, old in zip(registries, before, strict=True)
        ]
    for registry, entries in zip(registries, vars(module)[_RECORD], strict=True):
        registry.put(entries)
    return Plugin(module, *map(tuple, vars(module)[_RECORD]))


def load_plugins(*paths: str | None) -> None:
    """Import those plug-ins that are given.  Raises ConfigError as load_plugin does."""
    for path in paths:
        if path is not None:
            load_plugin(path)


def _module(path: str) -> ModuleType:
    file = Path(path).expanduser()
    if file.is_file():
        return _run_file(path, file.resolve())
    if all(part.isidentifier() for part in path.split(".")):
        return _import(path)
    raise ConfigError(
        f"plug-in {path}: there is no such file; give a Python file or an installed module's name"
    )


def _run_file(path: str, file: Path) -> ModuleType:
    name = _module_name(file)
    if name in sys.modules:
        return sys.modules[name]
    PLUGIN_MODULES.add_folder(file.parent)
    spec = importlib.util.spec_from_loader(name, PluginLoader(name, str(file), PLUGIN_MODULES))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pydantic look there for a class's module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"plug-in {path} cannot be imported: {_told(error, str(file))}") from error
    return module


def _import(name: str) -> ModuleType:
    PLUGIN_MODULES.add_package(name.partition(".")[0])
    try:
        return import_plugin_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(f"plug-in {name}: there is no such file, nor a module of that name") from error
        raise ConfigError(f"plug-in {name} cannot be imported: {_told(error)}") from error
    except Exception as error:
        raise ConfigError(f"plug-in {name} cannot be imported: {_told(error)}") from error


def _module_name(file: Path) -> str:
    """The name under which a file's module is known, not another file's."""
    name, number = f"jaxserve_plugin_{file.stem}", 1
    while name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(file):
        number += 1
        name = f"jaxserve_plugin_{file.stem}_{number}"
    return name


def _told(error: Exception, file: str | None = None) -> str:
    """An error in one line, with the last line of the plug-in's that led to it."""
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return what  # names file and line itself
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if file == frame.filename or (file is None and "importlib" not in frame.filename)
    ]
    return f"line {frames[-1].lineno} of {frames[-1].filename}: {what}" if frames else what


def _find_lazy_classes(module: ModuleType, registry: ParserRegistry) -> None:
    """vLLM's documentation lets a plug-in register its own class under a module that is not there: take it here."""
    for name, (home, class_name) in list(registry.lazy.items()):
        if home.startswith("vllm.") and isinstance(found := vars(module).get(class_name), type):
            registry.add(name, found, force=True)


def _adopt_from_real_vllm(module: ModuleType, tools: ParserRegistry, reasoning: ParserRegistry) -> None:
    """Take over what a plug-in registered with a real vLLM."""
    for home, manager_name in _REAL_MANAGERS:
        manager = getattr(sys.modules.get(home), manager_name, None)
        if manager is None or manager in (ToolParserManager, ReasoningParserManager):
            continue
        is_tools = manager_name == "ToolParserManager"
        registry = tools if is_tools else reasoning
        classes = manager.tool_parsers if is_tools else manager.reasoning_parsers
        lazy = getattr(manager, "lazy_parsers", {}).items()
        own = {name: getattr(module, cls) for name, (home, cls) in lazy if home == module.__name__}
        own |= {name: cls for name, cls in classes.items() if cls.__module__ == module.__name__}
        registry.classes.update(own)  # no subclasses of ours, but of the same interface
