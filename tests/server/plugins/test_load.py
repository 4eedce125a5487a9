"""Plug-ins written for any vLLM load as they are; nobody else sees vLLM's names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from jaxserve.errors import ConfigError
from jaxserve.server.parser_api.abstract import ToolParser, ToolParserManager
from jaxserve.server.parser_api.reasoning import ReasoningParser, ReasoningParserManager
from jaxserve.server.plugins.errors import plugin_errors
from jaxserve.server.plugins.load import Plugin, load_plugin
from jaxserve.server.plugins.request import plugin_request

Load = Callable[[str], Plugin]

# What parsers of each time import.
ERAS = {
    "0.6": """
from vllm.entrypoints.openai.protocol import (ChatCompletionRequest, DeltaFunctionCall, DeltaMessage, DeltaToolCall,
    ExtractedToolCallInformation, FunctionCall, InitialDeltaToolCall, ToolCall)
from vllm.entrypoints.openai.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager
from vllm.entrypoints.openai.tool_parsers.utils import (consume_space, extract_intermediate_diff,
    find_common_prefix, is_complete_json, partial_json_loads)
from vllm.logger import init_logger
from vllm.transformers_utils.tokenizer import AnyTokenizer, MistralTokenizer
from vllm.utils import is_list_of, random_uuid
""",
    "0.10": """
import vllm.envs as envs
from vllm.entrypoints.chat_utils import make_tool_call_id, random_tool_call_id
from vllm.entrypoints.openai.protocol import ChatCompletionRequest, ChatCompletionToolsParam, DeltaMessage, ToolCall
from vllm.entrypoints.openai.tool_parsers import ToolParser, ToolParserManager
from vllm.logger import init_logger
from vllm.reasoning import ReasoningParser, ReasoningParserManager
from vllm.transformers_utils.tokenizers import MistralTokenizer
from vllm.utils import import_from_path
assert envs.VLLM_TOOL_PARSE_REGEX_TIMEOUT_SECONDS == 1
""",
    "0.12": """
from vllm.entrypoints.openai.protocol import ChatCompletionNamedToolChoiceParam, DeltaMessage, ResponsesRequest
from vllm.entrypoints.openai.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager
from vllm.reasoning.abs_reasoning_parsers import ReasoningParser, ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser
from vllm.logger import init_logger
from vllm.sampling_params import StructuredOutputsParams
from vllm.tokenizers import MistralTokenizer, TokenizerLike
from vllm.utils.collection_utils import is_list_of
from vllm.utils.import_utils import import_from_path
""",
    "0.20": """
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionToolsParam
from vllm.entrypoints.openai.engine.protocol import (DeltaFunctionCall, DeltaMessage, DeltaToolCall,
    ExtractedToolCallInformation, FunctionCall, ToolCall)
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.logger import init_logger
from vllm.tokenizers import TokenizerLike
from vllm.tool_parsers.abstract_tool_parser import Tool, ToolParser, ToolParserManager
from vllm.tool_parsers.utils import (UnexpectedAstError, compute_tool_delta, handle_single_tool, make_valid_python,
    partial_tag_overlap)
from vllm.utils.mistral import is_mistral_tokenizer
""",
    "0.33": """
from vllm.entrypoints.generate.base.protocol import DeltaMessage, ExtractedToolCallInformation
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.reasoning.deepseek_r1_reasoning_parser import DeepSeekR1ReasoningParser
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.tool_parsers import ToolParser, ToolParserManager
from vllm.tool_parsers.tool_strict_level import ToolStrictLevel
from vllm.tool_parsers.utils import (coerce_to_schema_type, extract_types_from_schema, find_tool_properties,
    rename_reserved_kwargs, safe_literal_eval)
""",
}
PARSER = """
logger = init_logger(__name__)

@ToolParserManager.register_module(["probe", "probe_too"])
class ProbeParser(ToolParser):
    def extract_tool_calls(self, model_output, request):
        from vllm.utils import random_uuid  # when it runs, long after it was loaded
        import importlib
        ids = importlib.import_module("vllm.entrypoints.chat_utils")
        return random_uuid(), ids.make_tool_call_id()
"""


def assert_no_trace() -> None:
    """vLLM cannot be imported, and nothing of it is left."""
    assert not [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]
    assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("jaxserve")]
    assert importlib.util.find_spec("vllm") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("vllm.tool_parsers")


@pytest.mark.parametrize("era", ERAS)
def test_every_era_loads_unchanged(era: str, load: Load) -> None:
    """Names are where they were then, and are the same classes everywhere."""
    plugin = load(ERAS[era] + PARSER)
    assert plugin.tool_parsers == ("probe", "probe_too")
    cls = ToolParserManager.get_tool_parser("probe_too")
    assert plugin.parser_classes() == (cls,)
    assert issubclass(cls, ToolParser)
    assert_no_trace()


def test_imports_when_it_runs(load: Load) -> None:
    """Import statements work for as long as the plug-in lives; nobody else gets anything by it."""
    load(ERAS["0.33"] + PARSER)
    parser = ToolParserManager.get_tool_parser("probe")(None)
    with plugin_errors(parser):  # as whoever drives it does
        uuid, call_id = cast(Any, parser).extract_tool_calls("", None)
    assert len(uuid) == 32
    assert call_id.startswith("chatcmpl-tool-")
    assert_no_trace()


def test_importlib_while_it_loads(load: Load) -> None:
    """Plug-ins may feel for their vLLM; libraries that they import may not find one."""
    plugin = load(
        """
import importlib, importlib.util, sys
new = importlib.util.find_spec("vllm.tool_parsers") is not None
none = importlib.util.find_spec("vllm.nothing_of_the_kind")
ToolParser = importlib.import_module("vllm.tool_parsers.abstract_tool_parser").ToolParser
import tests.server.plugins.feels_for_vllm as library
"""
    )
    assert plugin.module.new
    assert plugin.module.none is None
    assert plugin.module.ToolParser is ToolParser
    assert not plugin.module.library.HAS_VLLM
    assert_no_trace()


def test_falls_back_between_eras(load: Load) -> None:
    """What is not served is an ImportError, which says so."""
    plugin = load(
        """
try:
    from vllm.tool_parsers import NothingOfTheKind
except ImportError as error:
    message = str(error)
try:
    import vllm.worker.model_runner
except ModuleNotFoundError as error:
    other = str(error)
import vllm
from vllm import envs
version = vllm.__version__
"""
    )
    assert "'NothingOfTheKind'" in plugin.module.message
    assert "ToolParserManager" in plugin.module.message
    assert "vllm_names" in plugin.module.other
    assert plugin.module.version.count(".") == 2


def test_files_beside_it_are_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in may have its logic in modules and packages in its folder."""
    (tmp_path / "probe_helper.py").write_text("from vllm.tool_parsers import ToolParser\n")
    package = tmp_path / "probe_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "deep.py").write_text(
        "def late():\n    from vllm.utils import random_uuid\n    return random_uuid()\n"
    )
    file = tmp_path / "with_helper.py"
    file.write_text(
        "import os, sys\nsys.path.insert(0, os.path.dirname(__file__))\n"
        "from probe_helper import ToolParser\nfrom probe_package.deep import late\n"
        "from vllm.tool_parsers import ToolParserManager\n"
        "@ToolParserManager.register_module()\nclass Probe(ToolParser): pass\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    plugin = load_plugin(file)
    assert plugin.tool_parsers == ("Probe",)
    assert len(plugin.module.late()) == 32
    assert load_plugin(file).module is plugin.module
    assert load_plugin(str(file)).tool_parsers == ("Probe",)
    assert_no_trace()


def test_installed_module_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes a module's dotted name too; what is registered lazily is imported like the plug-in."""
    package = tmp_path / "probe_installed"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "register.py").write_text(
        "from vllm.tool_parsers import ToolParserManager\n"
        "ToolParserManager.register_lazy_module('lazy_probe', 'probe_installed.parser', 'Probe')\n"
    )
    (package / "parser.py").write_text(
        "from vllm.tool_parsers import ToolParser\nclass Probe(ToolParser): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_plugin("probe_installed.register").tool_parsers == ("lazy_probe",)
    assert ToolParserManager.get_tool_parser("lazy_probe").__module__ == "probe_installed.parser"
    assert_no_trace()
    with pytest.raises(ConfigError, match="no such file, nor a module"):
        load_plugin("probe_installed.nothing")


def test_registration_as_documented(load: Load) -> None:
    """vLLM's documentation registers a class of the plug-in's own under a module that does not exist."""
    load(
        "from vllm.tool_parsers import ToolParser, ToolParserManager\nclass Probe(ToolParser): pass\n"
        "ToolParserManager.register_lazy_module(name='documented', module_path='vllm.tool_parsers.documented', "
        "class_name='Probe')\n"
    )
    assert ToolParserManager.get_tool_parser("documented").__name__ == "Probe"


def test_deriving_from_vllms_own_parsers(load: Load) -> None:
    """They are the built-in formats' classes; what a plug-in changes is changed."""
    plugin = load(
        """
from vllm.entrypoints.openai.tool_parsers import Hermes2ProToolParser as Old
from vllm.entrypoints.openai.protocol import ChatCompletionRequest
from vllm.tool_parsers import ToolParserManager
from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser
from vllm.tool_parsers.qwen3coder_tool_parser import Qwen3CoderToolParser
assert Old is Hermes2ProToolParser

@ToolParserManager.register_module("shouting_hermes")
class Shouting(Hermes2ProToolParser):
    def extract_tool_calls(self, model_output, request):
        found = super().extract_tool_calls(model_output, request)
        for call in found.tool_calls:
            call.function.name = call.function.name.upper()
        return found
"""
    )
    assert plugin.tool_parsers == ("shouting_hermes",)
    parser = ToolParserManager.get_tool_parser("shouting_hermes")(None)
    request = plugin_request({"messages": []})
    found = parser.extract_tool_calls('<tool_call>{"name": "f", "arguments": {}}</tool_call>', request)
    assert [call.function.name for call in found.tool_calls] == ["F"]


def test_reasoning_parsers(load: Load) -> None:
    """A method can be called by its old and by its new name."""
    plugin = load(
        """
from vllm.reasoning import ReasoningParser, ReasoningParserManager
@ReasoningParserManager.register_module("old")
class Old(ReasoningParser):
    def extract_reasoning_content(self, model_output, request):
        return "thought", model_output
@ReasoningParserManager.register_module("new")
class New(Old):
    def extract_reasoning(self, model_output, request):
        reasoning, content = super().extract_reasoning(model_output, request)
        return reasoning.upper(), content
"""
    )
    assert plugin.reasoning_parsers == ("old", "new")
    for name, thought in (("old", "thought"), ("new", "THOUGHT")):
        parser: ReasoningParser = ReasoningParserManager.get_reasoning_parser(name)(None)
        request = None
        assert parser.extract_reasoning("x", request) == (thought, "x")  # pyright: ignore[reportArgumentType]  # unused
        assert parser.extract_reasoning_content("x", request) == (thought, "x")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("\n\nx = undefined_name\n", "line 3 of .*plugin.py: NameError: name 'undefined_name'"),
        ("def broken(:\n", "SyntaxError: .*plugin.py, line 1"),
        (
            "import no_such_package_anywhere\n",
            "line 1 of .*: ModuleNotFoundError: No module named 'no_such_package",
        ),
        ("def f():\n    raise ValueError('deep')\n\nf()\n", "line 2 of .*: ValueError: deep"),
        (
            "from vllm.tool_parsers import ToolParserManager\nToolParserManager.register_module('x', module=int)\n",
            "line 2 of .*: TypeError: .*derive it from ToolParser",
        ),
    ],
)
def test_failed_import_says_where(source: str, told: str, load: Load) -> None:
    """Start-up stops with the plug-in's own error and line; nothing stays registered."""
    before = ToolParserManager.list_registered()
    good = "from vllm.tool_parsers import ToolParser, ToolParserManager as M\nclass Half(ToolParser): pass\n"
    with pytest.raises(ConfigError, match=told):
        load(source)
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        load(f"{good}M.register_module(module=Half)\n1 / 0\n")
    assert ToolParserManager.list_registered() == before
    assert_no_trace()


def test_no_such_file() -> None:
    """A path that is none is an error."""
    with pytest.raises(ConfigError, match=r"/nowhere/plugin\.py: there is no such file"):
        load_plugin("/nowhere/plugin.py")


def test_real_vllm_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
    """Where vLLM is installed, plug-ins get it; what they register with it can be used here."""
    package = tmp_path / "site" / "vllm" / "tool_parsers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("real = True\n")
    (package / "__init__.py").write_text("from .abstract_tool_parser import ToolParser, ToolParserManager\n")
    (package / "abstract_tool_parser.py").write_text(
        "class ToolParser: pass\nclass ToolParserManager:\n    tool_parsers = {}\n"
        "    @classmethod\n    def register_module(cls, name):\n"
        "        return lambda parser: cls.tool_parsers.setdefault(name, parser)\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    plugin = load(
        "import vllm\nfrom vllm.tool_parsers import ToolParser, ToolParserManager\nassert vllm.real\n"
        "@ToolParserManager.register_module('of_real')\nclass Probe(ToolParser): pass\n"
    )
    assert plugin.tool_parsers == ("of_real",)
    assert ToolParserManager.get_tool_parser("of_real") is plugin.module.Probe
    for name in [each for each in sys.modules if each == "vllm" or each.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)


def test_registering(load: Load) -> None:
    """register_module as a decorator and as a call, by name, names or none, with and without force."""
    plugin = load(
        """
from vllm.tool_parsers import ToolParser, ToolParserManager
class A(ToolParser): pass
class B(ToolParser): pass
assert ToolParserManager.register_module(module=A) is A
ToolParserManager.register_module(["a", "aa"], True, A)
ToolParserManager.register_module("a", module=B)
"""
    )
    manager, a, b = ToolParserManager, plugin.module.A, plugin.module.B
    assert [manager.get_tool_parser(name) for name in ("A", "a", "aa")] == [a, b, a]
    assert {"A", "a", "aa"} <= set(manager.list_registered())
    assert manager.register_module("b", force=False)(b) is b  # pyright: ignore[reportCallIssue]  # is a decorator
    with pytest.raises(KeyError, match="registered already"):
        manager.register_module("b", force=False, module=a)
    with pytest.raises(TypeError, match="force"):
        manager.register_module("b", "yes", a)  # pyright: ignore[reportArgumentType]  # meant
    with pytest.raises(TypeError, match="name"):
        manager.register_module(7, module=a)  # pyright: ignore[reportArgumentType]  # meant
    with pytest.raises(KeyError, match="nobody"):
        manager.get_tool_parser("nobody")
