"""The tab Morph: two pictures, and a film from one to the other, by `infer morph`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from infer.page import given, words
from infer.page.folders import choices, chosen
from infer.page.room import MODEL_QUEUE, Room
from infer.page.work.child import Child
from infer.page.work.turns import Cancelled
from shared.errors import UserError

KIND = "morph"
CANCELLED = "Cancelled; what has been learned is kept."
Updates = dict[Any, Any]


@dataclass(frozen=True)
class Settings:
    """What `infer morph` is told, by its flags' names."""

    pictures: tuple[str, str]
    prompts: tuple[str, str]
    model: str
    frames: int
    steps: int
    learn: bool
    reschedule: bool
    learn_steps: int | None  # None where nothing is learned
    device: str
    dtype: str
    threads: int | None

    def to_json(self) -> dict[str, Any]:
        """The settings file: what is not told is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class MorphTab:
    """The form, the strip and the film."""

    def __init__(self, room: Room) -> None:
        self.room = room
        with gr.Row(equal_height=False):
            ends = [end(label, name) for label, name in (("First", "first"), ("Last", "last"))]
        with gr.Row(equal_height=True):
            self.model = gr.Dropdown([], label="Model", min_width=160, elem_id="morph-model")
            frames = gr.Slider(3, 48, 16, step=1, label="Frames", min_width=160)
            steps = gr.Slider(2, 100, 50, step=1, label="Steps", min_width=160)
        with gr.Accordion("More", open=False):
            learn = gr.Checkbox(
                True,
                label="Learn each picture first",
                info="Frames are then nearer to the pictures; takes longer.",
            )
            learn_steps = gr.Slider(10, 1000, 300, step=10, label="Steps of learning")
            even = gr.Checkbox(False, label="Space the frames evenly",
                               info="Draws four times as many, and chooses.")  # fmt: skip
        with gr.Row():
            morph = gr.Button("Morph", variant="primary", size="md", elem_id="morph", min_width=120)
            cancel = gr.Button("Cancel", size="md", min_width=90)
        self.note = gr.HTML(words.note(""), elem_id="morph-note", min_height=28)
        with gr.Row(equal_height=False):
            self.film = gr.Image(
                label="Film",
                interactive=False,
                type="filepath",
                min_width=240,
                buttons=["download", "fullscreen"],
                elem_id="film",
            )
            self.strip = gr.Image(label="Strip", interactive=False, type="filepath", scale=2,
                                  min_width=300, buttons=["download", "fullscreen"],
                                  elem_id="strip")  # fmt: skip
        pictures, prompts = zip(*ends, strict=True)
        begun = morph.click(
            self.morph, None, [self.film, self.strip, self.note],
            inputs_kwargs={
                "first": pictures[0], "last": pictures[1], "first_prompt": prompts[0],
                "last_prompt": prompts[1], "model": self.model, "frames": frames, "steps": steps,
                "learn": learn, "learn_steps": learn_steps, "reschedule": even,
            }, preprocess=False, api_name="morph",
            concurrency_id=MODEL_QUEUE, show_progress_on=[self.note],
        )  # fmt: skip
        cancel.click(
            self.cancel, None, self.note, queue=False, show_progress="hidden",
            api_visibility="private", cancels=[begun],  # takes what waits out of the queue
        )  # fmt: skip

    @property
    def lists(self) -> list[Any]:
        """Lists of what lies under the folders."""
        return [self.model]

    def load(self) -> Updates:
        """The list as the folders are now."""
        models = self.room.folders.all_models()
        return {self.model: gr.update(choices=choices(models), value=next(iter(models), None))}

    def cancel(self, request: gr.Request) -> str:
        """End the session's morph; what has been learned is kept."""
        self.room.turns.cancel(request.session_hash or "", KIND)
        return words.note(CANCELLED)

    def read(
        self,
        first: Any,
        last: Any,
        first_prompt: Any,
        last_prompt: Any,
        model: Any,
        frames: Any,
        steps: Any,
        learn: Any,
        learn_steps: Any,
        reschedule: Any,
    ) -> Settings:
        """What the form says. Raises UserError for what the page would not send."""
        folder, config = self.room.temporary, self.room.config
        pictures = [given.upload(first, "the first picture", folder),
                    given.upload(last, "the last picture", folder)]  # fmt: skip
        files = [str(one.file) for one in pictures if one is not None]
        prompts = [given.text(first_prompt, "a prompt"), given.text(last_prompt, "a prompt")]
        if len(files) != 2:
            raise UserError("a morph leads from one picture to another; choose both")
        if not all(prompts):
            raise UserError("what do the two pictures show? Say it in a prompt for each")
        return Settings(
            pictures=(files[0], files[1]),
            prompts=(prompts[0], prompts[1]),
            model=chosen(model, self.room.folders.all_models(), "model"),
            frames=given.whole(frames, "frames", 3, 48),
            steps=given.whole(steps, "steps", 2, 100),
            learn=bool(learn),
            reschedule=bool(reschedule),
            learn_steps=given.whole(learn_steps, "steps of learning", 10, 1000) if learn else None,
            device=config.device,
            dtype=config.dtype,
            threads=config.threads,
        )

    def morph(self, request: gr.Request, **sent: Any) -> Iterator[Updates]:
        """Morph, telling what `infer morph` tells."""
        try:
            settings = self.read(**sent)
            self.room.held.free()  # the process has a model of its own
            with (
                self.room.turns.begin(request.session_hash or "", KIND) as turn,
                tempfile.TemporaryDirectory(dir=self.room.temporary) as folder,
            ):
                yield {self.film: None, self.strip: None, self.note: words.note("Starting…")}
                child = Child("morph", settings.to_json(), Path(folder) / "settings.json")
                for line in child.lines(turn):
                    yield {self.note: words.note(line)}
            output = Path(child.output)
            yield {
                self.film: str(output / "morph.gif"),
                self.strip: str(output / "strip.png"),
                self.note: words.note(f"{line}. In {output} lie the frames and the film."),
            }
        except Cancelled:
            yield {self.note: words.note(CANCELLED)}
        except Exception as error:
            yield {self.note: words.refusal(error)}


def end(label: str, name: str) -> tuple[Any, Any]:
    """A picture, and what it shows."""
    with gr.Column(min_width=140):
        picture = gr.Image(type="filepath", sources=["upload"], label=f"{label} picture",
                           height=220, buttons=[], elem_id=f"{name}-picture")  # fmt: skip
        prompt = gr.Textbox(label="Shows", max_length=given.PROMPT, elem_id=f"{name}-prompt",
                            placeholder="a red circle on a blue field")  # fmt: skip
        return picture, prompt
