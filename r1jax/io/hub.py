# SPDX-License-Identifier: Apache-2.0
"""Checkpoints from the Hugging Face Hub by name, where there is a network; the extra `hub`."""

import re
from pathlib import Path

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ("*.json", "*.safetensors", "*.jinja")


def fetched(source: Path) -> Path:
    """A local folder as it is; of a Hub name such as `deepseek-ai/DeepSeek-R1` its local copy.

    Raises:
        ValueError: no such folder, and the extra is not installed or the download fails.
    """
    if source.exists() or not _NAME.fullmatch(str(source)):
        return source
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"{source}: there is no such folder; to read it from the Hub by name: "
            "pip install 'r1jax[hub]'"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=list(_FILES)))
    except Exception as error:  # network, name, permission: the library has a class for each
        raise ValueError(
            f"{source}: there is no such folder, and the Hub says: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
