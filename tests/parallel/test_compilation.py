"""Where training.compile is refused; that it changes no loss is tested with the layouts."""

from __future__ import annotations

import pytest

from raylm.errors import UserError
from raylm.parallel.engines.compilation import check_compilation


def test_missing_compiler_and_zero_3_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compilation(2)
    with pytest.raises(UserError, match=r"training\.compile: found true, allowed with parallel\.zero_stage 0, 1 and 2"):
        check_compilation(3)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"training\.compile: .* no 'no-such-compiler' on the PATH"):
        check_compilation(1)
