#!/bin/sh
# Prints an OpenSSL configuration: the system's own ($1) and one option more. Tornado's peers end a TLS
# connection by closing it. OpenSSL answers that with an alert, the alert meets a closed socket, and Python 3.13
# leaves its "Broken pipe" in the thread's queue of errors, where the next quiet connection finds it: one client's
# farewell cost a worker its scheduler. Dask and HTTP carry lengths and notice a torn message.
set -eu
value() { # value SECTION NAME: what the system's configuration says, its last word
  awk -v section="$2" -v name="$3" '
    { sub(/#.*/, "") }
    /^[ \t]*\[/ { gsub(/[][ \t]/, ""); current = $0; next }
    (current == "" ? "default" : current) == section {
      split($0, pair, "=")
      gsub(/[ \t]/, "", pair[1])
      if (pair[1] == name) { found = substr($0, index($0, "=") + 1); gsub(/^[ \t]+|[ \t]+$/, "", found) }
    }
    END { print found }' "$1"
}
init=$(value "$1" default openssl_conf)
init=${init:-odsp_init}
ssl=$(value "$1" "$init" ssl_conf)
ssl=${ssl:-odsp_ssl}
tls=$(value "$1" "$ssl" system_default)
tls=${tls:-odsp_tls}
options=$(value "$1" "$tls" Options)
cat <<CNF
.include $1
[default]
openssl_conf = $init
[$init]
ssl_conf = $ssl
[$ssl]
system_default = $tls
[$tls]
Options = ${options:+$options,}IgnoreUnexpectedEOF
CNF
