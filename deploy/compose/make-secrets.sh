#!/bin/sh
# One random password a secret, kept where there is one already.
set -eu
cd "$(dirname "$0")"
mkdir -p -m 700 secrets
for name in pg_password redis_password; do
  [ -s "secrets/$name" ] || head -c 24 /dev/urandom | base64 | tr '+/' '-_' >"secrets/$name"
  # compose mounts the file as it is, and the servers read it as users of their own; the folder keeps others out
  chmod 644 "secrets/$name"
done
