"""The tiny teachers' architecture: Stable Diffusion 1.5 and SDXL with every width cut down."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

MAX_TOKENS = 16
WIDTH = 64  # of each text encoder
TIME_ID_WIDTH = 32


def build_vae() -> AutoencoderKL:
    """AutoencoderKL with downscale 8 and 4 latent channels, 0.7 M parameters."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        # Few groups: a norm over one or two channels erases the colour that they carry.
        norm_num_groups=2,
        sample_size=64,
    )


def build_unet(cross_attention_dim: int, **more: object) -> UNet2DConditionModel:
    """Two levels; text enters at the lower one, where attention costs next to nothing."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=16,
        **more,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer learnt from `captions`; any other text falls back to bytes."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(captions, trainer)
    with tempfile.TemporaryDirectory() as folder:
        _, merges_path = bpe.model.save(folder)
        lines = Path(merges_path).read_text().splitlines()
    # Pairs, as tokenizers' BPE takes them; transformers' annotation says texts.
    merges: list[Any] = [tuple(line.split()) for line in lines if not line.startswith("#")]
    # CLIP's order: bytes, bytes that end a word, merges, special tokens.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = letters + [f"{letter}</w>" for letter in letters]
    words += [left + right for left, right in merges]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=merges,
        model_max_length=MAX_TOKENS,
    )


def text_config(tokenizer: CLIPTokenizer, layers: int) -> CLIPTextConfig:
    """A CLIP text transformer of width 64."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Teacher:
    """Networks that train together: the UNet and its text encoders."""

    parts: tuple[str, ...]  # what diffusers calls `modules`

    def __init__(self, captions: list[str]) -> None:
        self.tokenizer = build_tokenizer(captions)
        self.scheduler = build_scheduler()
        self.modules: list[nn.Module] = []

    def parameters(self) -> list[nn.Parameter]:
        """Everything that learns."""
        return [p for module in self.modules for p in module.parameters()]

    def tokenize(self, texts: list[str]) -> Tensor:
        """`[N, 16]` token ids."""
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        return cast(Tensor, tokens.input_ids)

    def predict(self, z: Tensor, t: Tensor, tokens: Tensor, empty: Tensor, ids: Tensor) -> Tensor:
        """eps; where `empty`, the caption is replaced by the unconditional embedding."""
        raise NotImplementedError

    def save(self, folder: Path, vae: AutoencoderKL) -> None:
        """Write a diffusers pipeline, fp16 safetensors."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Take the weights of a saved pipeline of the same kind."""
        stored = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        for name, module in zip(self.parts, self.modules, strict=True):
            module.load_state_dict(getattr(stored, name).state_dict())


class TinySD(Teacher):
    """SD 1.5: one encoder, its last hidden state, the encoded empty prompt as unconditional."""

    parts = ("text_encoder", "unet")

    def __init__(self, captions: list[str]) -> None:
        super().__init__(captions)
        self.text = CLIPTextModel(text_config(self.tokenizer, layers=2))
        self.unet = build_unet(WIDTH)
        self.modules = [self.text, self.unet]

    def predict(self, z: Tensor, t: Tensor, tokens: Tensor, empty: Tensor, ids: Tensor) -> Tensor:
        tokens = torch.where(empty[:, None], self.tokenize([""]), tokens)
        return cast(Tensor, self.unet(z, t, self.text(tokens).last_hidden_state).sample)

    def save(self, folder: Path, vae: AutoencoderKL) -> None:
        StableDiffusionPipeline(
            vae=_half(vae),
            text_encoder=_half(self.text),
            tokenizer=self.tokenizer,
            unet=_half(self.unet),
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)


class TinyXL(Teacher):
    """SDXL: two encoders' penultimate states, pooled embedding, time_ids, zeros for empty."""

    parts = ("text_encoder", "text_encoder_2", "unet")

    def __init__(self, captions: list[str]) -> None:
        super().__init__(captions)
        config = text_config(self.tokenizer, layers=3)
        self.text = CLIPTextModel(config)
        self.text_2 = CLIPTextModelWithProjection(config)
        self.unet = build_unet(
            2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_ID_WIDTH,
            projection_class_embeddings_input_dim=WIDTH + 6 * TIME_ID_WIDTH,
        )
        self.modules = [self.text, self.text_2, self.unet]

    def predict(self, z: Tensor, t: Tensor, tokens: Tensor, empty: Tensor, ids: Tensor) -> Tensor:
        first = self.text(tokens, output_hidden_states=True)
        second = self.text_2(tokens, output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        states = states.masked_fill(empty[:, None, None], 0.0)
        pooled = second.text_embeds.masked_fill(empty[:, None], 0.0)
        added = {"text_embeds": pooled, "time_ids": ids}
        return cast(Tensor, self.unet(z, t, states, added_cond_kwargs=added).sample)

    def save(self, folder: Path, vae: AutoencoderKL) -> None:
        StableDiffusionXLPipeline(
            vae=_half(vae),
            text_encoder=_half(self.text),
            text_encoder_2=_half(self.text_2),
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer,
            unet=_half(self.unet),
            scheduler=self.scheduler,
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        ).save_pretrained(folder)


TEACHERS: dict[str, type[Teacher]] = {"tiny-sd": TinySD, "tiny-xl": TinyXL}


def _half(module: nn.Module) -> nn.Module:
    """An fp16 copy."""
    kind: Any = type(module)
    copy = kind.from_config(module.config) if hasattr(kind, "from_config") else kind(module.config)
    copy.load_state_dict(module.state_dict())
    if isinstance(copy, AutoencoderKL):
        copy.register_to_config(_name_or_path="")  # not the folder it was trained in
    return cast(nn.Module, copy.half().eval())
