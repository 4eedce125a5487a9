"""Chat templates can do what transformers lets them do, and cannot run away."""

from typing import Any

import jinja2
import pytest
from jinja2.exceptions import SecurityError

from jaxserve.text import template_limits, template_sandbox
from jaxserve.text.template_limits import TemplateLimitError
from jaxserve.text.template_sandbox import TemplateEnvironment, render
from tests.patience import PATIENCE


@pytest.fixture(autouse=True)
def no_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is stopped for the processor's time, of which a slow machine takes more, unless it says so."""
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", PATIENCE)


def rendered(source: str, **variables: Any) -> str:
    return render(TemplateEnvironment().from_string(source), variables)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("  {% if true %}\na\n  {% endif %}\nb", "a\nb"),
        (
            "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}"
            "{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        (
            "{% for i in x %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}",
            "1/2False 2/2True ",
        ),
        ("{% for i in x if i > 1 %}{{ i }}{% else %}none{% endfor %}", "2"),
        ("{% for i in nothing %}{{ i }}{% else %}none{% endfor %}", "none"),
        ("{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}", "<é>1"),
        ("{% for i in x|map('string') %}{{ i }}{% endfor %}", "12"),
        ("{{ d | tojson }}", '{"<é>": 1}'),
        ("{{ d | tojson(indent=1) }}", '{\n "<é>": 1\n}'),
        ("{{ d | tojson(ensure_ascii=true, separators=(',', ':')) }}", '{"<\\u00e9>":1}'),
        ("{{ 'a' ~ 1 ~ x }}", "a1[1, 2]"),
        ("{{ {'a': x, 'b': (x, 1)} }}", "{'a': [1, 2], 'b': ([1, 2], 1)}"),
        ("{{ 'b-a'.split('-')|sort|join('+') }}{{ ', '.join(x|map('string')) }}", "a+b1, 2"),
        ("{{ 'a.b'|replace('.', '') }}{{ 'aaa'.replace('a', 'b', 2) }}{{ 'a\nb'|indent(2) }}", "abbbaa\n  b"),
        (
            "{{ 'x'|center(3) }}|{{ 'x'.ljust(2) }}|{{ '{:>3}'.format(7) }}|{{ '%s' | format(x) }}",
            " x |x |  7|[1, 2]",
        ),
        ("{{ x|batch(1)|list }}{{ x|slice(2)|list }}{{ 1.25|round(1) }}", "[[1], [2]][[1], [2]]1.2"),
        ("{{ [{'a': 'p'}, {'a': 'q'}]|join('-', attribute='a') }}", "p-q"),
        ("{% set a, b = x %}{{ b }}{{ a }}", "21"),
        (
            "{% for i in x %}{{ 'aa'.replace('a', 'b', 1) }}{{ 'x'.center(3) }}{{ '-'.join(['1', '2']) }}{% endfor %}",
            "ba x 1-2" * 2,
        ),
        ("{% block a %}{{ 'aa'.replace('a', 'b') }}{% endblock %}{{ '{}'.format(1) }}", "bb1"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("{% set ns = namespace(n=1) %}{% for i in x %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "4"),
        ("{{ '<b>' }}{{ '%02d' % 7 }}{{ 7 % 4 }}{{ 2 ** 3 }}{{ '-' * 3 }}", "<b>0738---"),
        ("{% macro m(y) %}{% for i in y %}{{ i }}{% endfor %}{% endmacro %}{{ m(x) }}", "12"),
        ("{% for n in t recursive %}{{ n[0] }}{{ loop(n[1]) }}{% endfor %}", "abc"),
    ],
)
def test_what_templates_do(source: str, text: str) -> None:
    variables = {"x": [1, 2], "d": {"<é>": 1}, "t": [("a", [("b", [])]), ("c", [])]}
    assert rendered(source, **variables) == text


def test_the_date_is_to_be_had() -> None:
    assert len(rendered("{{ strftime_now('%Y-%m-%d') }}")) == 10


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ x.append(1) }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ 'a'.encode() }}",
        "{{ 'a'.translate({97: 'b'}) }}",
        "{{ (1).to_bytes(1000000000) }}",
        "{{ x['__class__'].x }}",
        "{{ (x|attr('__class__')).x }}",
        "{{ '{0.__class__.x}'.format(x) }}",
        "{{ self.__init__.x }}",
        "{{ self._TemplateReference__context.x }}",
    ],
)
def test_there_is_no_way_out(source: str) -> None:
    with pytest.raises(SecurityError):
        rendered(source, x=[])


NEST = "{% set ns = namespace(x=['x']) %}{% for i in range(60) %}{% set ns.x = GROWN %}{% endfor %}"

RUNNING_AWAY = [
    ("{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}", "takes more than 40,000 steps"),
    ("{% for i in r %}{% for j in r|map('abs') %}{% endfor %}{% endfor %}", "40,000 steps"),
    ("{% for i in r recursive %}{% if loop.depth < 3 %}{{ loop(r) }}{% endif %}{% endfor %}", "steps"),
    (
        "{% macro m() %}{% for i in r %}{% endfor %}{% endmacro %}{% for i in r %}{{ m() }}{% endfor %}",
        "steps",
    ),
    (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "steps",
    ),
    ("{{ ([{}] * 99999)|selectattr('a')|list }}", "40,000 steps"),
    ("{{ ([1] * 99999)|map('abs')|list|length }}", "40,000 steps"),
    ("{{ ([r] * 99999)|sum(start=[])|length }}", "makes a value of"),
    ("{% for i in r %}{{ long }}{% endfor %}", "writes more than 16,000,000 characters"),
    ("{% set x %}{% for i in r %}{{ long }}{% endfor %}{% endset %}", "makes a value of 200,000,000"),
    ("{% macro m() %}{% for i in r %}{{ long }}{% endfor %}{% endmacro %}{{ m() }}", "makes a value of"),
    ("{{ 'a' * 1000000000 }}", "makes a value of 1,000,000,000"),
    ("{{ 1000000000 * [1] }}", "makes a value of 1,000,000,000"),
    ("{{ 10 ** 1000000000 }}", "makes a number of"),
    ("{{ 10 ** 4000 * 10 ** 4000 }}", "makes a number of"),
    ("{{ '%1000000000d' % 1 }}", "pads with"),
    ("{{ '%*d' % (1000000000, 1) }}", "pads with"),
    ("{{ '%1000000000d' | format(1) }}", "pads with"),
    ("{{ '{:1000000000}'.format(1) }}", "pads with"),
    ("{{ '{:{}}'.format(1, 1000000000) }}", "pads with"),
    ("{{ 'a'.center(1000000000) }}", "makes a value of 1,000,000,000"),
    ("{{ 'a'.zfill(1000000000) }}", "makes a value of 1,000,000,000"),
    ("{{ '\t'.expandtabs(1000000000) }}", "makes a value of"),
    ("{{ long.replace('x', long) }}", "makes a value of"),
    ("{{ long.replace('', long) }}", "makes a value of"),
    ("{{ long.join(r|map('string')) }}", "makes a value of 200,00"),
    ("{{ long|replace('x', long) }}", "makes a value of"),
    ("{{ r|join(long) }}", "makes a value of"),
    ("{{ r|map(attribute='real')|join(long) }}", "makes a value of"),
    ("{{ 'a'|center(1000000000) }}", "makes a value of 1,000,000,000"),
    ("{{ 'a\nb'|indent(1000000000) }}", "makes a value of"),
    ("{{ r|batch(1000000000, 0)|list }}", "makes a value of 1,000,000,000"),
    ("{{ r|slice(1000000000)|list }}", "makes a value of 1,000,000,000"),
    ("{{ r|tojson(indent=1000000000) }}", "fills up with 1,000,000,000"),
    ("{{ r|tojson(separators=(long, ':')) }}", "fills up with 100,000"),
    ("{{ 1.5|round(1000000000, 'ceil') }}", "fills up"),
    (NEST.replace("GROWN", "ns.x ~ ns.x") + "{{ ns.x }}", "makes a value of"),
    (NEST.replace("GROWN", "ns.x + ns.x") + "{{ ns.x }}", "makes a value of"),
    (NEST.replace("GROWN", "[ns.x, ns.x]") + "{{ ns.x }}", "nests more than 20,000 values"),
    (NEST.replace("GROWN", "(ns.x, ns.x)") + "{{ ns.x|string }}", "nests more than"),
    (NEST.replace("GROWN", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x|tojson }}", "nests more than"),
    (NEST.replace("GROWN", "dict(a=ns.x, b=ns.x)") + "{{ ns.x|tojson }}", "nests more than"),
    (NEST.replace("GROWN", "dict(a=ns.x, b=ns.x)") + "{{ 'x' ~ ns.x }}", "nests more than"),
    (NEST.replace("GROWN", "dict(a=ns.x, b=ns.x)") + "{{ ns.x }}", "nests more than"),
    (NEST.replace("GROWN", "dict(a=ns.x, b=ns.x)") + "{{ '%s' % ns.x }}", "nests more than"),
]


@pytest.mark.parametrize(("source", "message"), RUNNING_AWAY)
def test_what_runs_away_is_stopped(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 40_000)
    monkeypatch.setattr(template_limits, "MAX_VALUES", 20_000)
    with pytest.raises(TemplateLimitError, match=message):
        rendered(source, r=list(range(2000)), long="x" * 100_000)


def test_ranges_are_short() -> None:
    with pytest.raises(OverflowError):
        rendered("{% for i in range(10 ** 12) %}{% endfor %}")


def test_slow_templates_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.0)
    with pytest.raises(TemplateLimitError, match="takes longer than 0 seconds"):
        rendered("{% for i in range(3000) %}{% endfor %}")
    with pytest.raises(TemplateLimitError, match="takes longer"):
        rendered("{{ x }}a" * 600, x=1)


@pytest.mark.parametrize("name", ["urlize", "wordwrap", "xmlattr", "pprint"])
def test_filters_for_web_pages_are_not_there(name: str) -> None:
    with pytest.raises(jinja2.TemplateSyntaxError, match=f"No filter named '{name}'"):
        rendered("{{ 'a'|" + name + " }}")


def test_what_is_enough_for_ten_thousand_tools() -> None:
    assert template_sandbox.MAX_STEPS >= 300_000
    assert template_limits.MAX_VALUES >= 1_000_000


def test_every_rendering_has_a_budget_of_its_own() -> None:
    template = TemplateEnvironment().from_string("{% for i in r %}{% endfor %}done")
    for _ in range(4):
        assert render(template, {"r": range(90_000)}) == "done"


def test_raise_exception_raises() -> None:
    with pytest.raises(jinja2.TemplateError, match="not like this"):
        rendered("{{ raise_exception('not like this') }}")


def test_sums() -> None:
    assert rendered("{{ [1, 2.5]|sum }} {{ [{'a': 1}, {'a': 2}]|sum('a', 3) }}") == "3.5 6"
    assert (
        rendered("{{ [[1], [2, 3]]|sum(start=[0]) }} {{ [(1,), (2,)]|sum(start=()) }}")
        == "[0, 1, 2, 3] (1, 2)"
    )
    assert rendered("{{ []|sum(start=[]) }} {{ [{'a': [1]}]|sum('a', []) }}") == "[] [1]"
    for wrong in ("{{ ['a', 'b']|sum }}", "{{ [1, [2]]|sum(start=[]) }}", "{{ [[1]]|sum }}"):
        with pytest.raises(TypeError):
            rendered(wrong)


def test_long_steps_are_not_many_before_somebody_looks_at_the_clock(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.01)
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 5000 + 4095)
    counted: list[int] = []
    items = [1] * 100_000
    with pytest.raises(TemplateLimitError, match="longer than"):
        rendered(
            "{% for i in range(5000) %}{% set b = items|max %}{{ note(i) }}{% endfor %}",
            items=items,
            note=counted.append,
        )
    assert len(counted) <= 100
