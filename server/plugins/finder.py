"""Lets plug-in code, and no other, import vLLM's names.

A plug-in's modules get an import statement of their own, through their `__builtins__`: it makes the modules of
`vllm_names.py` up, for as long as the plug-in lives, and puts none of them into sys.modules.  What else a plug-in
imports comes from where it always comes, but while it does, a meta-path finder (1) makes files that lie beside the
plug-in part of it, and (2) answers importlib's functions when plug-in code calls them.

Where a real vLLM is installed, plug-ins get that one.
"""

from __future__ import annotations

import builtins
import importlib
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxserve.server.plugins.vllm_names import MODULES, is_served, is_vllm, members

_LIST = "jaxserve.server.plugins.vllm_names"


class PluginModules:
    """vLLM's modules as plug-ins see them, and the code that counts as plug-ins."""

    def __init__(self) -> None:
        self.builtins = {**vars(builtins), "__import__": self._import}
        self._made: dict[str, ModuleType] = {}
        self._folders: set[Path] = set()
        self._packages: set[str] = set()
        self._finder = _Finder(self)
        self._depth = threading.local()

    def add_folder(self, folder: Path) -> None:
        """Modules and packages that lie in `folder` are plug-in code from now on."""
        self._folders.add(folder)

    def add_package(self, name: str) -> None:
        """The installed package or module `name` is plug-in code from now on."""
        self._packages.add(name)

    def owns(self, name: str, spec: ModuleSpec) -> bool:
        """Whether a module that was found is plug-in code."""
        top = name.partition(".")[0]
        if top in self._packages or vars(sys.modules.get(top, object)).get("__builtins__") is self.builtins:
            return True
        if name != top or spec.origin is None:
            return False
        file = Path(spec.origin)
        return (file.parent.parent if file.name == "__init__.py" else file.parent) in self._folders

    def is_asking(self) -> bool:
        """Whether the import that is going on was asked for by plug-in code, through importlib's functions."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__", "").startswith((__name__, "importlib")):
            frame = frame.f_back
        return frame is not None and frame.f_builtins is self.builtins

    def module(self, name: str) -> ModuleType:
        """One of vLLM's modules.  Raises ModuleNotFoundError for those that are not served."""
        if name not in self._made:
            if not is_served(name):
                raise ModuleNotFoundError(
                    f"No module named {name!r}: plug-ins get those of vLLM's modules that {_LIST} lists",
                    name=name,
                )
            module = self._made[name] = ModuleType(name, "Names of vLLM's, made of jaxserve's own.")
            module.__path__ = []
            module.__package__ = name
            vars(module).update(members(name))
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(self.module(parent), last, module)
        return self._made[name]

    @contextmanager
    def finding(self) -> Generator[None]:
        """While this lasts, the finder is among those of sys.meta_path."""
        self._forget()
        self._depth.value = getattr(self._depth, "value", 0) + 1
        if self._depth.value == 1:
            sys.meta_path.insert(0, self._finder)
        try:
            yield
        finally:
            self._depth.value -= 1
            if self._depth.value == 0:
                sys.meta_path.remove(self._finder)
            self._forget()

    def _forget(self) -> None:
        """Take out of sys.modules what importlib put there."""
        if self._finder.has_found:
            self._finder.has_found = False
            for name, module in self._made.items():
                if sys.modules.get(name) is module:
                    del sys.modules[name]

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """The import statement of plug-in code."""
        if level or not is_vllm(name) or has_real_vllm():
            there = None if level else sys.modules.get(name)
            if there is not None and all(hasattr(there, each) for each in fromlist or ()):
                return builtins.__import__(name, globals, locals, fromlist or ())
            with self.finding():
                return builtins.__import__(name, globals, locals, fromlist or (), level)
        module = self.module(name)
        for each in fromlist or ():
            if each != "*" and not hasattr(module, each):
                if not is_served(f"{name}.{each}"):
                    known = ", ".join(sorted(MODULES.get(name, {}))) or "none"
                    raise ImportError(
                        f"cannot import name {each!r} from {name!r}: plug-ins get these names of it: {known}",
                        name=name,
                    )
                self.module(f"{name}.{each}")
        return module if fromlist else self.module("vllm")


def has_real_vllm() -> bool:
    """Whether vLLM is installed, not counting a folder that happens to have its name."""
    spec = PathFinder.find_spec("vllm")
    return spec is not None and spec.loader is not None and spec.origin is not None


class _Finder(MetaPathFinder):
    def __init__(self, modules: PluginModules) -> None:
        self._modules = modules
        self.has_found = False  # something that is in sys.modules now

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A module of vLLM's, if plug-in code asks; a module of the plug-in's own, with its import statement."""
        if is_vllm(fullname):
            if is_served(fullname) and self._modules.is_asking() and not has_real_vllm():
                self.has_found = True
                return ModuleSpec(fullname, _MadeLoader(self._modules), is_package=True)
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return None
        if not self._modules.owns(fullname, spec):
            return None
        spec.loader = PluginLoader(fullname, spec.loader.path, self._modules)
        return spec


class _MadeLoader(Loader):
    def __init__(self, modules: PluginModules) -> None:
        self._modules = modules

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module, complete."""
        return self._modules.module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do."""


class PluginLoader(SourceFileLoader):
    """Runs a file as plug-in code."""

    def __init__(self, fullname: str, path: str, modules: PluginModules) -> None:
        super().__init__(fullname, path)
        self._modules = modules

    def exec_module(self, module: ModuleType) -> None:
        """Run the file with the plug-ins' import statement."""
        vars(module)["__builtins__"] = self._modules.builtins
        with self._modules.finding():
            super().exec_module(module)


PLUGIN_MODULES = PluginModules()  # one for the process, like sys.modules


def import_plugin_module(name: str) -> Any:
    """Import a module with the finder in place, as a plug-in does."""
    with PLUGIN_MODULES.finding():
        return importlib.import_module(name)
