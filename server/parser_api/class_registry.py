"""Names of parsers: the part that tool and reasoning parsers' registries and managers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from jaxserve.errors import ConfigError

Format = TypeVar("Format")


class ParserRegistry:
    """Names and the classes that stand behind them, found by name at once or imported when first asked for.

    `kind` says in messages what is registered ("tool parser"), and `base` is what every class derives from.
    A class registered later replaces an earlier one of the same name, unless `force` is false.  `builtin` gives
    the classes that are there without being registered, by name, and `builtin_names` their names.
    """

    def __init__(
        self,
        kind: str,
        base: type,
        builtin: Callable[[str], type | None] = lambda name: None,
        builtin_names: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self.kind = kind
        self.base = base
        self._builtin = builtin
        self._builtin_names = builtin_names
        self.classes: dict[str, type] = {}
        self.lazy: dict[str, tuple[str, str]] = {}  # name: module and class

    def get(self, name: str) -> type:
        """The class of a name.

        Raises:
            KeyError: nobody registered the name.
            ImportError, AttributeError, TypeError: what was registered lazily is not there, or no parser.
        """
        if name not in self.classes:
            if name not in self.lazy:
                builtin = self._builtin(name)
                if builtin is not None:
                    return builtin
                raise KeyError(f"{self.kind} {name!r} is not registered; there are {', '.join(self.names())}")
            from jaxserve.server.plugins.finder import import_plugin_module  # serves this package to plug-ins

            module, class_name = self.lazy[name]
            self.add(name, getattr(import_plugin_module(module), class_name), force=True)
        return self.classes[name]

    def has(self, name: str) -> bool:
        """Whether the name is registered."""
        return name in self.classes or name in self.lazy

    def found(self, name: str) -> type:
        """`get`, for those who start a server.  Raises ConfigError with whatever is wrong."""
        try:
            return self.get(name)
        except (KeyError, ImportError, AttributeError, TypeError) as error:
            raise ConfigError(f"{self.kind} {name!r}: {type(error).__name__}: {error}") from error

    def add(self, name: str, cls: type, *, force: bool) -> None:
        """Register a class.  Raises KeyError for a name in use unless `force`, TypeError for no parser."""
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise TypeError(f"{cls!r} cannot be a {self.kind}: derive it from {self.base.__name__}")
        if not force and self.has(name):
            raise KeyError(f"{self.kind} {name!r} is registered already; give another name, or force=True")
        self.lazy.pop(name, None)
        self.classes[name] = cls

    def add_lazy(self, name: str, module: str, class_name: str) -> None:
        """Register a class that is imported when it is first asked for."""
        self.classes.pop(name, None)
        self.lazy[name] = (module, class_name)

    def register(
        self, name: str | list[str] | None, force: bool, cls: type | None
    ) -> type | Callable[[type], type]:
        """vLLM's `register_module`: registers `cls`, or gives a decorator that registers what it decorates.

        Raises TypeError for arguments of other types, and what `add` raises.
        """
        if not isinstance(force, bool):
            raise TypeError(f"force must be a bool, not {force!r}")
        if not (name is None or isinstance(name, str) or _is_names(name)):
            raise TypeError(f"name must be a str, a list of str or None, not {name!r}")

        def put(cls: type) -> type:
            for each in [name or cls.__name__] if name is None or isinstance(name, str) else name:
                self.add(each, cls, force=force)
            return cls

        return put if cls is None else put(cls)

    def entries(self) -> dict[str, type | tuple[str, str]]:
        """What is registered now: by name, the class, or its module and its name."""
        return {**self.lazy, **self.classes}

    def put(self, entries: Mapping[str, type | tuple[str, str]]) -> None:
        """Register what `entries` gave."""
        for name, entry in entries.items():
            self.classes.pop(name, None)
            self.lazy.pop(name, None)
            if isinstance(entry, tuple):
                self.lazy[name] = entry
            else:
                self.classes[name] = entry

    def restore(self, entries: Mapping[str, type | tuple[str, str]]) -> None:
        """Register what `entries` gave, and nothing else."""
        self.classes.clear()
        self.lazy.clear()
        self.put(entries)

    def names(self) -> list[str]:
        """Every registered name, in order."""
        return sorted({*self.classes, *self.lazy, *self._builtin_names()})


def format_named(name: str, formats: Mapping[str, Format], setting: str, registry: ParserRegistry) -> Format:
    """The built-in format of that name.  Raises ConfigError, with all names of `setting`, if there is none."""
    if name not in formats:
        known = ", ".join(registry.names())
        raise ConfigError(f"{setting}={name!r}: there is no such parser; use one of {known}")
    return formats[name]


def class_of_format(name: str, base: type, **attributes: Any) -> type:
    """The class of a built-in format: "deepseek_v3" of ToolParser is DeepseekV3ToolParser."""
    words = "".join(word.capitalize() for word in name.replace("-", "_").split("_"))
    kind = base.__name__.removeprefix("Declared")
    return type(f"{words}{kind}", (base,), {"__doc__": f"Reads {name}.", **attributes})


class ParserManager:
    """What vLLM's two managers share; a subclass brings the registry, which belongs to the process, as in vLLM."""

    registry: ClassVar[ParserRegistry]

    @classmethod
    def register_module(
        cls, name: str | list[str] | None = None, force: bool = True, module: type | None = None
    ) -> type | Callable[[type], type]:
        """Register `module`, or what this call decorates, under a name, several names or its own name.

        Raises KeyError for a name in use when `force` is false, TypeError for what is no such parser.
        """
        return cls.registry.register(name, force, module)

    @classmethod
    def register_lazy_module(cls, name: str, module_path: str, class_name: str) -> None:
        """Register a class that is imported when it is first asked for."""
        cls.registry.add_lazy(name, module_path, class_name)

    @classmethod
    def list_registered(cls) -> list[str]:
        """Every registered name, in order."""
        return cls.registry.names()


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)
