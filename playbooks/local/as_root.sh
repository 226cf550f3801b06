#!/usr/bin/env bash
# Runs a command as root: at once if we are, else through sudo, which asks on the terminal.
# The only place that says which variables root needs. Whatever installs Python or Go packages runs
# as the caller and keeps all of them.
set -euo pipefail
[ "$(id -u)" -ne 0 ] || exec "$@"

refuse() {
  printf '%s\n' "This needs root, and $1: run it as root, or from a terminal as a user with sudo." >&2
  exit 1
}
command -v sudo >/dev/null || refuse "sudo is not installed"
sudo -n true 2>/dev/null || sudo -v || refuse "sudo refused"

# Files that root makes for the caller are the caller's; byte code in the checkout would not be.
ODSP_OWNER=$(id -u):$(id -g)
export ODSP_OWNER PYTHONDONTWRITEBYTECODE=1
keep=("${!ODSP_@}" "${!ANSIBLE_@}" CONTAINERS_CONF PYTHONDONTWRITEBYTECODE DEBIAN_FRONTEND TMPDIR
  SSL_CERT_FILE SSL_CERT_DIR
  http_proxy https_proxy ftp_proxy all_proxy no_proxy HTTP_PROXY HTTPS_PROXY FTP_PROXY ALL_PROXY NO_PROXY)
exec sudo --set-home --preserve-env="$(IFS=,; printf '%s' "${keep[*]}")" -- "$@"
