"""Packages that look like the ones Megatron-Core builds on, and are not: refused before it trusts their names."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path


def refuse_impostors() -> None:
    """Check `transformer_engine` and `apex`, if there is something under these names.

    Raises:
        ImportError: it is an empty folder, a package without its libraries, or another project of that name.
    """
    found = importlib.util.find_spec("transformer_engine")
    if found is not None:
        if found.origin is None:
            folder = next(iter(found.submodule_search_locations or ["?"]))
            raise ImportError(f"{folder}: left over from an uninstalled Transformer Engine; delete the folder")
        try:
            importlib.import_module("torch")  # whose libraries Transformer Engine's need
            importlib.import_module("transformer_engine.pytorch")
        except (ImportError, OSError, RuntimeError) as error:
            raise ImportError(
                f"{found.origin}: Transformer Engine is there but does not import ({str(error).splitlines()[0]}); "
                "install transformer-engine[pytorch] for this torch, or uninstall it"
            ) from error
    found = importlib.util.find_spec("apex")
    if found is not None:
        places = [Path(place) for place in found.submodule_search_locations or []]
        if not any((place / "optimizers").is_dir() for place in places):
            raise ImportError(
                f"{found.origin}: not NVIDIA's apex, but a project of the same name, which Megatron-Core takes for it; "
                "uninstall it"
            )
        if importlib.util.find_spec("amp_C") is None:
            raise ImportError(
                f"{found.origin}: NVIDIA's apex without its kernels (amp_C), whose optimizer fails at its first use; "
                "build it with --cpp_ext --cuda_ext, or uninstall it"
            )
