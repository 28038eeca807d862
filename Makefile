# make talk   a page to talk to a small model, whose weights are in this repository
# make page   the same without a server: a folder with the model in it, for any static host
# make demo   from nothing to a talking model: environment, toy world, codec, stages, three conversations, scores
#             (MINUTES=60: an hour of it; SEED=2: other weights, another world; give it again to go on with it)
# make test   environment and test suite
# make slow   the checks that take minutes, against the reference packages too
# make gpu    ten minutes on a GPU: kernels, a frame's time, conversations, training -> GPU.md (DRY=1: on a CPU)
# make weights DIGITS=free-spoken-digit-dataset   how the weights of `make talk` were made: two hours on two cores
PYTHON ?= python3
MINUTES ?= 20
SEED ?= 1
PY = .venv/bin/python
# MINUTES is for all of it, once the environment is there. More minutes also get more to hear; what is left of them after
# each step is trained in the next.
left = $$(awk "BEGIN { left = $(MINUTES) - ($$(date +%s) - $(BEGUN)) / 60; m = left * $(1) - $(2); print (m > 0.5 ? m : 0.5) }")

talk: .venv/ready
	test -d out/talk || $(PY) -m live.packed weights/talk.safetensors out/talk
	$(PY) chat.py --checkpoint out/talk --web --open

page: .venv/ready
	.venv/bin/pip install -q --disable-pip-version-check -e '.[page]'
	test -d out/talk || $(PY) -m live.packed weights/talk.safetensors out/talk
	$(PY) -m page.export out/talk out/page
	$(PY) -m http.server --bind 127.0.0.1 --directory out/page

demo: .venv/ready
	@if test -f out/tiny/demo.done; then echo "The demo is over: out/tiny is trained to its end, its scores are in" \
		"out/tiny/eval.json. 'rm -r data/toy out/codec out/tiny' begins anew; 'make demo MINUTES=60' then takes an hour."; \
	else $(MAKE) --no-print-directory demo-steps BEGUN=$$(date +%s); fi

demo-steps:
	test -f data/toy/manifest.jsonl || $(PY) prepare.py toy --items $$((4000 + 200 * $(MINUTES))) --sentences $$((1500 + 75 * $(MINUTES))) --voices $$((8 + 2 * $(MINUTES))) --seed $(SEED) --minutes $(call left,0.075,0)
	$(PY) train.py --config codec --minutes $(call left,0.25,0) --seed $(SEED) --resume
	test data/toy/encoded/meta.json -nt out/codec/checkpoint.pt || $(PY) prepare.py encode
	$(PY) train.py --config tiny --minutes $(call left,1,1.5) --seed $(SEED) --resume
	$(PY) eval.py --checkpoint out/tiny --smoke --minutes $(call left,1,0)
	touch out/tiny/demo.done

# Two fifths of its users have voices made from recordings of people, as far as they are installed; on Debian, with its
# sections contrib and non-free: apt install flite libttspico-utils rhvoice rhvoice-english espeak-ng mbrola mbrola-us1
# mbrola-us2 mbrola-us3 mbrola-en1 mbrola-af1 mbrola-de4 mbrola-de5 mbrola-de6 mbrola-fr1 mbrola-fr4 mbrola-hu1 mbrola-nl2
# mbrola-pl1 mbrola-ro1 mbrola-sw1 mbrola-sw2
weights: .venv/ready
	test -d "$(DIGITS)" || { echo "DIGITS=FOLDER names the free-spoken-digit-dataset"; exit 1; }
	test -d data/wide || $(PY) prepare.py toy --out data/wide --items 12000 --sentences 9000 --voices 600 --others installed
	test -d data/people || $(PY) prepare.py words $(DIGITS) --out data/people --hold-out george,lucas --others installed
	$(PY) train.py --config codec --data data/wide,data/people --augment 0.75 --minutes 35 --out out/wide --resume
	$(PY) prepare.py encode --data data/wide --codec out/wide/checkpoint.pt --copies 3 --augment 0.75
	$(PY) prepare.py encode --data data/people --codec out/wide/checkpoint.pt --tokenizer data/wide/encoded --copies 4 --augment 0.75
	$(PY) train.py --config mini --data data/wide/encoded,data/people/encoded --minutes 52 --resume
	$(PY) -m live.packed out/mini weights/talk.safetensors --note "make weights DIGITS=free-spoken-digit-dataset"
	$(PY) -m evals.recogniser --data data/wide --minutes 9 --out weights/recogniser.safetensors

test: .venv/ready
	$(PY) -m pytest -q

slow: .venv/ready
	.venv/bin/pip install -q --disable-pip-version-check -e '.[reference]'
	.venv/bin/pip install -q --disable-pip-version-check --no-deps moshi==0.2.13
	$(PY) -m pytest -q -m slow

gpu: .venv/ready
	$(PY) tests/bench_card.py $(if $(DRY),--dry --report GPU-dry.md)

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -e '.[toy,weights,plot,web]'
	touch $@

.PHONY: talk page demo demo-steps test slow gpu weights
