# The platform on this machine, and its tests. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
platform = .venv/bin/python playbooks/local/platform.py

.PHONY: help
help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

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

.PHONY: controller
controller: # what the controller lacks: podman, mmdebstrap, .venv
	@playbooks/local/bootstrap.sh
