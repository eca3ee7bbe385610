"""Keys from files and the environment, rates, and the refusal to serve strangers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from raylm.config.serving import ServingSection
from raylm.config.stages import ServeConfig
from raylm.errors import UserError
from raylm.serving.http.access import ENVIRONMENT_VARIABLE, hash_key, load_key_hashes
from raylm.serving.http.gate import Allowance
from raylm.serving.stage import check

KEY, OTHER = "sixteen-characters-or-more", "another-key-of-some-length"


def test_keys_from_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEY} alice\n\nsha256:{hash_key(OTHER)}  # no name\n")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "a-third-key-from-the-environment bob")
    hashes = load_key_hashes(ServingSection(api_keys_file=str(path)))
    assert hashes[hash_key(KEY)] == "alice"
    assert hashes[hash_key(OTHER)] == f"key-{hash_key(OTHER)[:8]}"
    assert hashes[hash_key("a-third-key-from-the-environment")] == "bob"
    assert KEY not in str(hashes)


@pytest.mark.parametrize(("content", "says"), [("my-key", "keys:1"), ("# nothing", "no key"), (None, "cannot be read")])
def test_bad_key_files(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=says) as raised:
        load_key_hashes(ServingSection(api_keys_file=str(path)))
    assert "my-key" not in str(raised.value)


def test_strangers_need_keys(serve_config: Callable[..., ServeConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"serving\.host: found 0\.0\.0\.0, allowed: a loopback address"):
        check(serve_config(host="0.0.0.0"))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, KEY)
    check(serve_config(host="0.0.0.0"))


def test_allowance_comes_back_evenly() -> None:
    allowance = Allowance(per_minute=6)
    assert [allowance.take(100.0) for _ in range(6)] == [0.0] * 6
    assert allowance.take(100.0) == pytest.approx(10)
    assert allowance.take(105.0) == pytest.approx(5)
    assert allowance.take(110.0) == 0.0
    assert allowance.take(110.0) == pytest.approx(10)
    # Rest fills no more than a minute's worth.
    assert [allowance.take(10_000.0) for _ in range(7)][-1] > 0
