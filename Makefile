# `make demo` trains the whole cascade on two CPU cores and draws a picture; `make test` runs the tests.
# Both make a virtual environment of their own in .venv.

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
STAGES := clip prior decoder upsampler_1

.PHONY: demo test digits clean

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

demo: .venv/installed
	for stage in $(STAGES); do \
	    $(BIN)/python train.py --config configs/shapes.py:$$stage --workdir $(DEMO) || exit 1; \
	done
	$(BIN)/python sample.py text2image --system $(DEMO) --num 4 --out $(DEMO)/pictures \
	    --prompt "a large red square" --prompt "a small blue star on a black background" \
	    --prompt "a large green circle on a white background" --prompt "a small yellow cross" \
	    --prompt "a large purple triangle" --prompt "a small pink circle on a gray background"
	$(BIN)/python -m dalle2_jax.evaluation retrieval --system $(DEMO) --out $(DEMO)/retrieval
	$(BIN)/python -m dalle2_jax.evaluation attributes --system $(DEMO) --out $(DEMO)/attributes
	@echo "The pictures: $(DEMO)/pictures/grid.png, and of held-out captions: $(DEMO)/attributes/grid.png"

digits: .venv/installed
	test -d $(DEMO)-digits-data || $(BIN)/python -m dalle2_jax.data digits $(DEMO)-digits-data
	for stage in clip prior decoder; do \
	    $(BIN)/python train.py --config configs/folder.py:$$stage --workdir $(DEMO)-digits \
	        --config.data.path=$(DEMO)-digits-data || exit 1; \
	done
	$(BIN)/python -m dalle2_jax.evaluation digits --system $(DEMO)-digits --out $(DEMO)-digits/accuracy

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

clean:
	rm -rf .venv runs
