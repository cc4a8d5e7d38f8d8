# Each target installs what it needs and no more; a fresh machine needs Python 3.11 or later and make.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
EVERYTHING := simulations,data,cluster,files,custody,flower,nvflare,pfl,notebook,docs,dev

.PHONY: install demo test test-frameworks check docs bench reports gauntlet gauntlet-adapters reference cases evidence notebooks run-notebooks clean

install: .venv/all .venv/frameworks  ## everything that any target needs

.venv/bin/python:
	"$(PYTHON)" -c 'import sys; sys.exit("gradlens needs Python 3.11 or later, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	"$(PYTHON)" -m venv .venv

# Stamps: .venv/demo, .venv/docs, .venv/frameworks and .venv/all say which extras are installed; .venv/all covers the
# first two.
.venv/demo: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.[simulations]'
	touch $@

.venv/docs: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.[simulations,docs]'
	touch .venv/demo $@

.venv/all: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.[$(EVERYTHING)]'
	touch .venv/demo .venv/docs $@

.venv/frameworks: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.[simulations,files,flower,frameworks,dev]'
	touch .venv/demo $@

demo: .venv/demo  ## a sweep of simulated attacks on digits, analyzed: reports/demo.html
	$(BIN)/gradlens demo

test: .venv/all
	$(BIN)/python -m pytest

# what these packages would write into the home folder stays here, and nothing is asked of a hub
test-frameworks: export KERAS_HOME := $(CURDIR)/.venv/keras
test-frameworks: export HF_HOME := $(CURDIR)/.venv/huggingface
test-frameworks: export HF_HUB_OFFLINE := 1
test-frameworks: export GRADLENS_FRAMEWORKS := 1
test-frameworks: .venv/frameworks  ## real models of Keras, adapters of PEFT: a package that is missing is a failure here
	$(BIN)/python -m pytest tests/frameworks

check: .venv/all  ## lint, format, types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright

docs: .venv/docs  ## the site in docs/_build/html; warnings are errors, links are checked without a network
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --fresh-env --quiet -b html docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html

bench: .venv/all  ## beside the peers, each in its own environment below .bench: reports/bench.csv and its neighbors
	$(BIN)/python tests/benchmarks/bench.py
	$(BIN)/python tests/benchmarks/rules.py
	$(BIN)/python tests/benchmarks/scale.py
	$(BIN)/python tests/benchmarks/flower_filter.py
	$(BIN)/python tests/benchmarks/streamed.py

reports: export GRADLENS_DATA ?= ../shared/data
reports: .venv/all  ## the committed reports, from real data; what has run already is not run again
	$(BIN)/gradlens simulate simulations/scenarios/first_look.toml -o runs/first_look
	$(BIN)/gradlens report runs/first_look -o reports/first_look.html
	$(BIN)/python -m simulations.studies.picture runs/first_look reports/picture.png
	$(BIN)/gradlens simulate simulations/scenarios/localization.toml -o runs/localization
	$(BIN)/python -m simulations.studies.localization runs/localization
	$(BIN)/gradlens simulate simulations/scenarios/pruning.toml -o runs/pruning
	$(BIN)/python -m simulations.studies.pruning runs/pruning
	$(BIN)/gradlens simulate simulations/scenarios/norm_clipping.toml -o runs/norm_clipping
	$(BIN)/gradlens simulate simulations/scenarios/norm_clipping_femnist.toml -o runs/norm_clipping_femnist
	$(BIN)/python -m simulations.studies.norm_clipping runs/norm_clipping runs/norm_clipping_femnist
	$(BIN)/gradlens simulate simulations/scenarios/defenses.toml -o runs/defenses
	$(BIN)/python -m simulations.studies.defenses runs/defenses
	$(BIN)/gradlens simulate simulations/scenarios/attacks.toml -o runs/attacks
	$(BIN)/gradlens simulate simulations/scenarios/attacks_data.toml -o runs/attacks_data
	$(BIN)/gradlens simulate simulations/scenarios/replacement.toml -o runs/replacement
	$(BIN)/python -m simulations.studies.attacks runs/attacks runs/attacks_data runs/replacement
	$(BIN)/python docs/results.py

gauntlet: export GRADLENS_DATA ?= ../shared/data
gauntlet: .venv/all  ## every detector against every attack; a part: make gauntlet SEEDS=7,8 FAMILIES=trigger,label_flip
	$(BIN)/python -m simulations.studies.gauntlet $(if $(SEEDS),--seeds $(SEEDS)) $(if $(FAMILIES),--families $(FAMILIES)) $(if $(BENIGN),--benign $(BENIGN)) \
		$(if $(DETECTORS),--detectors $(DETECTORS)) $(if $(ATTACK),--attack $(ATTACK)) $(if $(SETTINGS),--settings $(SETTINGS))
	$(BIN)/python docs/results.py

gauntlet-adapters: export GRADLENS_DATA ?= ../shared/data
gauntlet-adapters: .venv/all  ## the same where clients send low-rank adapters: reports/gauntlet_adapters.csv
	$(BIN)/python -m simulations.studies.gauntlet --settings adapters --seeds 5,6,7 --benign 200 --out reports/gauntlet_adapters
	$(BIN)/python docs/results.py

reproduce-%: export GRADLENS_DATA ?= ../shared/data
reproduce-%: .venv/all  ## a seed paper again, in parts: reproduce-bilgin; reproduce-quick: small versions of all
	$(BIN)/python -m simulations.studies.reproduce $(if $(filter quick,$*),--quick,$*)
	$(BIN)/python docs/results.py

reference: .venv/all  ## gradlens/case/reference.json, in parts: call it again until it says nothing is missing
	$(BIN)/python -m simulations.studies.shipped_reference

cases: .venv/all  ## how often investigations are right: reports/cases.csv, in parts
	$(BIN)/python -m simulations.studies.cases
	$(BIN)/python docs/results.py

evidence: export GRADLENS_DATA ?= ../shared/data
evidence: .venv/all  ## verdicts on sketches beside those on whole updates; keeps 100 GB of runs
	$(BIN)/python -m simulations.studies.gauntlet --keep
	$(BIN)/python -m simulations.studies.evidence_levels runs/gauntlet

notebooks: .venv/all  ## opens the notebooks
	$(BIN)/python -m jupyter lab notebooks

run-notebooks: .venv/all  ## runs every notebook anew and stores what it shows; what they simulate is deleted
	rm -rf notebooks/runs notebooks/handed_over
	$(BIN)/python -m jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/*.ipynb
	rm -rf notebooks/runs notebooks/handed_over

clean:
	rm -rf .venv .bench runs reports/demo.html docs/_build docs/generated build dist
