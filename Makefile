# SPDX-License-Identifier: LGPL-2.1-or-later
# Every target sets up what it needs and says so. `make help` lists them.
.DELETE_ON_ERROR:
.PHONY: help setup install uninstall lab-kernel lab-image lab-shell demo test test-fast test-full check fuzz bench bench-vm bench-host bench-initrd clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
APT := tools/apt-missing
APT_RUN := python3 python3-venv python3-dev gcc pkg-config libsystemd-dev make git ca-certificates
APT_TEST := binutils cpio device-tree-compiler systemd dbus-daemon zstd xz-utils lz4 lzop
APT_BENCH := gcc libssl-dev
APT_VM := qemu-system-x86 qemu-utils gdb kmod e2fsprogs mmdebstrap
# The lab's machine sees this host's files, and only root may show them all; the kernel stays in the caller's cache.
AS_ROOT := $(if $(filter-out 0,$(shell id -u)),sudo) env HOME="$(HOME)"
# Missing tools and a missing kernel skip tests where somebody runs pytest by hand, and fail them here.
REQUIRE := vm,cpio,ruff,mypy,systemd-analyze,zstd,xz,lz4,lzop,dbus-daemon

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

# The stamp is newer than pyproject.toml when the environment has what it asks for. That file names every package of ours, too,
# which an editable install maps once, when it is made.
$(VENV)/.stamp: pyproject.toml tools/venv
	@$(APT) $(APT_RUN)
	@tools/venv $(VENV) $(PYTHON)

setup: $(VENV)/.stamp ## the virtual environment .venv, with khod and khoctl in it

# khod and khoctl for the host's own Python, with the packages that it has, and the units; pip does the same into an environment.
PREFIX ?= /usr/local
INTERPRETER ?= /usr/bin/python3
INSTALL = $(PYTHON) tools/install --destdir '$(DESTDIR)' --prefix '$(PREFIX)' --interpreter '$(INTERPRETER)'

install: ## khod, khoctl and the units to $(DESTDIR)$(PREFIX), for $(INTERPRETER)
	@$(INSTALL)

uninstall: ## remove all that `make install` put there
	@$(INSTALL) --remove

# Updates go from the older to the newer and back; what needs one kernel alone takes the newer, whose path is the last line.
KERNELS := 7.2 7.3

lab-kernel: ## build the lab's kernels unless cached; the last line is the path of the newer's bzImage
	@$(PYTHON) tests/vm/kernel.py $(KERNELS)

lab-image: $(VENV)/.stamp ## build the lab's host, Debian sid with systemd and khod, unless cached; the last line is its disk
	@$(APT) $(APT_VM)
	@$(PYTHON) tests/vm/kernel.py >/dev/null
	@$(AS_ROOT) $(BIN)/python -m tests.vm.image

lab-shell: $(VENV)/.stamp ## a shell in the lab's virtual machine, with khod running, to follow README.md by hand
	@$(APT) $(APT_VM)
	@$(PYTHON) tests/vm/kernel.py >/dev/null
	@$(AS_ROOT) $(BIN)/python -m tests.vm.shell

demo: $(VENV)/.stamp ## a whole live update of a simulated 1 TiB host
	@$(BIN)/khoctl demo

check: $(VENV)/.stamp ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

test-fast: $(VENV)/.stamp ## all tests but those in the virtual machine
	@$(APT) $(APT_TEST)
	$(BIN)/pytest -q -m "not vm and not full"

# Two at once: the machine's tests, one after the other, and all others beside them.
PARALLEL := --numprocesses 2 --dist loadgroup
# One recipe: `make test` is to stay below half an hour with built kernels, the rest is in `make test-full`.
test: SELECT := -m "not full"
test: $(VENV)/.stamp ## all tests, in the virtual machine too; builds the lab's kernels once
test-full: $(VENV)/.stamp ## those that take minutes as well
test test-full:
	@$(APT) $(APT_TEST) $(APT_VM)
	@$(PYTHON) tests/vm/kernel.py $(KERNELS) >/dev/null
	@$(AS_ROOT) $(BIN)/python -m tests.vm.image >/dev/null
	$(AS_ROOT) KHOD_REQUIRE=$(REQUIRE) $(BIN)/pytest -q $(PARALLEL) $(SELECT)

# Hours.
fuzz: $(VENV)/.stamp ## a million mutated inputs for every reader of foreign bytes, by a fixed seed
	$(BIN)/pytest -q -m full tests/unit/test_abi_mutations.py

bench: $(VENV)/.stamp ## the folio map and khod's start against plain programs: a table, also as JSON in bench/out
	@$(APT) $(APT_BENCH)
	$(BIN)/python -m bench.run

bench-vm: $(VENV)/.stamp ## the blackout of 64 MiB across real kexecs, khod's and a bare C program's
	@$(APT) gcc libc6-dev $(APT_VM)
	@$(PYTHON) tests/vm/kernel.py >/dev/null
	$(BIN)/python -m bench.vm

bench-host: $(VENV)/.stamp ## the blackout of 256 MiB across jumps of a host with an init, by khod and by systemd alone
	@$(APT) $(APT_VM)
	@$(PYTHON) tests/vm/kernel.py >/dev/null
	@$(AS_ROOT) $(BIN)/python -m tests.vm.image >/dev/null
	$(AS_ROOT) $(BIN)/python -m bench.jumps

bench-initrd: $(VENV)/.stamp ## the blackout of 256 MiB with a restore in the initrd, against systemd alone and a bare C program
	@$(APT) gcc libc6-dev $(APT_VM)
	@$(PYTHON) tests/vm/kernel.py >/dev/null
	@$(AS_ROOT) $(BIN)/python -m tests.vm.image >/dev/null
	$(AS_ROOT) $(BIN)/python -m bench.initrd

clean: ## remove what was built here (the lab's cache stays)
	rm -rf $(VENV) build dist khod.egg-info bench/out .mypy_cache .ruff_cache .pytest_cache .hypothesis
