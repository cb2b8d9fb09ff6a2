# Each target makes its own .venv if there is none, and makes it anew if it is broken or out of date.
PYTHON ?= python3
RUN := .venv/bin

.PHONY: quickstart test lint format venv clean

venv:
	@PYTHON=$(PYTHON) sh scripts/venv.sh

## both stages on rendered scenes, evaluation, report: runs/quickstart/report/report.html
quickstart: venv
	@test -f data/scenes/test/index.json || $(RUN)/mmgem data prepare scenes --out data/scenes --train 12000 --overwrite
	$(RUN)/mmgem train --config configs/quickstart.yaml --resume auto
	$(RUN)/mmgem eval all --model runs/quickstart --data data/scenes --split test --stages

## two processes share the files, those that start ranks first
test: venv
	$(RUN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: venv
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/pyright --pythonpath $(RUN)/python

format: venv
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
