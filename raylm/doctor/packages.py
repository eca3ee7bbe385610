"""Python, raylm and its packages: versions by their metadata alone, and whether the large ones can be imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import raylm
from raylm.doctor.finding import Finding, State
from raylm.doctor.imports import PACKAGES, Import, check_imports, remedy

IMPORT_SECONDS = 26.0
# What an import check is worth for, in the table's order; the rest is checked by its metadata.
LARGE = (*PACKAGES, "vllm")
OPTIONAL = {"openvino": ("cpu", "compress, and serve on a CPU")}


@dataclass(frozen=True)
class Requirement:
    """One of raylm's requirements that holds on this machine.

    Attributes:
        name: of the distribution.
        range: such as ``>=2.60,<3``; empty where any version will do.
        extra: the extra that asks for it; empty for the core.
        found: installed version, None where it is missing.
        fits: whether ``found`` is within the range; None where that cannot be told.
    """

    name: str
    range: str = ""
    extra: str = ""
    found: str | None = None
    fits: bool | None = None


def probe_python() -> list[Finding]:
    """The interpreter against the ``requires-python`` of the installed raylm, and raylm itself."""
    version, wanted, known = platform.python_version(), "", None
    try:
        wanted = importlib.metadata.metadata("raylm").get("Requires-Python") or ""
        known = importlib.metadata.version("raylm")
    except importlib.metadata.PackageNotFoundError:
        pass
    environment = "virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    bits = 64 if sys.maxsize > 2**32 else 32
    found = f"{version}, {platform.system()} {platform.machine()}, {environment}"
    state: State = "ok"
    mend = ""
    if bits != 64:
        state, mend = "broken", "take a 64-bit Python: torch and ray have no other"
    elif wanted and _within(version, wanted) is False:
        state, mend = "broken", f"take a Python {wanted} and install raylm into a new virtual environment of it"
    return [Finding("python", found, state, mend), judge_raylm(raylm.__version__, known, Path(raylm.__file__).parent)]


def judge_raylm(version: str, known: str | None, place: Path) -> Finding:
    """One line; ``known`` is the version that was installed, None where raylm is used from its folder alone."""
    found = f"{version}, {'not installed, used from' if known is None else 'in'} {place}"
    if known not in (None, version):
        mend = "python -m pip install --no-deps --editable . in its clone, or install the new wheel"
        return Finding("raylm", f"{found}; installed as {known}", "warning", mend)
    return Finding("raylm", found)


def requirements(lines: Iterable[str], versions: Mapping[str, str | None]) -> list[Requirement]:
    """Metadata's requirement lines (``Requires-Dist``) against installed ``versions`` by normalized name.

    Lines whose markers do not hold on this machine are left out. Without the package ``packaging`` markers other than
    extras are taken to hold, and ``fits`` is None.
    """
    found = []
    for line in lines:
        match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(?:;(.*))?$", line)
        if match is None:
            continue
        name, wanted, marker = match[1], match[2].strip(), (match[3] or "").strip()
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        if not _holds(marker, extra[1] if extra else ""):
            continue
        version = versions.get(_normal(name))
        fits = _within(version, wanted) if version is not None else None
        found.append(Requirement(name, wanted, extra[1] if extra else "", version, fits))
    return found


def judge(found: list[Requirement], imports: Mapping[str, Import], build: str) -> list[Finding]:
    """A line for each large package (vLLM only where it is there), and one for all others.

    Args:
        found: what raylm requires.
        imports: results by module name; what was not tried is missing.
        build: torch's build, such as ``CPU build`` or ``CUDA 13.0 build``.
    """
    by_name = {_normal(one.name): one for one in found}
    lines = []
    for name in LARGE:
        one = by_name.pop(name, None) or Requirement(name)
        if name == "vllm" and one.found is None:
            continue
        lines.append(_judge_large(one, imports.get(name), build if name == "torch" else ""))
    return [*lines, _judge_others(list(by_name.values()))]


def _judge_large(one: Requirement, tried: Import | None, build: str) -> Finding:
    name = one.name
    if one.found is None and name in OPTIONAL:
        extra, use = OPTIONAL[name]
        return Finding(name, "not installed", "warning", f"python -m pip install 'raylm[{extra}]' to {use}")
    if one.found is None:
        return Finding(name, "not installed", "broken", f"python -m pip install '{name}{one.range}'")
    found = ", ".join(filter(None, [one.found, build]))
    if tried is not None and tried.timed_out:
        return Finding(name, f"{found}; {tried.error}", "warning", remedy(name, tried.error))
    if tried is not None and tried.error:
        return Finding(name, f"{found}; {tried.error}", "broken", remedy(name, tried.error))
    if tried is not None:
        found += f", imported in {tried.seconds:.1f} s"
    if one.fits is False:
        return Finding(name, f"{found}; raylm needs {one.range}", "broken", _install(one))
    return Finding(name, found)


def _judge_others(others: list[Requirement]) -> Finding:
    missing = [one for one in others if one.found is None and not one.extra]
    outside = [one for one in others if one.found is not None and one.fits is False]
    counted = [one for one in others if one.found is not None]
    if missing or outside:
        parts = [f"{one.name} is missing" for one in missing]
        parts += [f"{one.name} {one.found} is not {one.range}" for one in outside]
        mend = "python -m pip install " + " ".join(f"'{one.name}{one.range}'" for one in [*missing, *outside])
        broken = any(not one.extra for one in [*missing, *outside])
        return Finding("other packages", "; ".join(parts), "broken" if broken else "warning", mend)
    if not others:
        return Finding(
            "other packages", "not known, as raylm is not installed", "warning", "python -m pip install --editable ."
        )
    checked = all(one.fits is not None for one in counted)
    how = "versions as raylm needs them" if checked else "versions not checked: the package 'packaging' is missing"
    return Finding("other packages", f"{len(counted)} there, {how}")


def _install(one: Requirement) -> str:
    return f"python -m pip install '{one.name}{one.range}'"


def probe_packages(import_seconds: float = IMPORT_SECONDS) -> list[Finding]:
    """Metadata of all packages, and a real import of the large ones in a process of their own."""
    try:
        lines = importlib.metadata.requires("raylm") or []
    except importlib.metadata.PackageNotFoundError:
        lines = list(PACKAGES)
    versions = installed_versions()
    present = [name for name in PACKAGES if versions.get(name) is not None]
    imports = {result.name: result for result in check_imports(present, import_seconds)}
    return judge(requirements(lines, versions), imports, torch_build())


def installed_versions() -> dict[str, str | None]:
    """Version of every installed distribution by its normalized name."""
    versions: dict[str, str | None] = {}
    for distribution in importlib.metadata.distributions():
        try:
            name = distribution.metadata["Name"]
            if name:  # the first on the path is what an import takes
                versions.setdefault(_normal(name), distribution.version)
        except (OSError, KeyError, TypeError, ValueError):  # a half-removed package
            continue
    return versions


def torch_build(place: Path | None = None) -> str:
    """``CPU build``, ``CUDA 13.0 build`` or ``ROCm 6.4 build``, from torch's own version file; empty without torch.

    Args:
        place: torch's folder; by default the installed one's.
    """
    if place is None:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return ""
        place = Path(spec.origin).parent
    try:
        text = (place / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    for name, title in (("cuda", "CUDA"), ("hip", "ROCm")):
        match = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
        if match:
            return f"{title} {match[1]} build"
    return "CPU build"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _within(version: str, wanted: str) -> bool | None:
    try:
        from packaging.specifiers import InvalidSpecifier, SpecifierSet
        from packaging.version import InvalidVersion
    except ImportError:
        return None
    try:
        return SpecifierSet(wanted).contains(version, prereleases=True)
    except (InvalidSpecifier, InvalidVersion):
        return None


def _holds(marker: str, extra: str) -> bool:
    if not marker:
        return True
    try:
        from packaging.markers import InvalidMarker, Marker
    except ImportError:
        return True
    try:
        return Marker(marker).evaluate({"extra": extra})
    except InvalidMarker:
        return True
