"""Load Hugging Face folders for evaluation: exports of this project, and other causal models beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from oryx_megatron import platform
from oryx_megatron.data.tokenizer import Tokenizer, load_tokenizer
from oryx_megatron.errors import ConversionError, OryxError, first_line
from oryx_megatron.hf.configuration_oryx import OryxConfig
from oryx_megatron.hf.folders import check_export, recognised
from oryx_megatron.hf.modeling_oryx import OryxForCausalLM


class ExportCodec:
    """The tokenizer of an export for pieces of text, without the special tokens that stand around a whole one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.vocab_size = tokenizer, len(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of a piece."""
        return self.tokenizer(text, add_special_tokens=False).input_ids


def load_export(folder: str | Path, tokenizer: str | Path | None = None) -> tuple[Any, ExportCodec | Tokenizer]:
    """Model in eval mode on this machine's device, and its tokenizer (or the one of a tokenizer folder).

    Runs no code of the folder: an export is read by this project's own classes, and fetches none.

    Raises:
        ConversionError: it does not load, or asks for what no export has.
    """
    if (kind := recognised(folder).get("model_type")) not in (None, OryxConfig.model_type):
        raise ConversionError(f"{folder}: model type {kind!r}, not oryx: no export of this project")
    check_export(Path(folder))
    AutoConfig.register(OryxConfig.model_type, OryxConfig, exist_ok=True)
    AutoModelForCausalLM.register(OryxConfig, OryxForCausalLM, exist_ok=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype="auto")
        if tokenizer is not None:
            return model.to(platform.device()).eval(), load_tokenizer(tokenizer)  # type: ignore[arg-type]
        codec = ExportCodec(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except OryxError:
        raise
    except Exception as error:  # of many kinds: what transformers, tokenizers and safetensors raise on damaged files
        raise ConversionError(f"{folder} does not load: {first_line(error)}") from error
    return model.to(platform.device()).eval(), codec  # type: ignore[arg-type]
