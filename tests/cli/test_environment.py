"""Options of `flashdiff serve` from environment variables."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from flashdiff.cli import main, serve
from flashdiff.cli.environment import PREFIX
from flashdiff.errors import ConfigError


def _options(environment: dict[str, str], *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    options = parser.parse_args(arguments)
    options.variables.fill(options, environment)
    return options


@pytest.mark.parametrize(
    ("environment", "name", "value"),
    [
        ({}, "port", 50051),
        ({}, "bundles", []),
        ({"FLASHDIFF_COMPARE_STOCK": "0"}, "compare_stock", False),
        ({"FLASHDIFF_PORT": "7"}, "port", 7),
        ({"FLASHDIFF_PORT": ""}, "port", 50051),
        ({"FLASHDIFF_DRAIN": "2.5"}, "drain", 2.5),
        ({"FLASHDIFF_NO_AUTH": "true"}, "no_auth", True),
        ({"FLASHDIFF_NO_AUTH": "0"}, "no_auth", False),
        ({"FLASHDIFF_ALIAS": "a=b, c=d"}, "alias", ["a=b", "c=d"]),
        ({"FLASHDIFF_ALLOW_ORIGIN": "https://x"}, "allow_origin", ["https://x"]),
        ({"FLASHDIFF_LOG_FORMAT": "json"}, "log_format", "json"),
        ({"FLASHDIFF_LORA": "one.safetensors:0.5,two"}, "lora", ["one.safetensors:0.5", "two"]),
        ({"FLASHDIFF_LORA": ' ["a, b.safetensors:0.5", "two"]'}, "lora", ["a, b.safetensors:0.5", "two"]),
        ({"FLASHDIFF_BUNDLES": '["/models/a,b"]'}, "bundles", [Path("/models/a,b")]),
        ({"FLASHDIFF_ALIAS": '["a,b=c"]'}, "alias", ["a,b=c"]),
        ({"FLASHDIFF_ALLOW_ORIGIN": "[]"}, "allow_origin", []),
        ({"FLASHDIFF_SAMPLER": "scm"}, "sampler", "scm"),
    ],
)
def test_a_variable_sets_its_option(environment: dict[str, str], name: str, value: Any) -> None:
    assert getattr(_options(environment), name) == value


def test_the_command_line_wins_also_with_the_value_of_the_default() -> None:
    environment = {"FLASHDIFF_PORT": "7", "FLASHDIFF_ALIAS": "a=b", "FLASHDIFF_BUNDLES": "one,two"}
    options = _options(environment, "bundle", "--port", "50051", "--alias", "c=d")
    assert (options.port, options.alias) == (50051, ["c=d"])
    assert [str(bundle) for bundle in options.bundles] == ["bundle"]
    assert [str(bundle) for bundle in _options(environment).bundles] == ["one", "two"]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"FLASHDIFF_PROT": "7"}, "FLASHDIFF_PROT: no option has that variable; did you mean FLASHDIFF_PORT?"),
        ({"FLASHDIFF_TOKEN": "x"}, "did you mean FLASHDIFF_TOKENS?"),
        ({"FLASHDIFF_QQQQQQQ": "x"}, "there are FLASHDIFF_ALIAS"),
        ({"FLASHDIFF_PORT": "seven"}, "FLASHDIFF_PORT=seven: a whole number is needed"),
        ({"FLASHDIFF_DRAIN": "long"}, "FLASHDIFF_DRAIN=long: a number is needed"),
        ({"FLASHDIFF_NO_AUTH": "perhaps"}, "FLASHDIFF_NO_AUTH=perhaps: give one of 1, true"),
        ({"FLASHDIFF_LORA": '["a,b"'}, 'FLASHDIFF_LORA=["a,b": give values separated by commas, or a JSON list of texts'),
        ({"FLASHDIFF_BUNDLES": "[1]"}, "FLASHDIFF_BUNDLES=[1]: give values separated by commas, or a JSON list of texts"),
        ({"FLASHDIFF_ALIAS": '[""]'}, 'FLASHDIFF_ALIAS=[""]: give values separated'),
        ({"FLASHDIFF_LOG_FORMAT": "xml"}, "FLASHDIFF_LOG_FORMAT=xml: give one of text, json"),
    ],
)
def test_a_wrong_variable_is_refused(environment: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _options(environment)
    assert says in str(caught.value)


def test_the_variables_that_kubernetes_sets_for_a_service_are_no_options() -> None:
    """Of Services named flashdiff, flashdiff-http and flashdiff-metrics."""
    links = {
        "FLASHDIFF_SERVICE_HOST": "10.0.0.1",
        "FLASHDIFF_SERVICE_PORT": "50051",
        "FLASHDIFF_SERVICE_PORT_GRPC": "50051",
        "FLASHDIFF_PORT": "tcp://10.0.0.1:50051",
        "FLASHDIFF_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "FLASHDIFF_PORT_50051_TCP_ADDR": "10.0.0.1",
        "FLASHDIFF_HTTP_PORT": "tcp://10.0.0.2:8000",
        "FLASHDIFF_HTTP_SERVICE_HOST": "10.0.0.2",
        "FLASHDIFF_METRICS_PORT_9090_TCP_PROTO": "tcp",
    }
    options = _options(links)
    assert (options.port, options.http_port) == (50051, None)


def test_help_names_the_variable_of_every_option() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        assert action.dest == "help" or f"[{PREFIX}{action.dest.upper()}" in text
    assert "default: 50051" in text


def test_a_wrong_variable_ends_serve_in_one_line_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASHDIFF_DRAIN_DELAY", "soon")
    assert main(["serve", "bundle"]) == 2
    assert capsys.readouterr().err == "flashdiff: error: FLASHDIFF_DRAIN_DELAY=soon: a number is needed\n"
    monkeypatch.setenv("FLASHDIFF_DRAIN_DELAY", "-1")
    assert main(["serve", "avatars"]) == 2
    assert "--drain-delay -1: give seconds from 0" in capsys.readouterr().err
