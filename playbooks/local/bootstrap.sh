#!/usr/bin/env bash
# Installs what the controller lacks: Debian packages for the hosts in containers (unless
# --python-only) and .venv from a lock with hashes. Safe to repeat; silent when nothing is missing.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$root"

say() { printf '%s\n' "$*"; }
die() { say "bootstrap: $*" >&2; exit 1; }

work() { # work WHAT COMMAND...: run it as a phase, which says every ten seconds that it is at work
  local what=$1 beat log status=0
  shift
  say "== $what"
  log=$(mktemp)
  SECONDS=0
  (while sleep 10 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do say "   $(printf %4d "$SECONDS") s  at work"; done) &
  beat=$!
  "$@" >"$log" 2>&1 || status=$?
  kill "$beat" 2>/dev/null
  wait "$beat" 2>/dev/null || true
  [ "$status" -eq 0 ] || cat "$log" >&2
  rm -f "$log"
  [ "$status" -eq 0 ] || die "$what: failed, as shown above"
  say "   $what: $SECONDS s"
}

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
  need podman podman
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
  export DEBIAN_FRONTEND=noninteractive
  playbooks/local/as_root.sh true  # asks for a password, if it must, before the phases talk
  work "Debian's package lists" playbooks/local/as_root.sh apt-get update -qq
  work "Debian packages: ${missing[*]}" \
    playbooks/local/as_root.sh apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

python_environment() {
  python3 -m venv --clear .venv || return
  # uv alone first, with its hash from the lock: it installs the rest in a tenth of pip's time.
  sed -n '/^uv==/,/[^\\]$/p' "$lock" > .venv/uv.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt || return
  SSL_CERT_FILE=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt} \
    UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-}} \
    .venv/bin/uv pip sync --quiet --require-hashes --python .venv/bin/python "$lock"
}

lock=.config/requirements/controller.txt
digest=$(sha256sum "$lock" | cut -d' ' -f1)
if [ "$(cat .venv/odsp-lock 2>/dev/null)" != "$digest" ] || ! .venv/bin/python -c '' 2>/dev/null; then
  work "Ansible and uv in .venv" python_environment
  printf '%s' "$digest" > .venv/odsp-lock
fi
