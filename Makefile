# make demo   from nothing to a talking model: environment, toy world, codec, four stages, three conversations, scores
# make test   environment and test suite
PYTHON ?= python3
MINUTES ?= 20
PY = .venv/bin/python
# MINUTES is for all of it on two CPU cores: some five go into speaking, encoding and evaluating, the rest is training.
part = $(shell awk 'BEGIN { print ($(MINUTES) - 5.5) * $(1) }')

demo: .venv/ready
	test -f data/toy/manifest.jsonl || $(PY) prepare.py toy
	$(PY) train.py --config codec --minutes $(call part,0.3) --resume
	test data/toy/encoded/meta.json -nt out/codec/checkpoint.pt || $(PY) prepare.py encode
	$(PY) train.py --config tiny --minutes $(call part,0.6) --resume
	$(PY) eval.py --checkpoint out/tiny --asr-minutes $(call part,0.1)

test: .venv/ready
	$(PY) -m pytest -q

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -e '.[toy]'
	touch $@

.PHONY: demo test
