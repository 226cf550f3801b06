# The platform on this machine, and its tests. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
platform = .venv/bin/python playbooks/local/platform.py
tests = .venv/bin/python molecule/run.py
# Set, as images often have it, every run of Ansible compiles itself anew: a fifth of its time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: up
up: controller ## a running platform on this machine, and its proof; safe to repeat
	@$(platform) up

.PHONY: down
down: controller ## remove the platform's hosts with all they hold; secrets and caches stay
	@$(platform) down

.PHONY: hosts
hosts: controller ## create or start the containers of inventories/local, nothing else
	@$(platform) hosts

.PHONY: status
status: controller ## every host and unit with its state
	@$(platform) status

.PHONY: verify
verify: controller ## walk the data's way through the platform, one line per link
	@$(platform) verify

.PHONY: shell
shell: controller ## a shell on a host: make shell HOST=core-1
	@$(platform) shell $(HOST)

.PHONY: test
test: controller ## what a clone must pass: lint, unit, contract, a platform from nothing; about 15 minutes
	@$(tests) lint unit contract platform

.PHONY: lint unit contract platform
lint: controller ## every linter over everything it understands
	@$(tests) lint
unit: controller ## the model server's own tests
	@$(tests) unit
contract: controller ## the repository's promises to itself, bad inventories among them
	@$(tests) contract
platform: controller ## one platform from nothing: used, broken, enlarged, removed
	@$(tests) platform

.PHONY: molecule
molecule: controller ## every role alone on Debian 12 and 13; ROLE=mlflow RELEASE=trixie for one
	@$(tests) molecule $(if $(ROLE),--role $(ROLE)) $(if $(RELEASE),--release $(RELEASE))

.PHONY: mutate
mutate: controller ## break roles on purpose: their tests must notice; ROLE=mlflow for one
	@.venv/bin/python molecule/mutate.py $(if $(ROLE),--role $(ROLE)) $(if $(RELEASE),--release $(RELEASE))

.PHONY: test-all
test-all: controller ## all of it: test and molecule with their long tests, a random topology, mutations
	@ODSP_LONG_TESTS=1 $(tests) lint unit contract platform molecule random $(if $(SEED),--seed $(SEED)) --record
	@.venv/bin/python molecule/mutate.py
	@$(MAKE) --no-print-directory docs

.PHONY: bench
bench: controller ## the model server beside its peers: docs/serving.md; 20 idle minutes, wrk, 4 GB
	@python3 bench/serving/run.py --docs

.PHONY: docs
docs: controller ## what is generated: the roles' tables of inputs, reliability, mutations
	@.venv/bin/python docs/role_readmes.py
	@.venv/bin/python docs/reliability.py

.PHONY: controller
controller: # what the controller lacks: podman, mmdebstrap, .venv
	@playbooks/local/bootstrap.sh
