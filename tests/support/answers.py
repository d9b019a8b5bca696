"""The teacher's answers, written beside a cache as `prep teach` would, or marked by hand."""

import hashlib
from dataclasses import replace

import numpy as np
import torch

from shared.cache.answers import (
    AnswersIdentity,
    AnswersManifest,
    AnswersShard,
    answers_layout,
    answers_spec,
    embedding_hash,
)
from shared.cache.answers_store import answers_of, write_answers_manifest
from shared.cache.conditioning import TextEmbeds, load_conditioning
from shared.cache.draws import answer_generator, choose, draw_noises
from shared.cache.latents import finish_latents
from shared.cache.layout import TRAILER
from shared.cache.manifest import open_manifest
from shared.cache.paths import CachePaths
from shared.diffusion import (
    SCHEDULE,
    add_noise,
    schedule_from_config,
    schedule_settings,
    solver_timesteps,
)
from shared.models.family import load_config
from shared.models.fingerprint import signs
from shared.networks.denoiser import cond_and_uncond, load_unet

SEED = 11


def an_answers_identity(root, **more) -> AnswersIdentity:
    """Of a teacher that nobody knows, unless told."""
    empty = load_conditioning(CachePaths(root).conditioning).unconditional
    known = {
        "format": 1, "model": "", "teacher": "0" * 16, "schedule": dict(SCHEDULE),
        "num_ddim_timesteps": 50, "seed": SEED, "mixed_precision": "no", "dtype": "<f2",
        "unconditional": embedding_hash(empty), "batch_size": 1, "device": "cpu",
    }  # fmt: skip
    return AnswersIdentity(**known | more)


def write_answers(root, count=3, ask=None, without=None, held=None, **identity) -> AnswersManifest:
    """Write K = `count` answers of every sample and return their manifest.

    `ask(shard, key, spec, number, record, arrays)` gives one, `[2, C, h, w]`; else they say which
    they are (see `mark`). `held` says by shard how many it holds where that is more, `without`
    which samples have none.
    """
    cache, manifest = CachePaths(root), open_manifest(root)
    who = an_answers_identity(root, **identity)
    spec, folder = answers_spec(who, manifest.identity), answers_of(cache).root
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    shards = []
    for number, shard in enumerate(manifest.shards):
        here = (held or {}).get(number, count)
        layout = answers_layout(here, manifest.identity.vae.channels, shard.layout.latent_size,
                                who.dtype)  # fmt: skip
        missing = (without or {}).get(number, ())
        content = b""
        for index in range(shard.count):
            key, record, arrays = shard.layout.read(root / shard.file, index)
            found = [
                mark(layout, key, k)
                if ask is None
                else ask(key, spec, k, record, arrays).astype(who.dtype)
                for k in range(here)
            ]
            values = np.zeros_like(found) if index in missing else np.stack(found)
            content += layout.pack(key, {}, {"answers": values})
        content += TRAILER
        file = f"shards/answers{number}.tar"
        (folder / file).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        shards.append(
            AnswersShard(file, shard.file, layout, shard.count, len(content), sha256, missing)
        )
    answers = AnswersManifest(who, count, tuple(shards))
    write_answers_manifest(cache, answers)
    return answers


def mark(layout, key: str, number: int) -> np.ndarray:
    """Numbers that say whose answer it is and which: conditional, then unconditional."""
    field = layout.fields[0]
    rng = np.random.default_rng([int(key, 16), number])
    return rng.standard_normal(field.shape[1:]).astype(field.dtype)


ASKED: dict[object, np.ndarray] = {}  # by other tests of this process: most ask the same


class Teacher:
    """Asks a model's UNet, in fp32, one sample at a time."""

    def __init__(self, model, root) -> None:
        self.unet, self.config = load_unet(str(model)), scheduler_of(model)
        self.signs = signs(self.unet.parameters())
        self.schedule = schedule_from_config(self.config)
        self.betas = str({**self.config, "prediction_type": None})
        self.empty = load_conditioning(CachePaths(root).conditioning).unconditional
        self.scale = open_manifest(root).identity.vae.scaling_factor

    def __call__(self, key, spec, number, record, arrays) -> np.ndarray:
        here = (embedding_hash(self.empty), self.scale)
        question = (self.signs, self.betas, *here, spec, key, number, record["crc32"])
        if question not in ASKED:
            ASKED[question] = self.ask(key, spec, number, record, arrays)
        return ASKED[question]

    @torch.no_grad()
    def ask(self, key, spec, number, record, arrays) -> np.ndarray:
        rng = answer_generator(spec, key, number)
        choice = choose(spec, rng, record.get("num_captions", 1))
        raw = arrays["latents"][choice.view].copy()
        noise = np.empty((4, *raw.shape[1:]), np.float32)
        latent_noise = draw_noises(spec, rng, noise)
        x0 = torch.empty(noise.shape)
        finish_latents(raw, latent_noise, self.scale, x0)
        total = self.schedule.num_train_timesteps
        t, _ = solver_timesteps(torch.tensor([choice.index]), spec.num_ddim_timesteps, total)
        alpha, sigma = self.schedule.alpha_sigma(t)
        z = add_noise(x0[None], torch.from_numpy(noise)[None], alpha, sigma)
        pooled, ids = arrays.get("pooled_prompt_embeds"), arrays.get("time_ids")
        text = TextEmbeds(
            torch.tensor(arrays["prompt_embeds"][choice.caption][None]),
            None if pooled is None else torch.tensor(pooled[choice.caption][None]),
        )
        ids = None if ids is None else torch.tensor(ids[choice.view][None])
        return torch.cat(cond_and_uncond(self.unet, z, t, text, self.empty, ids)).numpy()


def scheduler_of(model) -> dict:
    return schedule_settings(load_config(str(model), "scheduler/scheduler_config.json"))


def teach(root, model, count=2, **more) -> AnswersManifest:
    """What `prep teach` would write for this model."""
    teacher = Teacher(model, root)
    who = {"teacher": teacher.signs, "schedule": teacher.config}
    return write_answers(root, count, teacher, **who | {"model": str(model)} | more)


def rewrite(root, **changes) -> None:
    """Let the answers' manifest say something else of where they come from."""
    from shared.cache.answers_store import open_answers

    found = open_answers(root)
    assert found is not None
    write_answers_manifest(
        CachePaths(root), replace(found, identity=replace(found.identity, **changes))
    )
