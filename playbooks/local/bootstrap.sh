#!/usr/bin/env bash
# Installs what the controller lacks: Debian packages for the hosts in containers (unless
# --python-only) and .venv from a lock with hashes. Safe to repeat; silent when nothing is missing.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"

say() { printf '%s\n' "$*"; }
die() { say "bootstrap: $*" >&2; exit 1; }

missing=()
need() { # need COMMAND PACKAGE...: the packages are missing if the command is
  local command=$1; shift
  command -v "$command" >/dev/null || [ -x "/usr/sbin/$command" ] || missing+=("$@")
}
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  || die "python3 is missing or older than 3.11: install Debian 12 or 13's python3"
python3 -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
need ssh openssh-client
need openssl openssl
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
if [ "${1:-}" != --python-only ]; then
  need podman podman netavark aardvark-dns
  # netavark's firewall: iptables on Debian 12, nftables on 13.
  need iptables iptables
  need nft nftables
  need mmdebstrap mmdebstrap
  [ -e /usr/share/keyrings/debian-archive-trixie-stable.gpg ] || missing+=(debian-archive-keyring)
  [ -x /usr/lib/podman/netavark ] || missing+=(netavark aardvark-dns)
  # crun refuses hybrid cgroups; runc runs under both.
  [ -e /sys/fs/cgroup/cgroup.controllers ] || need runc runc
fi
if [ ${#missing[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || die "this machine lacks ${missing[*]} and is not Debian: install them by hand"
  say "installing Debian packages: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  playbooks/local/as_root.sh apt-get update -qq
  playbooks/local/as_root.sh apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

lock=.config/requirements/controller.txt
digest=$(sha256sum "$lock" | cut -d' ' -f1)
if [ "$(cat .venv/odsp-lock 2>/dev/null)" != "$digest" ] || ! .venv/bin/python -c '' 2>/dev/null; then
  say "installing Ansible and uv into .venv"
  python3 -m venv --clear .venv
  # uv alone first, with its hash from the lock: it installs the rest in a tenth of pip's time.
  sed -n '/^uv==/,/[^\\]$/p' "$lock" > .venv/uv.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt
  SSL_CERT_FILE=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt} \
    UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-}} \
    .venv/bin/uv pip sync --quiet --require-hashes --python .venv/bin/python "$lock"
  printf '%s' "$digest" > .venv/odsp-lock
fi
