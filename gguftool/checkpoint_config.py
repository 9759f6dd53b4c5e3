"""A checkpoint before it is opened: where it lies, and what its config.json says, refused where nothing can come of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .architectures import Architecture, for_model_type
from .errors import GgufToolError
from .sources import check_model, is_hub_id
from .stored import first_line
from .strict_json import parse


def checkpoint_directory(path: str | Path) -> Path:
    """The directory of a checkpoint; a hub id (`owner/name`, where no such directory is) is downloaded.

    Raises GgufToolError for what is neither, and for what the hub does not give.
    """
    if Path(path).is_dir():
        return Path(path)
    text = str(path)
    check_model(path)
    if not is_hub_id(path):
        raise GgufToolError(f"{path}: a file, and a checkpoint's directory is wanted here")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError) as error:
        raise GgufToolError(f"{path}: no such directory, and the hub does not give it ({first_line(error)})") from error


def read_config(directory: Path) -> tuple[bytes, dict[str, Any]]:
    """config.json as bytes and as a dictionary. Raises GgufToolError where it is missing or damaged."""
    try:
        raw = (directory / "config.json").read_bytes()
        fields = parse(raw, strict=False)
    except FileNotFoundError as error:
        raise GgufToolError(f"{directory}: no config.json; not a Hugging Face checkpoint") from error
    except (ValueError, OSError) as error:
        raise GgufToolError(f"{directory}: config.json cannot be read ({first_line(error)})") from error
    if not isinstance(fields, dict):
        raise GgufToolError(f"{directory}: config.json is no JSON object")
    return raw, fields


def architecture_of(directory: Path, fields: Mapping[str, Any]) -> Architecture:
    """The row of the model's family.

    Raises GgufToolError where there is none, and for a checkpoint that its row refuses or that is quantized in a way that
    cannot be read.
    """
    row = _row_of(directory, fields)
    _check_variant(directory, row, fields)
    return row


def _row_of(directory: Path, fields: Mapping[str, Any]) -> Architecture:
    """The family's row. Raises GgufToolError where there is none, and says so where the model has no experts at all."""
    kind = str(fields.get("model_type"))
    try:
        return for_model_type(kind)
    except GgufToolError:
        inner = fields.get("text_config")
        if any("expert" in key for key in (*fields, *(inner if isinstance(inner, dict) else ()))):
            raise
        raise GgufToolError(
            f"{directory}: config.json ({kind}) names no experts, so this is a dense model, and there is nothing to prune"
        ) from None


def _check_variant(directory: Path, row: Architecture, fields: Mapping[str, Any]) -> None:
    """Raises GgufToolError for a checkpoint that is quantized in a way that cannot be read, or refused by its row."""
    how = fields.get("quantization_config") or {}
    kind = how.get("quant_method") if isinstance(how, dict) else "unknown"
    if how and not (kind == "mxfp4" and row.transposed):
        raise GgufToolError(
            f"{directory}: the checkpoint is quantized already ({kind}); start from the unquantized original, or from a "
            "copy in BF16"
        )
    text = {**fields, **(fields.get("text_config") or {})}
    for key, value, why in row.refused:
        if text.get(key) == value:
            raise GgufToolError(f"{directory}: config.json has {key} = {value!r}: {why}")


# Counts of config.json by which transformers makes lists.
_LISTED = ("num_hidden_layers", "num_labels", "num_nextn_predict_layers", "num_mtp_modules")


def check_counts(directory: Path, fields: Mapping[str, Any], n_tensors: int) -> None:
    """Raises GgufToolError where config.json counts more of something than the checkpoint's tensors allow."""
    parts = [fields, *(part for part in fields.values() if isinstance(part, dict))]
    for key in _LISTED:
        for value in (part[key] for part in parts if key in part):
            if isinstance(value, int | float) and not value <= max(n_tensors, 1000):
                raise GgufToolError(f"{directory}: config.json says {key} = {value}; there are {n_tensors} tensors")
