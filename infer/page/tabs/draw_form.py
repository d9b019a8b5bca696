"""The form of the tab Draw: what is filled in, and where pictures appear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from infer.page import given, words
from infer.pipelines.sampling import drawing_schedulers

LORAS = 3
FEW, MANY = 8, 50  # steps that the slider offers for students, for models
STRONGEST = 15.0  # guidance
AS_TRAINED = "as trained"
AS_SUITS = 0  # steps or guidance that a program leaves out; the page sets both for what draws


@dataclass(frozen=True)
class Form:
    """What is filled in, and what is shown."""

    what: Any
    prompt: Any
    negative: Any
    steps: Any
    guidance: Any
    seed: Any
    scheduler: Any
    beside: Any
    teacher_steps: Any
    picture: Any
    strength: Any
    loras: tuple[Any, ...]
    scales: tuple[Any, ...]
    draw: Any
    again: Any
    cancel: Any
    note: Any
    student: Any
    student_note: Any
    teacher: Any
    teacher_note: Any

    @property
    def inputs(self) -> dict[str, Any]:
        """All that is sent, by the names under which `gradio_client` gives it."""
        loras = {f"lora_{number}": one for number, one in enumerate(self.loras, 1)}
        scales = {f"lora_{number}_scale": one for number, one in enumerate(self.scales, 1)}
        return {
            "what": self.what, "prompt": self.prompt, "negative_prompt": self.negative,
            "steps": self.steps, "guidance_scale": self.guidance, "seed": self.seed,
            "scheduler": self.scheduler, "teacher": self.beside,
            "teacher_steps": self.teacher_steps, "image": self.picture, "strength": self.strength,
            **loras, **scales,
        }  # fmt: skip

    @property
    def outputs(self) -> list[Any]:
        """All that a drawing changes."""
        return [self.student, self.student_note, self.teacher, self.teacher_note, self.note]


def layout() -> Form:
    """The form at the left, the pictures at the right; on a phone one below the other."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            what = gr.Dropdown(label="What draws", choices=[], elem_id="what")
            prompt = gr.Textbox(label="Prompt", lines=2, max_lines=4, max_length=given.PROMPT,
                                submit_btn=False, elem_id="prompt")  # fmt: skip
            # Without the button that would reset them to AS_SUITS.
            steps = gr.Slider(1, FEW, AS_SUITS, step=1, label="Steps", elem_id="steps", buttons=[])
            guidance = gr.Slider(
                1, STRONGEST, AS_SUITS, step=0.1, label="Guidance", info=" ", buttons=[]
            )
            with gr.Row(elem_classes="level"):
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
                again = gr.Button("New seed", size="md", min_width=100)
            rest = more_settings()
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                draw = gr.Button(
                    "Draw",
                    variant="primary",
                    size="md",
                    scale=3,
                    elem_id="draw",
                    min_width=120,
                    interactive=False,
                )
                cancel = gr.Button("Cancel", size="md", scale=1, elem_id="cancel", min_width=90)
            note = gr.HTML(words.note(""), elem_id="draw-note", min_height=28)
            with gr.Row(elem_classes="pair"):
                student, student_note = frame("student")
                teacher, teacher_note = frame("teacher")
    return Form(
        what=what, prompt=prompt, steps=steps, guidance=guidance, seed=seed, draw=draw,
        again=again, cancel=cancel, note=note, student=student, student_note=student_note,
        teacher=teacher, teacher_note=teacher_note, **rest,
    )  # fmt: skip


def more_settings() -> dict[str, Any]:
    """What is not needed at first, folded away."""
    with gr.Accordion("More settings", open=False):
        beside = gr.Checkbox(True, label="Draw the teacher beside it")
        teacher_steps = gr.Slider(1, MANY, MANY, step=1, label="Teacher's steps")
        negative = gr.Textbox(
            "",
            label="Negative prompt",
            max_length=given.PROMPT,
            info="For what is drawn with a second pass, such as the teacher.",
        )
        scheduler = gr.Dropdown([AS_TRAINED, *drawing_schedulers()], value=AS_TRAINED,
                                label="Scheduler of the student")  # fmt: skip
    loras, scales = [], []
    with gr.Accordion("LoRAs", open=False, elem_id="loras"):
        for number in range(1, LORAS + 1):
            with gr.Group():
                loras.append(
                    gr.Dropdown([("none", "")], value="", label=f"LoRA {number}",
                                elem_id=f"lora{number}")
                )  # fmt: skip
                scales.append(gr.Slider(-2, 2, 1, step=0.05, label="Scale", show_label=False))
    with gr.Accordion("Begin with a picture", open=False, elem_id="begin"):
        picture = gr.Image(type="filepath", sources=["upload"], show_label=False, height=200,
                           buttons=[], elem_id="picture")  # fmt: skip
        strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="Strength",
                             info="How far to go from it: 1 keeps nothing.")  # fmt: skip
    return {
        "beside": beside, "teacher_steps": teacher_steps, "negative": negative,
        "scheduler": scheduler, "loras": tuple(loras), "scales": tuple(scales),
        "picture": picture, "strength": strength,
    }  # fmt: skip


def frame(name: str) -> tuple[Any, Any]:
    """A place for a picture, with a line below it."""
    with gr.Column(min_width=140, elem_classes="frame"):
        picture = gr.Image(
            interactive=False, type="filepath", show_label=False, label=name, elem_id=name,
            buttons=["download", "fullscreen"],
        )  # fmt: skip
        return picture, gr.HTML(words.figure(name.capitalize(), ""), elem_id=f"{name}-note")
