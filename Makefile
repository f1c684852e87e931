# `make demo` generates images with the system that comes with the package, then trains another one from scratch on two
# CPU cores; `make test` runs the tests.
# Both create a virtual environment in .venv. `make lint` and `make types` need the extra "dev".

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
STAGES := clip prior decoder upsampler_1
INCLUDED := dalle2_jax/pretrained

.PHONY: install demo digits box test lint types clean

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

install: .venv/installed

demo: .venv/installed
	$(BIN)/python sample.py text2image --system emoji --num 4 --out $(DEMO)-included \
	    --prompt "a butterfly, fluent 3d emoji" --prompt "a red apple, noto emoji" \
	    --prompt "a sunflower, fluent flat emoji" --prompt "an octopus, twemoji"
	@echo "Images of a system that comes with the package: $(DEMO)-included/grid.png. Now another one is trained."
	for stage in $(STAGES); do \
	    $(BIN)/python train.py --config configs/shapes.py:$$stage --workdir $(DEMO) || exit 1; \
	done
	$(BIN)/python sample.py text2image --system $(DEMO) --num 4 --out $(DEMO)/images \
	    --prompt "a large red square" --prompt "a small blue star on a black background" \
	    --prompt "a large green circle on a white background" --prompt "a small yellow cross" \
	    --prompt "a large purple triangle" --prompt "a small pink circle on a gray background"
	$(BIN)/dalle2 evaluate $(DEMO) --measures retrieval,attributes --out $(DEMO)/measures
	@echo "The images: $(DEMO)/images/grid.png, and those of newly sampled captions: $(DEMO)/measures/grid.png"

digits: .venv/installed
	test -d $(DEMO)-digits-data || $(BIN)/dalle2 data digits $(DEMO)-digits-data
	for stage in clip prior decoder; do \
	    $(BIN)/python train.py --config configs/folder.py:$$stage --workdir $(DEMO)-digits \
	        --config.data.path=$(DEMO)-digits-data || exit 1; \
	done
	$(BIN)/dalle2 evaluate $(DEMO)-digits --measures digits --out $(DEMO)-digits/accuracy

# make box NAME=shapes SYSTEM=runs/demo: a trained system replaces the one of that name in the package, except its card
box: .venv/installed
	rm -rf build/box
	$(BIN)/dalle2 weights pack $(SYSTEM) build/box/$(NAME) --card $(INCLUDED)/$(NAME)/README.md
	rm -rf $(INCLUDED)/$(NAME)
	mv build/box/$(NAME) $(INCLUDED)/$(NAME)

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/installed
	$(BIN)/basedpyright --level error --pythonpath $(BIN)/python

clean:
	rm -rf .venv runs site build dist
