"""The tab Draw: a student's picture beside its teacher's of the same noise."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import gradio as gr

from infer.page import given, words
from infer.page.folders import choices, chosen
from infer.page.room import MODEL_QUEUE, Room
from infer.page.tabs.draw_form import AS_SUITS, AS_TRAINED, FEW, LORAS, MANY, STRONGEST, layout
from infer.page.work.following import OnStep, following
from infer.page.work.studio import Drawing, Drawn, Studio, Wish
from infer.page.work.turns import Cancelled, Turn
from infer.pipelines.choose import Choice
from infer.pipelines.sampling import Guidance, drawing_schedulers
from shared.errors import UserError

KIND = "draw"
SMALL = 128  # pixels; smaller pictures are shown with their pixels
LARGEST_SEED = 2**32 - 1
RUN, MODEL = "run", "model"  # of a name in the list: `run/lcd`, `model/sdxl`
EMPTY = "There is no student under {} yet, and no --models were given: `make train` makes one."
Updates = dict[Any, Any]  # new values by component


class DrawTab:
    """The tab's form, and what happens in it."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.studio = Studio(room.config, room.held, room.temporary)
        self.form = layout()
        form, of_model = self.form, {"concurrency_id": MODEL_QUEUE, "preprocess": False}
        drawing = {"fn": self.draw, "inputs_kwargs": form.inputs, "outputs": form.outputs,
                   "show_progress_on": [form.note], **of_model}  # fmt: skip
        private = {"api_visibility": "private"}
        new_seed = form.again.click(
            lambda: random.randrange(LARGEST_SEED), None, form.seed, queue=False, **private
        )
        begun = [
            form.draw.click(**drawing, api_name="draw"),
            form.prompt.submit(**drawing, **private),
            form.steps.release(**drawing, **private, trigger_mode="always_last"),
            new_seed.then(**drawing, **private),
        ]
        form.cancel.click(
            self.cancel, None, form.note, queue=False, show_progress="hidden", api_name="cancel",
            cancels=begun,  # takes what waits out of the queue
        )  # fmt: skip
        form.what.input(
            self.suit, [form.what, form.prompt], self.suited, preprocess=False, queue=False,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip

    # ---- What draws

    @property
    def suited(self) -> list[Any]:
        """What depends on what draws."""
        form = self.form
        return [form.steps, form.guidance, form.negative, form.prompt, form.scheduler,
                form.beside, form.teacher_steps, form.note]  # fmt: skip

    @property
    def lists(self) -> list[Any]:
        """Lists of what lies under the folders."""
        return [self.form.what, *self.form.loras, self.form.draw]

    def load(self) -> Updates:
        """The lists as the folders are now, for a page that is opened."""
        folders = self.room.folders
        runs, models = folders.students(), folders.all_models()
        listed = [(f"{label} ({'LoRA' if runs[name].lora else 'full'} student)", f"{RUN}/{name}")
                  for label, name in choices(runs)]  # fmt: skip
        listed += [(label, f"{MODEL}/{name}") for label, name in choices(models)]
        newest = max(runs, key=lambda name: runs[name].folder.stat().st_mtime_ns, default=None)
        first = f"{RUN}/{newest}" if newest else listed[0][1] if listed else None
        loras = [("none", ""), *choices(folders.loras())]
        updates: Updates = {
            self.form.what: gr.update(choices=listed, value=first),
            self.form.draw: gr.update(interactive=first is not None),
        }
        updates |= {one: gr.update(choices=loras, value="") for one in self.form.loras}
        if first is None:
            form, nothing = self.form, gr.update(visible=False)  # nothing that they could suit
            updates |= {one: gr.skip() for one in self.suited}
            updates |= {form.steps: nothing, form.guidance: dict(nothing)}
            return updates | {form.note: words.note(EMPTY.format(folders.runs))}
        return updates | self.suit(first, "")

    def suit(self, what: Any, prompt: Any) -> Updates:
        """Steps, guidance and words that suit what draws."""
        form = self.form
        unchanged: Updates = {one: gr.skip() for one in self.suited}
        try:
            wish = self.what_draws(what)
            choice = self.studio.choice(wish)
        except Exception as error:
            return unchanged | {form.note: words.refusal(error)}
        sampling = choice.sampling
        few = sampling.distilled
        own = choice.prompts[0] if choice.prompts and not str(prompt or "").strip() else gr.skip()
        most = min(FEW if few else MANY, sampling.most_steps)
        student = choice.run is not None
        return {
            form.steps: gr.update(
                maximum=most, value=min(sampling.steps, most), interactive=most > 1
            ),
            form.guidance: gr.update(
                value=choice.model.family.guidance_scale, info=guidance_info(choice)
            ),
            form.negative: gr.update(visible=student or not few),
            form.prompt: own,
            form.scheduler: gr.update(value=AS_TRAINED),
            form.beside: gr.update(visible=student),
            form.teacher_steps: gr.update(visible=student),
            form.note: words.note(""),
        }

    def what_draws(self, what: Any) -> Wish:
        """The run or the model that a list's value names. Raises UserError for any other."""
        kind, _, name = what.partition("/") if isinstance(what, str) else ("", "", "")
        if kind == RUN:
            student = chosen(name, self.room.folders.students(), "run with a student")
            return Wish(run=student.folder, model=None, prompt="")
        model = chosen(name if kind == MODEL else what, self.room.folders.all_models(), "model")
        return Wish(run=None, model=model, prompt="")

    # ---- Drawing

    def read(self, sent: Mapping[str, Any]) -> Wish:
        """What the form says. Raises UserError for what the page would not send."""
        drawer = self.what_draws(sent["what"])
        steps, guidance, teacher_steps = sent["steps"], sent["guidance_scale"], 0
        if sent["teacher"]:
            teacher_steps = given.whole(sent["teacher_steps"], "teacher's steps", 1, MANY)
        scheduler = sent["scheduler"]
        if scheduler not in [AS_TRAINED, *drawing_schedulers()]:
            raise UserError("there is no such scheduler; choose one from the list")
        if not (asked := given.text(sent["prompt"], "the prompt")):
            raise UserError("the prompt is missing; say what the picture shall show")
        image = given.upload(sent["image"], "the picture", self.room.temporary)
        return Wish(
            run=drawer.run,
            model=drawer.model,
            prompt=asked,
            negative_prompt=given.text(sent["negative_prompt"], "the negative prompt"),
            steps=None if left_out(steps) else given.whole(steps, "steps", 1, MANY),
            guidance_scale=(
                None if left_out(guidance) else given.number(guidance, "guidance", 1, STRONGEST)
            ),
            seed=given.whole(sent["seed"], "the seed", 0, LARGEST_SEED),
            scheduler=None if scheduler == AS_TRAINED else scheduler,
            loras=self.read_loras(sent),
            image=None if image is None else image.file,
            strength=given.number(sent["strength"], "strength", 0.05, 1),
            teacher_steps=teacher_steps,
        )

    def read_loras(self, sent: Mapping[str, Any]) -> tuple[tuple[Any, float], ...]:
        """LoRAs and scales. Raises UserError for one that is in no list."""
        listed = self.room.folders.loras()
        return tuple(
            (chosen(name, listed, "LoRA"), given.number(scale, "a LoRA's scale", -2, 2))
            for number in range(1, LORAS + 1)
            for name, scale in [(sent[f"lora_{number}"], sent[f"lora_{number}_scale"])]
            if name
        )

    def draw(self, request: gr.Request, image: Any = None, **sent: Any) -> Iterator[Updates]:
        """Draw what the form says: one picture after the other appears.

        `image` stands apart, for Gradio lets programs leave out what has a default.
        """
        form, session = self.form, request.session_hash or ""
        shown: Updates = {}  # all of it in each answer: a program reads the last one
        try:
            own, teacher = self.studio.plan(self.read({**sent, "image": image}))
            shown = self.empty(own, teacher)
            with self.room.turns.begin(session, KIND) as turn:
                pair = [own] if teacher is None else self.studio.in_order(own, teacher)
                for one in pair:
                    yield copied(shown) | {form.note: words.note("Loading the model…")}
                    drawn = yield from self.draw_one(one, one is teacher, turn)
                    shown |= self.shown(drawn, one is teacher)
            same = "" if teacher is None else "Both begin with the same noise."
            yield copied(shown) | {form.note: words.note(same)}
        except Cancelled:
            yield copied(shown) | {form.note: words.note("Cancelled.")}
        except Exception as error:
            yield copied(shown) | {form.note: words.refusal(error)}

    def draw_one(
        self, drawing: Drawing, is_teacher: bool, turn: Turn
    ) -> Generator[Updates, None, Drawn]:
        """Draw one of the two; each step is told, and may be the last."""
        who = "The teacher" if is_teacher else drawing.job.choice.name
        draw = self.studio.draw_teacher if is_teacher else self.studio.draw

        def alone(on_step: OnStep) -> Drawn:
            with self.room.one:
                turn.check()
                return draw(drawing, on_step)

        steps = following(alone, turn)
        while True:
            try:
                done, total = next(steps)
            except StopIteration as end:
                drawn: Drawn = end.value
                return drawn
            yield {self.form.note: words.note(f"{who} draws: step {done} of {total}")}

    def empty(self, own: Drawing, teacher: Drawing | None) -> Updates:
        """Empty places for pictures: none beside a model that draws alone."""
        form, beside = self.form, teacher is not None
        return {
            form.student: gr.update(value=None),
            form.student_note: words.figure(name_of(own), ""),
            form.teacher: gr.update(value=None, visible=beside),
            form.teacher_note: gr.update(value=words.figure("Teacher", ""), visible=beside),
        }

    def shown(self, drawn: Drawn, is_teacher: bool) -> Updates:
        """A picture and its caption in their place."""
        form = self.form
        picture, caption = (
            (form.teacher, form.teacher_note) if is_teacher else (form.student, form.student_note)
        )
        who = "Teacher" if is_teacher else name_of(drawn.drawing)
        small = ["small"] if max(drawn.pixels.shape[:2]) <= SMALL else []
        return {
            picture: gr.update(value=str(drawn.file), elem_classes=small),
            caption: words.figure(f"{who}: {drawn.took}", drawn.drawing.how),
        }

    def cancel(self, request: gr.Request) -> str:
        """End the session's drawing after the step under way."""
        self.room.turns.cancel(request.session_hash or "", KIND)
        return words.note("Cancelled.")


def left_out(value: Any) -> bool:
    """Is it for what draws to say?"""
    return value == AS_SUITS and not isinstance(value, bool)


def name_of(own: Drawing) -> str:
    """What draws beside a teacher, or alone."""
    return "Student" if own.job.choice.run else "Model"


def copied(updates: Updates) -> Updates:
    """The same once more: Gradio empties the updates that it is given."""
    return {one: dict(new) if isinstance(new, dict) else new for one, new in updates.items()}


def guidance_info(choice: Choice) -> str:
    """What guidance is to what draws."""
    ends = choice.sampling.known_guidance
    known = "" if ends is None else f", and knows {ends[0]:g} to {ends[1]:g}"
    return {
        Guidance.LEARNED: "Built into the student; this is the teacher's.",
        Guidance.TOLD: f"The student is told it{known}; the teacher takes a second pass.",
        Guidance.CLASSIFIER_FREE: "A second pass in each step; 1 for none.",
    }[choice.sampling.guidance]
