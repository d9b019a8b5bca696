"""CLIP's tokenizers and text encoders, loaded from wherever a model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    create_diffusers_clip_model_from_ldm,
    load_single_file_checkpoint,
)
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shared.errors import UserError, first_line
from shared.models.family import Model
from shared.models.hub import unreachable
from shared.models.single_file import config_folder, is_single_file, whole
from shared.models.weights import load_whole

SMALLEST_VOCABULARY = 256  # bytes


def load_clip(model: Model, part: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load the tokenizer and fp32 text encoder of a model's `part`, such as `text_encoder_2`.

    Raises UserError where one is missing or damaged.
    """
    kind = CLIPTextModelWithProjection if part.endswith("_2") else CLIPTextModel
    single = is_single_file(model.source)
    folder = part.replace("text_encoder", "tokenizer")
    try:
        if single:
            encoder = _from_single_file(kind, model.source, part)
            source = tokenizer_source(model, folder)
        else:
            encoder = load_whole(
                kind.from_pretrained, model.source, part,
                subfolder=part, torch_dtype=torch.float32, use_safetensors=True,
                ignore_mismatched_sizes=True,  # which are refused with their names
            )  # fmt: skip
            source = model.source
        tokenizer = AutoTokenizer.from_pretrained(with_files(source, folder), subfolder=folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = first_line(error)
        raise UserError(f"no {part} can be read from {model.source!r} ({first})") from None
    if len(tokenizer) < SMALLEST_VOCABULARY:  # what transformers makes of missing files
        raise UserError(f"{model.source}: the tokenizer of its {part} has no vocabulary")
    return tokenizer, encoder


def with_files(source: str, folder: str) -> str:
    """Where the files of a model's `folder` lie on this machine, downloaded if need be.

    A tokenizer's reader also asks for files that a repository need not have; of a folder it knows
    that they are not there, of the hub's cache only with a network. Raises OSError or ValueError.
    """
    if Path(source).is_dir():
        return source
    return str(snapshot_download(source, allow_patterns=f"{folder}/*"))


def tokenizer_source(model: Model, folder: str) -> str:
    """Where the tokenizer of a single file is, which holds none: beside it, else the family's.

    Raises UserError where it is neither there nor on the hub.
    """
    beside = Path(model.source).with_suffix("")
    if (beside / folder).is_dir():
        return str(beside)
    unreachable()  # with no hub, only what was downloaded before is looked for
    try:
        return with_files(model.family.pretrained, folder)
    except (OSError, ValueError) as error:
        first = first_line(error)
        raise UserError(
            f"{model.source} holds no tokenizer, and {model.family.pretrained}'s cannot be fetched "
            f"({first}); connect to the hub, or put its {folder} into the folder {beside}"
        ) from None


def _from_single_file(kind: Any, source: str, part: str) -> PreTrainedModel:
    folder = config_folder(source, f"{part}/config.json")
    encoder: PreTrainedModel = create_diffusers_clip_model_from_ldm(
        kind,
        load_single_file_checkpoint(source, local_files_only=True),
        subfolder=part,
        config=str(folder),
        torch_dtype=torch.float32,
        local_files_only=True,
    )
    return whole(encoder, source, part)
