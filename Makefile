# What a fresh machine needs: Python 3.11 or later with venv, make, git, Linux.
#   make demo    watch a migration succeed and a bad one roll itself back
#   make test    the whole suite        make check   lint, format, types
#   make bench   the benchmarks, as JSON on stdout; more than an hour
#   make fuzz    coverage-guided fuzzing of what decodes, SECONDS=60 for all targets; JSON on stdout
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2
SECONDS ?= 60
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
LINTED := $(wildcard broker agents monitors coordinator tests examples)

.PHONY: help demo test check bench bench-assess bench-bus bench-rules bench-monitor fuzz format clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,5s/^# *//p' Makefile

# Installed again only when what is to be installed has changed.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Interlock needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/interlock demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not serial"
	$(BIN)/python -m pytest -q -m serial || test $$? -eq 5  # 5: there are none

check: $(STAMP)
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy

bench: $(STAMP)
	@set -e; for script in tests/benchmarks/bench_*.py; do test -e "$$script" || continue; $(BIN)/python "$$script"; done

# Telemetry beside nats-server, redis-server and mosquitto, where they are installed; the event log; 10,000 hosts.
# One JSON object each. About ten minutes; with QUICK=--quick, two.
bench-bus: $(STAMP)
	@set -e; for name in bus events scale; do $(BIN)/python tests/benchmarks/bench_$$name.py $(QUICK); done

# The rule engine alone, and from a publisher's send to the rollback, beside Prometheus and Alertmanager.
bench-rules: $(STAMP)
	@set -e; $(BIN)/python tests/benchmarks/bench_rules.py; $(BIN)/python tests/benchmarks/bench_rules_soak.py; $(BIN)/python tests/benchmarks/bench_rules_path.py --rival

# What a monitor of eight GPUs costs beside gpustat and nvitop, and how soon it tells of a fault; against the stand-in for
# NVIDIA's library that the tests use, so it needs a C compiler and no GPU. Then what it costs to watch a machine and 20
# agents. Two JSON objects; four minutes, with QUICK=--quick one.
bench-monitor: $(STAMP)
	@$(BIN)/python tests/benchmarks/bench_monitor.py $(QUICK)
	@$(BIN)/python tests/benchmarks/bench_monitor_host.py $(QUICK)

# `interlock assess` over CPython's Lib, beside radon and lizard where they are installed.
bench-assess: $(STAMP)
	@$(BIN)/python tests/benchmarks/bench_assess.py

# Needs atheris, which is installed for it alone: it has wheels for Linux on x86-64.
fuzz: $(STAMP)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(PIP) install -c constraints.txt -e '.[fuzz]' || true
	@$(BIN)/python tests/benchmarks/fuzz_wire.py --seconds $(SECONDS)

format: $(STAMP)
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(LINTED) -name __pycache__ -type d -prune -exec rm -rf {} +
