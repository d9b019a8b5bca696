"""docs/flags.md against the real command lines: every flag people know is there, or refused."""

import importlib
import json
import re

import pytest

from shared.cli.config import flags_of, parse
from shared.cli.other_tools import diffusers_scripts, kohya, tutorials
from shared.cli.other_tools.flags import DISTILL, ENCODE, REFUSED, TAKEN, TOOLS, Translation, dashed
from shared.cli.other_tools.values import Reader, Switch
from shared.errors import UsageError
from tests.conftest import ROOT

# The arguments of their parsers, those of train_lcm_distill_*.py first.
LCM = """
pretrained_teacher_model pretrained_vae_model_name_or_path teacher_revision revision output_dir
cache_dir seed logging_dir report_to checkpointing_steps checkpoints_total_limit
resume_from_checkpoint resolution interpolation_type center_crop random_flip dataloader_num_workers
train_batch_size num_train_epochs max_train_steps max_train_samples learning_rate scale_lr
lr_scheduler lr_warmup_steps gradient_accumulation_steps use_8bit_adam adam_beta1 adam_beta2
adam_weight_decay adam_epsilon max_grad_norm w_min w_max num_ddim_timesteps loss_type huber_c
vae_encode_batch_size timestep_scaling_factor mixed_precision allow_tf32
enable_xformers_memory_efficient_attention gradient_checkpointing local_rank validation_steps
push_to_hub hub_token hub_model_id tracker_project_name train_shards_path_or_url
proportion_empty_prompts cast_teacher_unet unet_time_cond_proj_dim ema_decay use_fix_crop_and_size
lora_rank lora_alpha lora_dropout lora_target_modules dataset_name dataset_config_name
train_data_dir image_column caption_column encode_batch_size
""".split()  # noqa: SIM905
DIFFUSERS = """
pretrained_model_name_or_path variant validation_prompts validation_prompt num_validation_images
validation_epochs input_perturbation snr_gamma dream_training dream_detail_preservation use_ema
offload_ema foreach_ema non_ema_revision prediction_type noise_offset image_interpolation_mode rank
timestep_bias_strategy timestep_bias_multiplier timestep_bias_begin timestep_bias_end
timestep_bias_portion enable_npu_flash_attention train_text_encoder debug_loss tokenizer_name
instance_data_dir class_data_dir instance_prompt class_prompt with_prior_preservation
prior_loss_weight num_class_images sample_batch_size lr_num_cycles lr_power
prior_generation_precision pre_compute_text_embeddings tokenizer_max_length
text_encoder_use_attention_mask validation_images class_labels_conditioning repeats
do_edm_style_training output_kohya_format text_encoder_lr optimizer prodigy_beta3 prodigy_decouple
adam_weight_decay_text_encoder prodigy_use_bias_correction prodigy_safeguard_warmup use_dora
""".split()  # noqa: SIM905
KOHYA = """
cpu_offload_checkpointing no_metadata save_model_as unet_lr text_encoder_lr fp8_base_unet
network_weights network_module network_dim network_alpha network_dropout network_args
network_train_unet_only network_train_text_encoder_only training_comment dim_from_weights
scale_weight_norms base_weights base_weights_multiplier no_half_vae skip_until_initial_step
initial_epoch initial_step validation_seed validation_split validate_every_n_steps
validate_every_n_epochs max_validation_steps diffusers_xformers train_text_encoder learning_rate_te
learning_rate_te1 learning_rate_te2 block_lr fused_optimizer_groups no_token_padding
stop_text_encoder_training v2 v_parameterization pretrained_model_name_or_path tokenizer_cache_dir
optimizer_type use_8bit_adam use_lion_optimizer learning_rate max_grad_norm optimizer_args
optimizer_schedulefree_wrapper schedulefree_wrapper_args lr_scheduler_type lr_scheduler_args
lr_scheduler lr_warmup_steps lr_decay_steps lr_scheduler_num_cycles lr_scheduler_power
fused_backward_pass lr_scheduler_timescale lr_scheduler_min_lr_ratio output_dir output_name
huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token
huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload
save_precision save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs
save_last_n_epochs_state save_last_n_steps save_last_n_steps_state save_state
save_state_on_train_end resume train_batch_size max_token_length mem_eff_attn torch_compile
dynamo_backend xformers sdpa vae max_train_steps max_train_epochs max_data_loader_n_workers
persistent_data_loader_workers seed gradient_checkpointing gradient_accumulation_steps
mixed_precision full_fp16 full_bf16 fp8_base ddp_timeout ddp_gradient_as_bucket_view
ddp_static_graph clip_skip logging_dir log_with log_prefix log_tracker_name wandb_run_name
log_tracker_config wandb_api_key log_config noise_offset noise_offset_random_strength
multires_noise_iterations ip_noise_gamma ip_noise_gamma_random_strength perlin_noise
multires_noise_discount adaptive_noise_scale zero_terminal_snr min_timestep max_timestep loss_type
huber_schedule huber_c huber_scale lowram highvram sample_every_n_steps sample_at_first
sample_every_n_epochs sample_prompts sample_sampler config_file output_config prior_loss_weight
conditioning_data_dir masked_loss cache_text_encoder_outputs cache_text_encoder_outputs_to_disk
text_encoder_batch_size disable_mmap_load_safetensors weighting_scheme logit_mean logit_std
mode_scale blocks_to_swap train_data_dir cache_info shuffle_caption caption_separator
caption_extension caption_extention keep_tokens keep_tokens_separator secondary_separator
enable_wildcard caption_prefix caption_suffix color_aug flip_aug face_crop_aug_range random_crop
debug_dataset resolution cache_latents vae_batch_size cache_latents_to_disk skip_cache_check
enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale
resize_interpolation token_warmup_min token_warmup_step alpha_mask dataset_class
caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate reg_data_dir in_json
dataset_repeats use_safetensors dataset_config min_snr_gamma scale_v_pred_loss_like_noise_pred
v_pred_like_loss debiased_estimation_loss weighted_captions
""".split()  # noqa: SIM905
ARTICLE = "rank data_dir ckpt_name log_dir n_epochs lr_scheduler_name".split()  # noqa: SIM905
PIPELINES = ["num_inference_steps"]  # of diffusers' pipelines
KNOWN = list(dict.fromkeys(LCM + DIFFUSERS + KOHYA + ARTICLE + PIPELINES))

COMMANDS = {
    f"{stage} {name}": kind
    for stage in ("prep", "train", "infer")
    for name, (kind, _) in importlib.import_module(f"{stage}.__main__").COMMANDS.items()
}
BOTH = ("train distill", "prep encode")


@pytest.fixture(scope="module")
def rows():
    """Flag -> where it is, and what the tables say of it."""
    text = (ROOT / "docs" / "flags.md").read_text()
    found = {}
    for flags, where, say in re.findall(r"^\| (`--[^|]+) \| ([^|]+) \|([^|]*)\|$", text, re.M):
        for flag in re.findall(r"`--([\w-]+)`", flags):
            assert flag not in found, flag
            found[flag.replace("-", "_")] = (where.split(", "), say.strip())
    return found


def fate(command: str, name: str) -> str:
    """Our name for it, or why it is refused."""
    translation = Translation(flags_of(COMMANDS[command]))
    try:
        rule = translation._rule(name)
    except UsageError as error:
        return str(error)
    return rule if isinstance(rule, str) else rule.ours


@pytest.mark.parametrize("name", KNOWN)
def test_a_flag_is_there_or_refused(rows, name):
    """As the table says, by every name and with every dash."""
    where, say = rows[name]
    for command in BOTH:
        found = fate(command, name)
        if command in where:
            same = re.search(r"the same as `--([\w-]+)", say)
            assert found == (same.group(1).replace("-", "_") if same else name)
            continue
        assert found.startswith(f"{dashed(name)}: ")
        for typed in (dashed(name), f"--{name}", f"{dashed(name)}=1"):
            with pytest.raises(UsageError, match=re.escape(found)):
                parse(COMMANDS[command], [typed, "1"], "prog")
    if where == ["refused"]:
        assert say == REFUSED[name]
        assert len(say) > 20
    assert set(where) <= {*BOTH, "prep synthesize", "train sample", "refused"}


def test_the_tables_have_nothing_else(rows):
    ours = set().union(*map(flags_of, COMMANDS.values()))
    assert set(rows) - set(KNOWN) == set()
    assert (TAKEN.keys() | REFUSED.keys()) - set(KNOWN) == set()
    assert [name for name in KNOWN if name not in TAKEN.keys() | REFUSED.keys() | ours] == []


def test_every_name_stands_once():
    for table in ("TAKEN", "REFUSED"):
        names = [name for tool in TOOLS for name in getattr(tool, table)]
        assert len(names) == len(set(names))


def test_what_is_taken_is_a_flag():
    ours = set().union(*map(flags_of, COMMANDS.values()))
    for name, rule in TAKEN.items():
        assert (rule if isinstance(rule, str) else rule.ours) in ours, name


def test_the_hints_name_flags_that_exist():
    """A refusal that sends people to a flag which is not there would be worse than none."""
    ours = {dashed(name) for kind in COMMANDS.values() for name in flags_of(kind)}
    theirs = {"--revision", "--local-dir", "--config", "--dry-run"}
    for name, hint in REFUSED.items():
        assert set(re.findall(r"--[a-z][\w-]*", hint)) <= ours | theirs, name
        for stage, command in re.findall(r"`(?:python -m )?(prep|train) (\w+)", hint):
            assert f"{stage} {command}" in COMMANDS, name


@pytest.mark.parametrize(("here", "there", "names"), [
    ("train distill", "prep encode", ENCODE), ("prep encode", "train distill", DISTILL),
])  # fmt: skip
def test_every_flag_of_the_other_stage_says_so(here, there, names):
    missing = flags_of(COMMANDS[there]) - flags_of(COMMANDS[here])
    for name in sorted(missing - {"run"}):  # --run is refused for --output-dir as well
        assert name in names
        assert f": a flag of stage {'one' if names is ENCODE else 'two'}" in fate(here, name)


def typed(command: str, *words: str):
    return parse(COMMANDS[command], words, "prog")


BASE = {
    "train distill": ("--model", "m", "--cache", "c", "--run", "r"),
    "prep encode": ("--shards", "s", "--model", "m", "--cache", "c"),
}
VALUES = [
    ("train distill", "rank", "8", {"lora_rank": 8}),
    ("train distill", "network_dim", "8", {"lora_rank": 8}),
    ("train distill", "network_alpha", "1", {"lora_alpha": 1}),
    ("train distill", "network_module", "networks.lora", {"student": "lora"}),
    ("train distill", "unet_lr", "1e-4", {"learning_rate": 1e-4}),
    ("train distill", "optimizer_type", "AdamW8bit", {"use_8bit_adam": True}),
    ("train distill", "optimizer", "adamw", {"use_8bit_adam": False}),
    ("train distill", "max_train_epochs", "3", {"num_train_epochs": 3}),
    ("train distill", "n_epochs", "3", {"num_train_epochs": 3}),
    ("train distill", "save_every_n_steps", "7", {"checkpointing_steps": 7}),
    ("train distill", "sample_every_n_steps", "7", {"validation_steps": 7}),
    ("train distill", "resume", "r/x", {"resume_from_checkpoint": "r/x"}),
    ("train distill", "validation_prompt", "a b", {"validation_prompts": ("a b",)}),
    ("train distill", "log_with", "all", {"report_to": ("tensorboard", "wandb")}),
    ("train distill", "log_with", "wandb", {"report_to": ("wandb",)}),
    ("train distill", "lr_scheduler_name", "cosine", {"lr_scheduler": "cosine"}),
    ("train distill", "lr_warmup_steps", "5", {"lr_warmup_steps": 5}),
    ("train distill", "huggingface_repo_id", "a/b", {"push_to_hub": True, "hub_model_id": "a/b"}),
    ("prep encode", "resolution", "512", {"resolution": 512}),
    ("prep encode", "resolution", "512,512", {"resolution": 512}),
    ("prep encode", "text_encoder_batch_size", "4", {"text_batch_size": 4}),
]
SWITCHES = [
    ("train distill", "xformers", {"attention": "xformers"}),
    ("train distill", "sdpa", {"attention": "sdpa"}),
    ("train distill", "torch_compile", {"compile": True}),
    ("prep encode", "no_half_vae", {"vae_dtype": "float32"}),
    ("prep encode", "enable_bucket", {"buckets": True}),
    ("prep encode", "flip_aug", {"random_flip": True}),
]


@pytest.mark.parametrize(("command", "name", "value", "wanted"), VALUES)
def test_values_become_ours(tmp_path, command, name, value, wanted):
    """Typed in two ways, and in a file."""
    number = re.fullmatch(r"[\d.e-]+", value)
    (tmp_path / "x.json").write_text(json.dumps({name: json.loads(value) if number else value}))
    for words in ([f"--{name}", value], [f"{dashed(name)}={value}"],
                  ["--config", str(tmp_path / "x.json")]):  # fmt: skip
        config = typed(command, *words, *BASE[command])
        assert {ours: getattr(config, ours) for ours in wanted} == wanted
        assert set(wanted) <= getattr(config, "typed", set(wanted))


@pytest.mark.parametrize(("command", "name", "wanted"), SWITCHES)
def test_switches_become_ours(tmp_path, command, name, wanted):
    plain = typed(command, *BASE[command])
    for value, found in ((True, wanted), (False, {ours: getattr(plain, ours) for ours in wanted})):
        (tmp_path / "x.json").write_text(json.dumps({name: value}))
        config = typed(command, "--config", str(tmp_path / "x.json"), *BASE[command])
        assert {ours: getattr(config, ours) for ours in found} == found
    config = typed(command, f"--{name}", *BASE[command])
    assert {ours: getattr(config, ours) for ours in wanted} == wanted


def test_nothing_but_these_is_taken_otherwise():
    """A rule that makes other values of theirs is among the tests above."""
    tried = {name for _, name, *_ in (*VALUES, *SWITCHES)}
    rules = {name for name, rule in TAKEN.items() if isinstance(rule, Switch | Reader)}
    assert rules - tried == {"enable_xformers_memory_efficient_attention", "diffusers_xformers"}


WRONG = [
    ("prep encode", ["--resolution", "768,512"], "is not square; .* --resolution 640, a"),
    ("prep encode", ["--resolution", "a,b"], "is not a number of pixels"),
    ("train distill", ["--optimizer_type", "Lion"], "AdamW and AdamW8bit are"),
    ("train distill", ["--network_module", "lycoris.kohya"], "networks.lora is, as --student lora"),
    ("train distill", ["--lr_warmup_steps", "0.1"], "is a fraction of the steps"),
    ("train distill", ["--optimizer_type"], "--optimizer_type wants a value"),
    ("train distill", ["--optimizer_type", "--seed", "1"], "--optimizer_type wants a value"),
    ("train distill", ["--xformers=1"], "--xformers is a switch"),
    ("train distill", ["--rank", "4", "--network_dim", "4"], "--rank and --network-dim are one"),
    ("train distill", ["--unet_lr=1", "--learning-rate=1"], "are one setting here; give one"),
    ("train distill", ["--network-dimm", "4"], "is unknown; did you mean --network-dim?"),
    ("prep encode", ["--cach", "4"], "--cach is unknown; did you mean --cache?"),
    ("train distill", ["--no-scale-l"], "is unknown; did you mean --scale-lr?"),
    ("train distill", ["--zzzz"], "--zzzz is unknown$"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "words", "message"), WRONG)
def test_what_is_wrong_is_told_in_a_line(command, words, message):
    with pytest.raises(UsageError, match=message) as error:
        typed(command, *BASE[command], *words)
    assert "\n" not in str(error.value)


def test_the_article(tmp_path):
    """Its JSON, with the names that are ours; its name of a file is refused."""
    settings = {"rank": 4, "log_dir": "logs", "n_epochs": 2, "lr_scheduler_name": "linear",
                "model": "tiny-sd", "cache": "c", "run": "r"}  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(settings))
    config = typed("train distill", "--config", str(tmp_path / "x.json"))
    assert (config.lora_rank, config.num_train_epochs) == (4, 2)
    assert (str(config.logging_dir), config.lr_scheduler) == ("logs", "linear")
    for name, message in (("ckpt_name", "--run"), ("data_dir", "prep encode --shards")):
        (tmp_path / "x.json").write_text(json.dumps({**settings, name: "x"}))
        with pytest.raises(UsageError, match=f"{dashed(name)}: .*{message}"):
            typed("train distill", "--config", str(tmp_path / "x.json"))
    assert {*tutorials.TAKEN, *tutorials.REFUSED} < set(ARTICLE)
    assert {*diffusers_scripts.TAKEN, *diffusers_scripts.REFUSED} <= {*LCM, *DIFFUSERS, *PIPELINES}
    assert {*kohya.TAKEN, *kohya.REFUSED} <= set(KOHYA)
