"""A container's user may have no name and no home directory."""

import os
import pwd

import pytest

from flashdiff import cli
from flashdiff.errors import ConfigError
from flashdiff.files import cache_folder


def _no_such_user(_: object) -> None:
    raise KeyError("no such user")


def test_without_a_home_directory_the_variable_to_set_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", _no_such_user)
    with pytest.raises(ConfigError, match="this user has no home directory: set XDG_CACHE_HOME"):
        cache_folder()
    assert cli.main(["generate", "avatars", "a robot", "-o", os.devnull + ".png"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
