"""Chat templates can do what transformers lets them do, and cannot run away."""

from typing import Any

import jinja2
import pytest
from jinja2.exceptions import SecurityError

from jaxserve.text.template_sandbox import TemplateEnvironment, TemplateLimitError, render


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
    ],
)
def test_there_is_no_way_out(source: str) -> None:
    with pytest.raises(SecurityError):
        rendered(source, x=[])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}", "loops take more than 200,000 steps"),
        ("{% for i in r %}{% for j in r|map('abs') %}{% endfor %}{% endfor %}", "200,000 steps"),
        ("{% for i in r recursive %}{% if loop.depth < 3 %}{{ loop(r) }}{% endif %}{% endfor %}", "steps"),
        (
            "{% macro m() %}{% for i in r %}{% endfor %}{% endmacro %}{% for i in r %}{{ m() }}{% endfor %}",
            "steps",
        ),
        ("{% for i in r %}{{ long }}{% endfor %}", "writes more than 64,000,000 characters"),
        ("{{ 'a' * 1000000000 }}", "makes a value of 1,000,000,000"),
        ("{{ 1000000000 * [1] }}", "makes a value of 1,000,000,000"),
        ("{{ 10 ** 1000000000 }}", "makes a value of"),
        ("{{ '%1000000000d' % 1 }}", "pads with"),
        ("{{ '%*d' % (1000000000, 1) }}", "pads with"),
    ],
)
def test_what_runs_away_is_stopped(source: str, message: str) -> None:
    with pytest.raises(TemplateLimitError, match=message):
        rendered(source, r=list(range(2000)), long="x" * 100_000)


def test_every_rendering_has_a_budget_of_its_own() -> None:
    template = TemplateEnvironment().from_string("{% for i in r %}{% endfor %}done")
    for _ in range(3):
        assert render(template, {"r": range(120_000)}) == "done"


def test_raise_exception_raises() -> None:
    with pytest.raises(jinja2.TemplateError, match="not like this"):
        rendered("{{ raise_exception('not like this') }}")
