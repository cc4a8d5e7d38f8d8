# Each target creates what it needs; a fresh machine needs Python 3.11 or later and make.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: install demo test check bench reports gauntlet evidence notebooks clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("gradlens needs Python 3.11 or later, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[simulations,data,cluster,files,flower,nvflare,pfl,notebook,dev]'
	touch $@

demo: $(STAMP)  ## a sweep of simulated attacks on digits, analysed: reports/demo.html
	$(BIN)/gradlens demo

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(STAMP)  ## beside the peers, each in its own environment below .bench: reports/bench.csv and its neighbours
	$(BIN)/python tests/benchmarks/bench.py
	$(BIN)/python tests/benchmarks/rules.py
	$(BIN)/python tests/benchmarks/scale.py
	$(BIN)/python tests/benchmarks/flower_filter.py
	$(BIN)/python tests/benchmarks/streamed.py

reports: export GRADLENS_DATA ?= ../shared/data
reports: $(STAMP)  ## the committed reports, from real data; what has run already is not run again
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

gauntlet: export GRADLENS_DATA ?= ../shared/data
gauntlet: $(STAMP)  ## every detector against every attack; a part: make gauntlet SEEDS=7,8 FAMILIES=trigger,label_flip
	$(BIN)/python -m simulations.studies.gauntlet $(if $(SEEDS),--seeds $(SEEDS)) $(if $(FAMILIES),--families $(FAMILIES)) $(if $(BENIGN),--benign $(BENIGN)) \
		$(if $(DETECTORS),--detectors $(DETECTORS)) $(if $(ATTACK),--attack $(ATTACK)) $(if $(SETTINGS),--settings $(SETTINGS))

evidence: export GRADLENS_DATA ?= ../shared/data
evidence: $(STAMP)  ## verdicts on sketches beside those on whole updates; keeps 45 GB of runs
	$(BIN)/python -m simulations.studies.gauntlet --keep
	$(BIN)/python -m simulations.studies.evidence_levels runs/gauntlet

notebooks: $(STAMP)  ## opens the notebooks
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf .venv .bench runs reports/demo.html
