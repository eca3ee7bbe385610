"""Data for training tests: a small prepared directory, made once by the real prepare stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylm.config.data import DataSection, TokenizerSection
from raylm.data.prepare import prepare_directory


@pytest.fixture(scope="session")
def prepared(ray_instance, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte tokens of 200 short documents, a tenth of them held out."""
    root = tmp_path_factory.mktemp("prepared")
    source = root / "documents.txt"
    source.write_text("\n".join(f"{i} apples and {i * i} pears make {i + i * i} fruits in all" for i in range(200)))
    directory = root / "data"
    data = DataSection(train=str(source), text_unit="line", validation_fraction=0.1)
    prepare_directory(directory, data, TokenizerSection(type="byte"))
    return directory
