# make demo   from nothing to a talking model: environment, toy world, codec, four stages, three conversations, scores
# make test   environment and test suite
# make slow   the checks that take minutes, against the reference packages too
PYTHON ?= python3
MINUTES ?= 20
PY = .venv/bin/python
# MINUTES is for all of it. More minutes also get more to hear; what is left of them after each step is trained in the next.
BEGUN := $(shell date +%s)
left = $$(awk "BEGIN { left = $(MINUTES) - ($$(date +%s) - $(BEGUN)) / 60; m = left * $(1) - $(2); print (m > 0.5 ? m : 0.5) }")

demo: .venv/ready
	test -f data/toy/manifest.jsonl || $(PY) prepare.py toy --items $$((200 * $(MINUTES))) --sentences $$((75 * $(MINUTES))) --voices $$((8 + $(MINUTES) * 2 / 5))
	$(PY) train.py --config codec --minutes $(call left,0.25,0) --resume
	test data/toy/encoded/meta.json -nt out/codec/checkpoint.pt || $(PY) prepare.py encode
	$(PY) train.py --config tiny --minutes $(call left,1,5.5) --resume
	$(PY) eval.py --checkpoint out/tiny --smoke --asr-minutes 1.5

test: .venv/ready
	$(PY) -m pytest -q

slow: .venv/ready
	.venv/bin/pip install -q --disable-pip-version-check -e '.[reference]'
	.venv/bin/pip install -q --disable-pip-version-check --no-deps moshi==0.2.13
	$(PY) -m pytest -q -m slow

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -e '.[toy,weights,plot,web]'
	touch $@

.PHONY: demo test slow
