"""Flags of `draw` that contradict each other, and what several of them come to."""

from __future__ import annotations

import re

from infer.config import DrawConfig
from infer.pictures.read import Size, picture_size
from infer.pipelines.choose import Choice
from infer.pipelines.sampling import Guidance
from shared.errors import UsageError, UserError
from shared.models.family import load_config, vae_downscale
from shared.networks.sampling import takes_eta
from shared.storage.reading import read_file

USUAL_STRENGTH = 0.6
LARGEST = 4  # times the side that a model was trained at: beyond, it repeats its subject
SIZE = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")


def check_flags(config: DrawConfig) -> None:
    """Raise UserError for flags of pictures that do nothing without another one."""
    wants = (
        ("mask", config.mask, "image", config.image, "the picture that it is laid over"),
        ("strength", config.strength, "image", config.image, "the picture that it is about"),
        ("control-image", config.control_image, "controlnet", config.controlnet, "what sees it"),
        ("controlnet", config.controlnet, "control-image", config.control_image, "what it sees"),
        ("control-scale", config.control_scale, "controlnet", config.controlnet, "what it weighs"),
        ("canny", config.canny or None, "control-image", config.control_image, "what has edges"),
    )
    for flag, value, other, needed, what in wants:
        if value is not None and needed is None:
            raise UserError(f"--{flag} does nothing without --{other}, {what}; give that too")


def prompts_of(config: DrawConfig, choice: Choice) -> tuple[str, ...]:
    """What is drawn: all prompts that are given, else those of the run's previews.

    Raises UserError without any.
    """
    if "prompt" in config.typed and not config.prompt:
        raise UsageError("--prompt has no text behind it; say what to draw, or leave it out")
    given = config.prompt
    if config.prompts is not None:
        try:
            text = read_file(config.prompts).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(
                f"--prompts {config.prompts} is no text in UTF-8; save it as such"
            ) from None
        lines = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not lines:
            raise UserError(f"--prompts {config.prompts} is empty; write a prompt into each line")
        given += lines
    if not (given or choice.prompts):
        raise UserError("there is nothing to draw: say it with --prompt 'a red circle'")
    return given or choice.prompts


def steps_of(config: DrawConfig, choice: Choice) -> int:
    """The number of steps. Raises UserError for more than the student knows."""
    most, steps = choice.sampling.most_steps, config.steps or choice.sampling.steps
    if steps > most:
        raise UserError(f"--steps {steps} must be 1 to {most}, all that {choice.name} knows")
    return steps


def strength_of(config: DrawConfig, steps: int) -> float | None:
    """How far to go from a picture; None without one. Raises UserError where no step is left."""
    if config.image is None:
        return None
    strength = config.strength
    if strength is None:
        strength = USUAL_STRENGTH if config.mask is None else 1.0
    if int(steps * strength) < 1:  # as the pipelines count
        raise UserError(
            f"--strength {strength:g} of --steps {steps} leaves no step to draw: give --strength "
            f"{1 / steps:.2g} or --steps {int(1 / strength) + 1}, or more"
        )
    return strength


def guidance_of(config: DrawConfig, choice: Choice) -> float:
    """The guidance_scale. Raises UserError for a negative prompt that would do nothing."""
    sampling = choice.sampling
    scale = sampling.guidance_scale if config.guidance_scale is None else config.guidance_scale
    if config.negative_prompt is None:
        return scale
    if sampling.guidance is Guidance.TOLD:
        raise UserError(
            f"--negative-prompt does nothing to {choice.name}, which is told its guidance and "
            "draws without a second pass; leave it out"
        )
    if scale <= 1:
        raise UserError(
            f"--negative-prompt does nothing at --guidance-scale {scale:g}, with which "
            f"{choice.name} is drawn; leave it out, or add --guidance-scale 1.5"
        )
    return scale


def clip_skip_of(config: DrawConfig, choice: Choice) -> int:
    """Layers of the text encoders to leave out. Raises UserError for more than they have."""
    skipped = choice.clip_skip if config.clip_skip is None else config.clip_skip
    for name in choice.model.family.text_encoders if skipped else ():
        layers = int(load_config(choice.model.source, f"{name}/config.json")["num_hidden_layers"])
        if skipped >= layers:
            raise UserError(
                f"--clip-skip {skipped} leaves nothing of the {layers} layers of {name}; give "
                f"{layers - 1} at the most"
            )
    return skipped


def check_eta(config: DrawConfig, choice: Choice) -> None:
    """Raise UserError for an eta that the scheduler does not know."""
    scheduler = choice.sampling.scheduler
    if config.eta and not takes_eta(scheduler):
        raise UserError(
            f"--eta {config.eta:g} means nothing to {type(scheduler).__name__}, which draws "
            f"{choice.name}; leave it out"
        )


def size_of(config: DrawConfig, choice: Choice) -> Size:
    """Width and height to draw. Raises UserError for what the networks cannot draw.

    A picture keeps its shape, as nearly as a UNet halves well, at the area that the model was
    trained for.
    """
    if config.size is not None:
        size = typed_size(config.size, vae_downscale(choice.model.source))
        check_area(size, choice)
        return size
    if config.image is None:
        return choice.side, choice.side
    width, height = picture_size(config.image, "--image")
    scale = choice.side / (width * height) ** 0.5
    unit = latent_unit(choice)
    return nearest(width * scale, unit), nearest(height * scale, unit)


def latent_unit(choice: Choice) -> int:
    """Pixels that become one point where the UNet's latents are smallest."""
    unet = load_config(choice.model.source, "unet/config.json")
    halvings = len(unet.get("block_out_channels", [0])) - 1
    return vae_downscale(choice.model.source) << halvings


def typed_size(text: str, unit: int) -> Size:
    """Read SIDE or WIDTHxHEIGHT. Raises UserError for no size, or sides between two latents."""
    found = SIZE.fullmatch(text.lower())
    if found is None:
        raise UserError(f"--size {text!r} is not SIDE or WIDTHxHEIGHT, such as 512 or 768x512")
    width, height = int(found[1]), int(found[2] or found[1])
    for side in (width, height):
        if side % unit or not side:
            raise UserError(
                f"--size {text}: sides are multiples of {unit}; the nearest to {side} is "
                f"{nearest(side, unit)}"
            )
    return width, height


def check_area(size: Size, choice: Choice) -> None:
    """Raise UserError for a picture much larger than the model knows, which few machines hold."""
    most = LARGEST * choice.side
    if size[0] * size[1] > most**2:
        raise UserError(
            f"--size {size[0]}x{size[1]}: {choice.name} was trained at {choice.side} px and draws "
            f"no picture of more than {most}x{most}; draw a smaller one, and enlarge that"
        )


def nearest(side: float, unit: int) -> int:
    """The nearest multiple, at least one."""
    return max(1, round(side / unit)) * unit
