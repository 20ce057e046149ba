# make demo    train, evaluate and infer on synthetic scenes; needs Python 3.10+ only
# make test    lint and the fast tests
# make check   make test, the slow tests, the fast ones without optional packages, make demo

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OPTIONAL := lancedb lance pyarrow gradio ray lance_ray rasterio onnxruntime playwright

.PHONY: demo test check clean

$(VENV)/runtime: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/development: $(wildcard requirements-*.txt) $(VENV)/runtime
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(VENV)/runtime
	$(RUN) train.py
	$(RUN) evaluate.py
	$(RUN) infer.py

test: $(VENV)/development
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

check: test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow -n 2
	FGCROSS_BLOCKED="$(OPTIONAL)" OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2
	$(MAKE) demo

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
	if [ -f data/scenes/scenes.json ]; then rm -rf data/scenes; fi
