"""Settings: flags over environment over one file, and clear errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from codefend.gateway.config import SECRETS, Settings, load_settings
from codefend.types import CodefendError
from gateway_kit import settings


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in os.environ:
        if name.startswith("CODEFEND_"):
            monkeypatch.delenv(name)


def test_flags_win_over_environment_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('upstream = "http://file:1"\nport = 1001\nmax-images = 7\napi_keys = ["from-the-file"]\n')
    assert load_settings(file).upstream == "http://file:1/v1"
    monkeypatch.setenv("CODEFEND_PORT", "1002")
    monkeypatch.setenv("CODEFEND_MAX_IMAGES", "8")
    loaded = load_settings(file, port=1003, host=None)
    assert (loaded.port, loaded.max_images, loaded.host) == (1003, 8, "127.0.0.1")
    assert [key.get_secret_value() for key in loaded.api_keys] == ["from-the-file"]
    monkeypatch.setenv("CODEFEND_API_KEYS", "key-number-one, key-number-two")
    monkeypatch.setenv("CODEFEND_CONFIG", str(file))
    assert len(load_settings().api_keys) == 2


def test_yaml(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("upstream: pocket\nremote_hosts: [a.org, b.org]\nallow_remote_images: true\n")
    loaded = load_settings(file)
    assert loaded.remote_hosts == ("a.org", "b.org")
    assert loaded.with_demo
    file.write_text("a: [")
    with pytest.raises(CodefendError, match="cannot read"):
        load_settings(file)


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://a:8000", "http://a:8000/v1"),
        ("http://a:8000/", "http://a:8000/v1"),
        ("https://a/v1/", "https://a/v1"),
        ("https://a/api/v1", "https://a/api/v1"),
        ("https://a/api", "https://a/api/v1"),
        ("https://google.test/v1beta/openai/", "https://google.test/v1beta/openai"),
        (
            "https://azure.test/openai/deployments/d?api-version=1",
            "https://azure.test/openai/deployments/d?api-version=1",
        ),
        ("pocket", "pocket"),
        ("smolvlm-pocket", "smolvlm-pocket"),
    ],
)
def test_upstreams(given: str, base: str) -> None:
    assert settings(upstream=given).upstream == base


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"upstream": None}, "upstream is missing: give --upstream or CODEFEND_UPSTREAM"),
        ({"upstream": "a:8000"}, "expected http"),
        ({"upstream": "http://u:p@a"}, "expected http"),
        ({"upstream": "http://a:99999"}, "upstream: Port"),
        ({"upstream": "http://a:b"}, "upstream: Port"),
        ({"port": 70000}, "port: Input should be less than or equal to 65535"),
        ({"purifer": "x"}, "did you mean 'purifier'"),
        ({"on_error": "open"}, "on_error: Input should be 'block', 'fallback' or 'pass'"),
        ({"remote_hosts": "a.org"}, "no effect without allow_remote_images"),
        ({"trusted_proxies": "10.0.0.0/8, *"}, r"trusted_proxies: .*expected addresses or networks like 10.0.0.0/8"),
        ({"api_keys": "short"}, "at least 8 characters"),
        ({"noise_secret": "shorter"}, "at least 16 characters"),
        ({"routes": "chat,embedings"}, "did you mean 'embeddings'"),
        ({"api_keys": "long-enough", "api_keys_file": "keys"}, "give api_keys or api_keys_file, not both"),
        ({"api_keys_file": "missing"}, "api_keys_file: No such file or directory: missing"),
    ],
)
def test_mistakes_are_one_clear_line(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(CodefendError, match=message) as error:
        load_settings(**({"upstream": "http://a"} | flags))
    assert "\n" not in str(error.value)
    assert "short" not in str(error.value).replace("shorter", ""), "keys are not shown"


def test_misspelt_variables_and_files_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('upstream = "http://a"\non_eror = "block"\n')
    with pytest.raises(CodefendError, match="did you mean 'on_error'"):
        load_settings(file)
    with pytest.raises(CodefendError, match="No such file"):
        load_settings(tmp_path / "missing.toml")
    monkeypatch.setenv("CODEFEND_ON_EROR", "block")
    with pytest.raises(CodefendError, match="did you mean CODEFEND_ON_ERROR"):
        load_settings(upstream="http://a")


def test_keys_do_not_show() -> None:
    loaded = settings(api_keys="sesame-open", upstream_api_key="upstream-secret", noise_secret="noise" * 5)
    assert "sesame" not in repr(loaded)
    assert "upstream-secret" not in repr(loaded)
    assert "noisenoise" not in repr(loaded)


def test_secrets_come_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("key-number-one\nkey-number-two\n")
    (tmp_path / "upstream").write_text("upstream-secret\n")
    monkeypatch.setenv("CODEFEND_UPSTREAM_API_KEY_FILE", str(tmp_path / "upstream"))
    loaded = settings(api_keys_file=tmp_path / "keys")
    assert [key.get_secret_value() for key in loaded.api_keys] == ["key-number-one", "key-number-two"]
    assert loaded.upstream_api_key is not None
    assert loaded.upstream_api_key.get_secret_value() == "upstream-secret"
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(CodefendError, match="keys is empty"):  # not a gateway that is open to everyone
        settings(api_keys_file=tmp_path / "keys")


@pytest.mark.parametrize("value", ["", " ", " , ", ",\n"])
def test_blank_keys_do_not_open_the_gateway(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text(value)
    with pytest.raises(CodefendError, match=r"keys is empty|api_keys: no key"):
        settings(api_keys_file=tmp_path / "keys")
    monkeypatch.setenv("CODEFEND_API_KEYS", value)
    with pytest.raises(CodefendError, match="api_keys: no key"):
        settings()
    monkeypatch.delenv("CODEFEND_API_KEYS")
    for keys in ([], [value]):
        with pytest.raises(CodefendError, match="api_keys: "):
            settings(api_keys=keys)


@pytest.mark.parametrize("name", ["upstream_api_key", "noise_secret", "cache_url"])
def test_blank_secrets_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "  "):
        monkeypatch.setenv(f"CODEFEND_{name.upper()}", value)
        with pytest.raises(CodefendError, match=f"{name}: the secret is blank"):
            settings()


def test_every_setting_but_keys_has_a_flag() -> None:
    from codefend.cli.serve import build_command

    flags = {parameter.name: parameter for parameter in build_command().params}
    assert set(flags) - {"config"} == set(Settings.model_fields) - set(SECRETS)
    assert all(parameter.help and parameter.rich_help_panel for parameter in flags.values())


def test_help_groups_the_flags() -> None:
    from typer.testing import CliRunner

    from codefend.cli import serve as command

    output = CliRunner().invoke(command.app, ["serve", "--help"]).output
    sections = [line.rstrip(":") for line in output.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert sections == ["Options", "Server", "Images", "Prompts", "Access", "Limits", "Load", "Upstream"]
    assert "--api-keys " not in output, "a command line is no place for secrets"


def test_the_command_hands_its_flags_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer
    from typer.testing import CliRunner

    from codefend.cli import serve as command
    from codefend.gateway import serve as module

    served: list[Settings] = []
    monkeypatch.setattr(module, "serve", lambda load, showcase: served.append(load()) or 0)
    app = typer.Typer()
    app.add_typer(command.app)
    arguments = ["serve", "--upstream", "http://a", "--port", "9", "--no-page", "--first-frame", "--policy", "purify"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (served[0].port, served[0].page, served[0].first_frame, served[0].demo) == (9, False, True, None)
